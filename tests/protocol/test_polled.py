"""`paced(grid)`: a foreign grid becomes one with events, whatever it answers, or if it never does."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedpace.clients.mods import measure
from fedpace.hosting.flower import Run, become, make_reply, set_message_id
from fedpace.protocol.paced import Event, Expired, Failed, Joined, Left, Order, PacedGrid, Replied, Tick
from fedpace.protocol.polled import LONGEST_PAUSE, paced
from tests.inline_grid import RUN_ID, InlineGrid

app = ClientApp(mods=[measure])


@app.train()
def work(message: Message, context: Context) -> Message:
    """Twice the array, plus what the device's own order says."""
    [array] = message.content.array_records["arrays"].to_numpy_ndarrays()
    plus = float(str(message.content.config_records["config"]["plus"]))
    metrics = MetricRecord({"num-examples": 1, "sum": float(array.sum())})
    return Message(RecordDict({"arrays": ArrayRecord([2 * array + plus]), "metrics": metrics}), reply_to=message)


def content(array: np.ndarray[Any, Any] | None = None) -> RecordDict:
    array = np.arange(3.0) if array is None else array
    return RecordDict({"arrays": ArrayRecord([array]), "config": ConfigRecord({"plus": 0.0})})


Answer = RecordDict | Error | None


class Scripted(Grid):
    """Answers each message by `script(node) -> (seconds, answer)`; None is no answer at all. Pulls never block."""

    def __init__(self, script: Callable[[int], tuple[float, Answer]], nodes: Iterable[int] = (5, 6, 7)) -> None:
        become(RUN_ID, 1)
        self.script = script
        self.nodes = list(nodes)
        self.refused: set[int] = set()
        self.marks_refused = False
        self.pulls: list[float] = []
        self.broken: Exception | None = None
        self._waiting: dict[str, tuple[float, Message]] = {}

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        return Run.create_empty(RUN_ID)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return iter(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids: list[Any] = []
        for number, message in enumerate(messages, len(self._waiting)):
            set_message_id(message, f"message-{number}")
            node = message.metadata.dst_node_id
            if node in self.refused:
                ids += [None] if self.marks_refused else []
                continue
            ids.append(f"message-{number}")
            seconds, answer = self.script(node)
            if answer is not None:
                got, error = (None, answer) if isinstance(answer, Error) else (answer, None)
                reply = make_reply(message.metadata, f"reply-{number}", time.time(), got, error)
                self._waiting[f"message-{number}"] = (time.monotonic() + seconds, reply)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.pulls.append(time.monotonic())
        if self.broken:
            raise self.broken
        now = time.monotonic()
        ready = [each for each in message_ids if each in self._waiting and self._waiting[each][0] <= now]
        return iter([self._waiting.pop(message_id)[1] for message_id in reversed(ready)])

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError


def reply(value: float = 1.0, **metrics: float) -> RecordDict:
    return RecordDict({"arrays": ArrayRecord([np.full(3, value)]), "metrics": MetricRecord(dict(metrics))})


def send(grid: PacedGrid, *nodes: int, ttl: float = 30.0) -> list[str]:
    return grid.send(content(), "train", [Order(node, {"plus": float(node)}) for node in nodes], ttl=ttl)


def events(grid: PacedGrid, kind: Any, count: int, seconds: float = 10.0) -> list[Any]:
    """The next events of a kind; all events are in order."""
    until, found, last = grid.now() + seconds, list[Event](), (0, -math.inf)
    while len(found) < count:
        event = grid.next_event(until)
        assert not isinstance(event, Tick), f"only {found}"
        assert (event.sequence, event.at) >= last and event.at <= grid.now()
        last = (event.sequence + 1, event.at)
        found += [event] if isinstance(event, kind) else []
    return found


def quiet(grid: PacedGrid, seconds: float) -> None:
    """Nothing more happens."""
    until = grid.now() + seconds
    event = grid.next_event(until)
    assert isinstance(event, Tick) and event.at >= until


# ---------------------------------------------------------------- a grid with devices that run an app


def test_a_paced_grid_is_itself() -> None:
    grid = paced(InlineGrid(app))
    assert paced(grid) is grid


def test_everything_that_happens_on_a_grid_in_memory() -> None:
    foreign = InlineGrid(app, nodes=3, broken=[2])
    grid = paced(foreign)
    assert sorted(grid.get_node_ids()) == [100, 101, 102]
    assert grid.run.run_id == RUN_ID
    with pytest.raises(KeyError):
        grid.profile(99)
    ids = send(grid, 100, 101, 102)
    joined = events(grid, Joined, 3)
    assert [(event.node_id, event.name) for event in joined] == [(100, "100"), (101, "101"), (102, "102")]
    first, second = events(grid, Replied, 2)
    [failed] = events(grid, Failed, 1)
    assert [first.message_id, second.message_id, failed.message_id] == ids
    assert (failed.node_id, failed.code, failed.reason) == (102, 2, "102: broken on purpose")
    assert first.metrics["sum"] == 3.0 and 0 < first.compute_seconds < 5 and first.metrics["bytes-in"] > 24

    [array] = second.update.arrays().values()
    assert array.tolist() == [101.0, 103.0, 105.0] and not array.flags.writeable
    assert second.update.arrays("arrays").keys() == second.update.arrays().keys() and not second.update.arrays("other")
    assert second.update.nbytes > array.nbytes
    copied = second.update.content()
    copied["metrics"]["sum"] = 0.0
    assert second.update.content()["metrics"]["sum"] == 3.0
    second.update.release()
    assert array.tolist() == [101.0, 103.0, 105.0] and not second.update.arrays()

    assert not list(grid.pull_messages(ids))
    profile = grid.profile(100)
    assert (profile.name, profile.slots, profile.cpu_count) == ("100", 1, 0)
    assert profile.seconds_per_task == first.compute_seconds and profile.download_bytes_per_second is None
    quiet(grid, 0.05)


def test_flowers_own_strategy_on_the_wrapped_grid() -> None:
    strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=3)
    result = strategy.start(
        grid=paced(InlineGrid(app, nodes=3)),
        initial_arrays=ArrayRecord([np.arange(3.0)]),
        num_rounds=2,
        train_config=ConfigRecord({"plus": 1.0}),
    )
    np.testing.assert_allclose(result.arrays.to_numpy_ndarrays()[0], [3.0, 7.0, 11.0])


