"""Laws of the virtual grid that hold for any fleet and anything an app does with it."""

from __future__ import annotations

import tempfile
from collections import Counter as Multiset
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpace.protocol.paced import Event, Expired, Failed, Joined, Left, Order, Replied, Reported, Tick
from fedpace.simulations import results
from fedpace.simulations.grid import VirtualGrid
from fedpace.simulations.trace import CANCELLED, EXPIRED, FAILED, JOINED, LEFT, REPLIED
from tests.generators import law
from tests.simulations.grids import EVEN, Counter, content, make_fleet, virtual_grid

DEVICES = 4
LONG = 1e5
FLEETS = {
    "even": EVEN,
    "faults": "[compute]\njitter = 0.5\n[faults]\ndropout = 0.3\nfailure = 0.2\nnotice_seconds = 2.0",
    "sessions": "[faults]\ndropout = 0.1\nnotice_seconds = 1.0\n"
    '[availability]\nmodel = "sessions"\nsession_median_seconds = 3.0\nsession_sigma = 1.0\n'
    "day_share = 0.5\nnight_share = 0.5",
    "batteries": "[compute]\nthrottle_after_seconds = 1.0\n[battery]\nhours_of_compute = 0.002\nhours_to_charge = 0.002\n",
}

rows = st.lists(st.integers(0, DEVICES), max_size=10)  # the last is no device
ttls = st.sampled_from([0.1, 0.5, 1.0, 7.0, LONG, LONG])
seconds = st.sampled_from([0.0, 0.3, 1.0, 6.0, 100.0])
picks = st.lists(st.integers(1, 12), max_size=6)  # counted from the task that was sent last
steps = st.integers(1, 30)
operations = st.lists(
    st.tuples(st.sampled_from(["send", "push", "ask"]), rows, ttls, steps)
    | st.tuples(st.sampled_from(["cancel", "pull"]), picks)
    | st.tuples(st.sampled_from(["sleep", "next", "next"]), seconds),
    max_size=16,
)


class Story:
    """Everything that is done to a grid, and what it tells. `told` are the tasks whose end was told, and how."""

    def __init__(self, grid: VirtualGrid) -> None:
        self.grid = grid
        self.sent: list[str] = []
        self.patient: set[str] = set()
        self.told: dict[str, int] = {}
        self.cancelled: set[str] = set()
        self.last = (0, 0.0)
        self.here = set(grid.get_node_ids())
        self.at = grid.now()

    def do(self, name: str, *arguments: Any) -> None:
        getattr(self, name)(*arguments)
        assert self.grid.now() >= self.at, "time went back"
        self.at = self.grid.now()

    def send(self, rows: list[int], ttl: float, steps: int) -> None:
        orders = [Order(1000 + row, {"local-steps": steps}) for row in rows]
        self.note(self.grid.send(content(), "train", orders, ttl=ttl), ttl)

    def push(self, rows: list[int], ttl: float, steps: int) -> None:
        shared = content(**{"local-steps": steps})
        messages = [self.grid.create_message(shared, "train", 1000 + row, "", ttl) for row in rows]
        self.note(self.grid.push_messages(messages), ttl)

    def ask(self, rows: list[int], ttl: float, steps: int) -> None:
        shared = content(**{"local-steps": steps})
        messages = [self.grid.create_message(shared, "query", 1000 + row, "", ttl) for row in rows]
        replies = list(self.grid.send_and_receive(messages, timeout=3.0))
        self.note([message.metadata.message_id for message in messages], ttl)
        for reply in replies:
            self.hear(reply.metadata.reply_to_message_id, FAILED if reply.has_error() else REPLIED)

    def note(self, ids: Iterable[str], ttl: float) -> None:
        ids = list(ids)
        self.sent += ids
        self.patient |= set(ids if ttl == LONG else [])

    def cancel(self, picks: list[int]) -> None:
        ids = [self.sent[-pick] for pick in picks if pick <= len(self.sent)]
        self.grid.cancel(ids)
        self.cancelled |= {message_id for message_id in ids if message_id not in self.told}

    def pull(self, picks: list[int]) -> None:
        ids = [self.sent[-pick] for pick in picks if pick <= len(self.sent)]
        for reply in self.grid.pull_messages(ids):
            assert reply.metadata.reply_to_message_id in ids
            self.hear(reply.metadata.reply_to_message_id, FAILED if reply.has_error() else REPLIED)

    def sleep(self, seconds: float) -> None:
        before = self.grid.now()
        self.grid.sleep(seconds)
        assert self.grid.now() == before + seconds

    def next(self, seconds: float) -> Event:
        until = self.grid.now() + seconds
        event = self.grid.next_event(until)
        if isinstance(event, Tick):
            assert event.at == self.grid.now() == until
            return event
        assert event.at <= self.grid.now() <= until
        assert event.sequence > self.last[0] and event.at >= self.last[1], "events out of order"
        self.last = event.sequence, event.at
        if isinstance(event, Replied):
            assert event.metrics["task"] == int(event.message_id) and event.compute_seconds > 0
            self.hear(event.message_id, REPLIED)
        elif isinstance(event, Expired):
            self.hear(event.message_id, EXPIRED)
        elif isinstance(event, Failed):
            self.hear(event.message_id, FAILED)
        else:
            assert isinstance(event, Joined | Left | Reported) and 1000 <= event.node_id < 1000 + DEVICES
        return event

    def hear(self, message_id: str, kind: int) -> None:
        assert message_id in self.sent
        assert message_id not in self.told, "told twice"
        assert message_id not in self.cancelled, "told of a task that was cancelled"
        self.told[message_id] = kind


