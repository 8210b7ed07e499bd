"""What the machine tells devices that compress: of each of its updates the truth, until it is known to be heard."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpace.protocol.encoded import FOLDED, NONE, OPEN, folded_name
from fedpace.strategies import FedAvg, FedBuff
from fedpace.strategies.composition import Composition
from fedpace.strategies.events import Effect, Send, StrategyEvent
from fedpace.strategies.fates import REMEMBERED, Fates
from fedpace.strategies.gates import Deadline
from fedpace.strategies.parts import Work
from fedpace.strategies.state import Task
from tests.generators import law
from tests.strategies.driver import Driver

GATES = [
    FedBuff(3, fraction_evaluate=0.5),
    FedBuff(1, max_staleness=1),
    FedAvg(min_train_nodes=1, min_available_nodes=1),
    FedAvg(gate=Deadline(5.0, over_selection=1.5), fraction_evaluate=0.0),
]


class Told(Driver):
    """Nodes of even number compress; each has two streams. What they are told is held against the books."""

    def __init__(self, composition: Composition, nodes: int, slots: int) -> None:
        self.streams: dict[int, int] = {}  # task -> the stream its update was of
        self.told: dict[int, set[str]] = {}  # task -> what it told its device to be folded
        self.nodes: dict[int, tuple[int, str]] = {}  # task -> node, kind
        self.unheard: dict[int, set[str]] = {}  # node -> what was folded and is not known to be heard
        super().__init__(composition, nodes, 6, slots=slots)

    def compressed(self, task: int, stream: int, *, refused: bool = False) -> None:
        node, kind = self.out[task]
        if node % 2 or kind != "train":
            self.reply(task)
            return
        known = self.state.tasks[task]
        self.machine.compressed(self.state, known, 0 if refused else stream)
        self.unheard.setdefault(node, set())
        if refused:
            self.fail(task)
            return
        self.streams[task] = stream
        self.unheard[node] -= {name for name in self.told[task] if name.endswith(f"@{stream:08x}")}
        self.reply(task)

    def _perform(self, effect: Effect) -> list[StrategyEvent]:
        if isinstance(effect, Send):
            for order in effect.orders:
                self._check(effect.kind, order.node_id, order.task, order.config)
        return super()._perform(effect)

    def _check(self, kind: str, node: int, task: int, config: Any) -> None:
        self.nodes[task] = node, kind
        self.told[task] = set(str(config.get(FOLDED, "")).split())
        if node not in self.unheard or kind != "train":
            assert OPEN not in config and FOLDED not in config
            return
        assert self.told[task] == self.unheard[node]
        still = {t for t, (n, k) in self.out.items() if n == node and k == "train"}
        still |= {t for t in self.arrived if self.nodes[t][0] == node}
        assert set(config[OPEN].split()) == ({str(t) for t in still} or {NONE})

    def _end(self, task: int, fate: str) -> None:
        super()._end(task, fate)
        if fate == "folded" and task in self.streams:
            self.unheard[self.nodes[task][0]].add(folded_name(str(task), self.streams[task]))


@law
@given(data=st.data(), gate=st.sampled_from(GATES), slots=st.integers(1, 3))
def test_every_task_tells_what_is_folded_and_not_heard_and_what_is_open(data: Any, gate: Any, slots: int) -> None:
    driver = Told(gate.composition, 4, slots)
    for _ in range(data.draw(st.integers(1, 60))):
        if driver.finish is not None:
            break
        what = data.draw(st.sampled_from(["reply", "reply", "reply", "refuse", "fail", "wait", "leave", "join"]))
        out = sorted(driver.out)
        if what in ("reply", "refuse") and out:
            task, stream = data.draw(st.sampled_from(out)), data.draw(st.sampled_from([7, 8]))
            driver.compressed(task, stream, refused=what == "refuse")
        elif what == "fail" and out:
            driver.fail(data.draw(st.sampled_from(out)))
        elif what == "wait":
            driver.wait(data.draw(st.floats(0.1, 20.0)))
        elif what == "leave" and driver.alive:
            driver.leave(data.draw(st.sampled_from(sorted(driver.alive))))
        elif what == "join" and driver.known - driver.alive:
            driver.join(data.draw(st.sampled_from(sorted(driver.known - driver.alive))))


def test_where_nobody_compresses_nothing_is_kept_or_told() -> None:
    driver = Driver(FedBuff(2, min_available_nodes=1, min_train_nodes=1).composition, 3, 5)
    while driver.finish is None:
        driver.reply(min(driver.out))
    assert not driver.state.told
    assert not any(order.config for sent in driver.sent for order in sent.orders)


def test_no_more_than_so_many_are_remembered() -> None:
    fates = Fates([])
    for number in range(1, REMEMBERED + 3):
        task = Task(number, 0, "train", 0, 0, Work(), 0.0, message_id=str(number), stream=5)
        fates.settle(task, "folded")
    assert len(fates.folded) == REMEMBERED and folded_name("2", 5) not in fates.folded


@pytest.mark.parametrize("fate", ["lost", "given up", "discarded"])
def test_only_what_was_folded_is_told(fate: str) -> None:
    task = Task(1, 0, "train", 0, 0, Work(), 0.0, message_id="1", stream=5)
    fates = Fates([task])
    fates.settle(task, fate)
    assert fates.tell(Task(2, 0, "train", 0, 0, Work(), 0.0), {}) == {OPEN: NONE}


def test_while_a_message_has_no_id_its_device_is_told_nothing() -> None:
    fates = Fates([Task(1, 0, "train", 0, 0, Work(), 0.0, message_id="1")])
    second = Task(2, 0, "train", 0, 0, Work(), 0.0)
    assert fates.tell(second, {"a": 1}) == {"a": 1, OPEN: "1"}
    assert fates.tell(Task(3, 0, "train", 0, 0, Work(), 0.0), {"a": 1}) == {"a": 1}
    second.message_id = "2"
    assert fates.tell(Task(4, 0, "train", 0, 0, Work(), 0.0), {}) == {}, "of the third it is not known yet"