def test_a_reply_is_given_out_once_as_a_message_or_as_an_event() -> None:
    grid = paced(InlineGrid(app, nodes=2))
    first, second = send(grid, 100, 101)
    events(grid, Replied, 1)  # the other one waits in the queue
    [message] = grid.pull_messages([first, second])
    assert message.metadata.reply_to_message_id == second and message.metadata.src_node_id == 101
    quiet(grid, 0.05)
    [third] = send(grid, 100)
    assert len(list(grid.pull_messages([third]))) == 1
    [answer] = grid.send_and_receive([Message(content(), 101, "train")], timeout=5.0)
    assert answer.has_content()
    quiet(grid, 0.05)


# ---------------------------------------------------------------- grids that do what they like


def test_late_out_of_order_with_errors_and_never() -> None:
    answers: dict[int, tuple[float, Answer]] = {
        1: (0.5, reply(1.0, **{"compute-seconds": 0.25, "loss": 0.5})),
        2: (0.0, Error(5, "Node Unavailable")),
        3: (0.0, None),
        4: (0.0, Error(3, "Message Unavailable")),
        5: (0.0, Error(2)),
        6: (0.0, reply(6.0, **{"compute-seconds": -1.0})),
    }
    grid = paced(Scripted(answers.__getitem__, nodes=answers))
    ids = dict(zip(answers, send(grid, *answers, ttl=1.0), strict=True))
    began = grid.now()
    found = events(grid, Replied | Failed | Expired, 6)
    assert [(type(each), each.message_id) for each in found] == [
        (Failed, ids[2]),
        (Expired, ids[4]),
        (Failed, ids[5]),
        (Replied, ids[6]),
        (Replied, ids[1]),
        (Expired, ids[3]),
    ]
    offline, gone, raised, soon, late, never = found
    assert (offline.code, offline.reason) == (5, "2: Node Unavailable") and gone.reason == "4: Message Unavailable"
    assert (raised.code, raised.reason) == (2, "5: it gave no reason")
    assert math.isnan(soon.compute_seconds) and grid.profile(6).seconds_per_task is None
    assert late.compute_seconds == 0.25 and late.metrics == {"compute-seconds": 0.25, "loss": 0.5}
    assert late.at - began > 0.4 and late.update.arrays()["0"].tolist() == [1.0, 1.0, 1.0]
    assert never.reason == "3: no reply within its time to live of 1 s"
    assert never.at - began > 0.9
    quiet(grid, 0.1)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        (ArrayRecord([np.array([1.0, np.nan, 1.0])]), "array '0' of record 'arrays' holds NaN or infinite numbers"),
        (ArrayRecord([np.ones(4)]), "is float64[4], but float64[3] was sent out"),
        (ArrayRecord({"0": Array("float64", (3,), "numpy.ndarray", b"no array")}), "is not a .npy array"),
    ],
)
def test_an_unsound_reply_is_a_failure(arrays: ArrayRecord, reason: str) -> None:
    grid = paced(Scripted(lambda node: (0.0, RecordDict({"arrays": arrays}))))
    [sent] = send(grid, 5)
    [failed] = events(grid, Failed, 1)
    assert failed.message_id == sent and failed.code == 4
    assert "reply rejected" in failed.reason and reason in failed.reason