@given(
    st.sampled_from(sorted(FLEETS)),
    st.integers(0, 5),
    operations,
    st.sampled_from([(1, 1), (1, 4), (3, 1), (2, 4)]),
)
@law
def test_every_task_has_one_fate(fleet: str, seed: int, operations: list[Any], widths: tuple[int, int]) -> None:
    cohort, lookahead = widths
    executor = Counter(cohort)
    with tempfile.TemporaryDirectory() as folder, patch.object(results, "LOOKAHEAD", lookahead):
        made = make_fleet(Path(folder), FLEETS[fleet], DEVICES, seed)
        with virtual_grid(Path(folder), made, executor) as grid:
            story = Story(grid)
            for operation in operations:
                story.do(*operation)
            for _ in range(20_000):  # what is left: sessions come and go for ever, tasks end
                if set(story.sent) <= story.told.keys() | story.cancelled:
                    break
                story.do("next", 1e4)
            assert set(story.sent) == story.told.keys() | story.cancelled
            columns = {name: column.tolist() for name, column in grid.trace.columns().items()}
            check_trace(columns, story, grid)
            check_computed(columns, story, executor, cohort * lookahead)


def check_trace(columns: dict[str, list[Any]], story: Story, grid: VirtualGrid) -> None:
    assert columns["seconds"] == sorted(columns["seconds"])
    fates = {str(task): kind for task, kind in zip(columns["task"], columns["kind"], strict=True) if task}
    tasks = [task for task in columns["task"] if task]
    assert len(tasks) == len(set(tasks)) and fates.keys() == set(story.sent), "one fate each"
    for message_id, told in story.told.items():
        assert fates[message_id] in ((told, EXPIRED) if told == FAILED else (told,))
    assert not any(fates[message_id] == EXPIRED for message_id in story.patient), "a device does all that it has"
    assert all(fates[message_id] in (CANCELLED, REPLIED, FAILED, EXPIRED) for message_id in story.cancelled)

    counts, kinds = grid.counts, Multiset(fates.values())
    assert (counts.sent, counts.received) == (len(story.sent), kinds[REPLIED])
    assert (counts.failed, counts.expired, counts.cancelled) == (kinds[FAILED], kinds[EXPIRED], kinds[CANCELLED])
    assert counts.device_seconds == pytest.approx(sum(columns["compute_seconds"]))

    # One device works on one task at a time: what it spent on each lies between two ends.
    ended: dict[int, float] = {}
    present = dict.fromkeys(story.here, True)
    for at, kind, node, sent, spent in zip(
        *(columns[name] for name in ("seconds", "kind", "node_id", "sent_seconds", "compute_seconds")), strict=True
    ):
        if kind in (JOINED, LEFT):
            assert present.get(node, False) is (kind == LEFT), "comes and goes in turn"
            present[node] = kind == JOINED
        elif spent:
            assert 0 < spent <= at - max(sent, ended.get(node, 0.0)) + 1e-9
            ended[node] = at
    assert {node for node, here in present.items() if here} == set(grid.get_node_ids())


def check_computed(columns: dict[str, list[Any]], story: Story, executor: Counter, together: int) -> None:
    computed = [computation.task for computation in executor.seen]
    fates = {task: kind for task, kind in zip(columns["task"], columns["kind"], strict=True) if task}
    replied = {task for task, kind in fates.items() if kind == REPLIED}
    assert len(computed) == len(set(computed)) and replied <= set(computed)
    ahead = set(computed) - replied
    assert all(fates[task] == CANCELLED for task in ahead), "what drops out, fails or expires is never computed"
    assert not ahead if together == 1 else max(executor.batches, default=0) <= together

    # State is what the device's tasks that came to their ends left, in their order.
    where = {task: place for place, task in enumerate(columns["task"]) if task}
    for computation, before in zip(executor.seen, executor.states, strict=True):
        earlier = [
            task
            for task, place in where.items()
            if fates[task] == REPLIED
            and columns["node_id"][place] == computation.node_id
            and place < where[computation.task]
        ]
        assert before == len(earlier)


@given(st.sampled_from(sorted(FLEETS)), operations)
@law
def test_the_same_happens_again(fleet: str, operations: list[Any]) -> None:
    stories = []
    for lookahead in (1, 4):  # nor does what is computed when change what happens
        executor = Counter(lookahead)
        with tempfile.TemporaryDirectory() as folder, patch.object(results, "LOOKAHEAD", lookahead):
            made = make_fleet(Path(folder), FLEETS[fleet], DEVICES)
            with virtual_grid(Path(folder), made, executor) as grid:
                story = Story(grid)
                for operation in operations:
                    story.do(*operation)
                stories.append((grid.now(), grid.trace.sha256(), story.told))
            log = (Path(folder) / "out" / "decisions.jsonl").read_text()
            stories[-1] = (*stories[-1], log)  # type: ignore[assignment]
    assert stories[0] == stories[1]
    assert np.isfinite(stories[0][0])