def test_a_cancelled_message_is_never_heard_of_again() -> None:
    grid = paced(Scripted(lambda node: (0.1 if node == 5 else 0.0, reply())))
    out, first, second = send(grid, 5, 6, 7)
    assert events(grid, Replied, 1)[0].message_id == first  # that of 7 is in the queue
    grid.cancel([out, second, "unknown"])
    quiet(grid, 0.3)
    assert not list(grid.pull_messages([second]))


@pytest.mark.parametrize("marks", [False, True])
def test_a_message_that_the_grid_does_not_take_fails_at_once(marks: bool) -> None:
    foreign = Scripted(lambda node: (0.0, reply()))
    foreign.refused, foreign.marks_refused = {6}, marks
    grid = paced(foreign)
    ids = send(grid, 5, 6, 7)
    assert len(set(ids)) == 3
    [failed] = events(grid, Failed, 1)
    assert (failed.message_id, failed.node_id, failed.code) == (ids[1], 6, 5)
    assert failed.reason == "6: the grid did not take the message"
    assert {event.message_id for event in events(grid, Replied, 2)} == {ids[0], ids[2]}


def test_devices_come_and_go() -> None:
    foreign = Scripted(lambda node: (0.0, reply()), nodes=[8, 3])
    grid = paced(foreign)
    assert [event.node_id for event in events(grid, Joined, 2)] == [3, 8]
    foreign.nodes = [3, 4]
    [joined] = events(grid, Joined, 1)
    [left] = events(grid, Left, 1)
    assert (joined.node_id, left.node_id) == (4, 8)
    assert grid.profile(8).name == "8"  # what is known of it stays
    foreign.nodes = [3, 4, 8]
    grid.get_node_ids()  # whoever asks is told, and so are the events
    assert [event.node_id for event in events(grid, Joined, 1, seconds=0.1)] == [8]


def test_a_grid_that_breaks_ends_the_wait_with_its_own_error() -> None:
    foreign = Scripted(lambda node: (math.inf, reply()))
    grid = paced(foreign)
    send(grid, 5)
    events(grid, Joined, 3)
    foreign.broken = ConnectionError("the SuperLink is gone")
    with pytest.raises(ConnectionError, match="the SuperLink is gone"):
        grid.next_event(math.inf)


def test_pulls_become_rarer_and_quick_again() -> None:
    foreign = Scripted(lambda node: (0.0, None))
    grid = paced(foreign)
    events(grid, Joined, 3)
    quiet(grid, 0.2)
    assert not foreign.pulls  # nothing is out
    send(grid, 5)
    quiet(grid, 2.0)
    assert len(foreign.pulls) < 20 and np.diff(foreign.pulls).max() > 0.8 * LONGEST_PAUSE
    before = len(foreign.pulls)
    send(grid, 5)
    quiet(grid, LONGEST_PAUSE)
    assert len(foreign.pulls) - before > 2


# ---------------------------------------------------------------- what a run remembers


def test_decisions_and_state_in_a_directory(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    grid = paced(InlineGrid(app, nodes=1), directory)
    assert grid.restore() is None
    send(grid, 100)
    events(grid, Replied, 1)
    grid.record({"what": "decided", "why": {"slow": math.nan, "n": np.int64(3)}, "tasks": ("a",)})
    grid.save({"round": 1, "seen": math.nan, "rest": [-math.inf]})
    with pytest.raises(TypeError):
        grid.save({"round": object()})
    again = paced(InlineGrid(app, nodes=1), directory)
    state = again.restore()
    assert state is not None and state["round"] == 1 and math.isnan(state["seen"]) and state["rest"] == [-math.inf]
    [cancelled] = send(again, 100)
    again.cancel([cancelled])
    lines = [json.loads(line) for line in (directory / "decisions.jsonl").read_text().splitlines()]
    assert [(line["n"], line["what"]) for line in lines] == [
        (1, "send"),
        (2, "replied"),
        (3, "decided"),
        (4, "send"),
        (5, "cancel"),
    ]
    assert lines[2]["why"] == {"slow": None, "n": 3} and lines[2]["tasks"] == ["a"]
    assert all(list(line)[-1] == "seconds" for line in lines)
    assert sorted(path.name for path in directory.iterdir()) == ["decisions.jsonl", "strategy.json"]


def test_state_in_memory_is_a_copy() -> None:
    grid = paced(InlineGrid(app, nodes=1))
    state: dict[str, Any] = {"rows": [1, 2]}
    grid.save(state)
    state["rows"].append(3)
    assert grid.restore() == {"rows": [1, 2]}
