"""The task board against a simple model, with a clock of its own: every task ends exactly once, and none waits for ever."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fedpace.protocol import fleet_pb2 as pb
from fedpace.server.board import OPEN, BoardTask, Ended, State, TaskBoard

ATTEMPTS = 2
NODES = (1, 2)
INF = float("inf")


def task(task_id: int, node_id: int = 1, ttl: float = 100.0) -> pb.Task:
    return pb.Task(task_id=task_id, node_id=node_id, ttl=ttl)


@dataclass
class Known:
    """What the model knows of a task that is open."""

    node: int
    expires: float
    state: State = State.QUEUED
    deadline: float = INF
    attempts: int = 0


class BoardMachine(RuleBasedStateMachine):
    """Does what a coordinator may do, in any order, and compares."""

    @initialize()
    def begin(self) -> None:
        self.board = TaskBoard(attempts=ATTEMPTS)
        self.now = 0.0
        self.known: dict[int, Known] = {}
        self.ended: dict[int, State] = {}
        self.queues: dict[int, list[int]] = {node: [] for node in NODES}

    # ------------------------------------------------------------ the model

    def held(self, node: int) -> set[int]:
        return {i for i, k in self.known.items() if k.node == node and k.state in (State.LEASED, State.ORPHANED)}

    def finish(self, task_id: int, state: State) -> None:
        assert task_id not in self.ended, "a task ended twice"
        known = self.known.pop(task_id)
        if task_id in self.queues[known.node]:
            self.queues[known.node].remove(task_id)
        self.ended[task_id] = state

    def check_ended(self, ended: Iterable[Ended]) -> None:
        for entry in ended:
            assert entry.reason
            self.finish(entry.task.id, entry.task.state)

    # ------------------------------------------------------------ the rules

    @rule(node=st.sampled_from(NODES), ttls=st.lists(st.integers(1, 100), min_size=1, max_size=3))
    def add(self, node: int, ttls: list[int]) -> None:
        for ttl in ttls:
            task_id = len(self.known) + len(self.ended) + 1
            self.board.add(task(task_id, node, ttl), self.now + ttl)
            self.known[task_id] = Known(node, self.now + ttl)
            self.queues[node].append(task_id)

    @rule(data=st.data())
    def add_again(self, data: st.DataObject) -> None:
        if numbers := [*self.known, *self.ended]:
            with pytest.raises(ValueError, match="on the board already"):
                self.board.add(task(data.draw(st.sampled_from(numbers))), INF)

    @rule(node=st.sampled_from(NODES), slots=st.integers(1, 3), seconds=st.integers(1, 20) | st.none())
    def lease(self, node: int, slots: int, seconds: int | None) -> None:
        entry = self.board.lease(node, slots)
        if not self.queues[node] or len(self.held(node)) >= slots:
            assert entry is None
            return
        assert entry is not None and entry.id == self.queues[node].pop(0), "first in, first out"
        known = self.known[entry.id]
        assert known.state is State.QUEUED, "never leased twice at the same time"
        known.state, known.attempts = State.LEASED, known.attempts + 1
        assert entry.attempts == known.attempts <= ATTEMPTS
        if seconds is not None:
            self.extend(entry.id, seconds)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), seconds=st.integers(1, 20), times=st.sampled_from([1, 200]))
    def extend_often(self, data: st.DataObject, seconds: int, times: int) -> None:
        task_id = data.draw(st.sampled_from(sorted(self.known)))
        for _ in range(times):
            self.extend(task_id, seconds)

    def extend(self, task_id: int, seconds: float) -> None:
        self.board.extend(task_id, self.now + seconds)
        known = self.known[task_id]
        if known.state is State.LEASED:
            known.deadline = self.now + seconds

    @precondition(lambda self: self.known or self.ended)
    @rule(data=st.data(), state=st.sampled_from([State.REPLIED, State.FAILED, State.REJECTED, State.CANCELLED]))
    def end(self, data: st.DataObject, state: State) -> None:
        task_id = data.draw(st.sampled_from([*sorted(self.known), *sorted(self.ended)]))
        entry = self.board.end(task_id, state)
        if task_id in self.ended:
            assert entry is None and self.board.state(task_id) is self.ended[task_id]
        else:
            assert entry is not None and entry.state is state
            self.finish(task_id, state)

    @rule(node=st.sampled_from(NODES), grace=st.integers(0, 10))
    def orphan(self, node: int, grace: int) -> None:
        until = self.now + grace
        self.board.orphan(node, until)
        for known in self.known.values():
            if known.node == node and known.state is State.QUEUED:
                known.deadline = min(known.deadline, until)
            elif known.node == node:
                known.state, known.deadline = State.ORPHANED, until

    @rule(node=st.sampled_from(NODES), data=st.data())
    def reclaim(self, node: int, data: st.DataObject) -> None:
        held = self.held(node)
        kept = data.draw(st.lists(st.sampled_from(sorted(held)), unique=True)) if held else []
        strange = [number for number in (*self.known, *self.ended, 999) if number not in held]
        in_hand = [*kept, *data.draw(st.lists(st.sampled_from(strange), unique=True, max_size=2))]
        forget, ended = self.board.reclaim(node, in_hand)
        assert forget == [task_id for task_id in in_hand if task_id not in held]
        lost = sorted(held - set(in_hand))
        once_too_often = [i for i in lost if self.known[i].attempts >= ATTEMPTS]
        assert sorted(entry.task.id for entry in ended) == once_too_often
        assert all(entry.task.state is State.FAILED for entry in ended)
        self.check_ended(ended)
        back = [task_id for task_id in lost if task_id not in once_too_often]
        self.queues[node] = back + self.queues[node]
        for task_id, known in self.known.items():
            if known.node == node:
                known.deadline = INF
                if task_id in held:
                    known.state = State.QUEUED if task_id in back else State.LEASED

    @rule(seconds=st.integers(0, 8))
    def pass_time(self, seconds: int) -> None:
        self.now += seconds
        over = {i: min(k.expires, k.deadline) for i, k in self.known.items() if min(k.expires, k.deadline) <= self.now}
        before = {i: Known(**vars(self.known[i])) for i in over}
        ended = self.board.due(self.now)
        assert {entry.task.id for entry in ended} == set(over)
        assert [over[entry.task.id] for entry in ended] == sorted(over.values()), "in order of their times"
        for entry in ended:
            known = before[entry.task.id]
            gone = known.expires > self.now and known.state in (State.ORPHANED, State.QUEUED)
            assert entry.task.state is (State.FAILED if gone else State.EXPIRED)
        self.check_ended(ended)

    @precondition(lambda self: len(self.known) > 6)
    @rule()
    def clear(self) -> None:
        assert {entry.id for entry in self.board.clear(State.CANCELLED)} == set(self.known)
        for task_id in list(self.known):
            self.finish(task_id, State.CANCELLED)

    # ------------------------------------------------------------ what always holds

    @invariant()
    def the_board_is_what_the_model_says(self) -> None:
        if not hasattr(self, "board"):
            return
        self.board.validate()
        assert len(self.board) == len(self.known)
        for task_id, known in self.known.items():
            entry = self.board.get(task_id)
            assert isinstance(entry, BoardTask) and self.board.state(task_id) in OPEN
            assert vars(known) == {
                "node": entry.node_id,
                "expires": entry.expires,
                "state": entry.state,
                "deadline": entry.deadline,
                "attempts": entry.attempts,
            }
        for task_id, state in self.ended.items():
            assert self.board.get(task_id) is None and self.board.state(task_id) is state
        for node in NODES:
            assert self.board.held(node) == self.held(node)

    def teardown(self) -> None:
        """However it went: when time passes far enough, everything has ended."""
        if hasattr(self, "board"):
            self.pass_time(1000)
            assert len(self.board) == 0 and not self.known


TestBoard = BoardMachine.TestCase
TestBoard.settings = settings(
    deadline=None, max_examples=100, stateful_step_count=50, suppress_health_check=[HealthCheck.too_slow]
)


def test_a_lease_that_is_extended_for_ever_takes_no_more_room() -> None:
    """Every chunk of a transfer extends its task's lease."""
    board = TaskBoard()
    for task_id in range(1, 11):
        board.add(task(task_id, task_id), 1e9)
        board.lease(task_id, 1)
    for step in range(100_000):
        board.extend(1, float(step if step % 3 else -step))
    board.validate()
    assert len(board._times) <= 4 * len(board) + 65
    assert [entry.task.id for entry in board.due(100_000.0)] == [1]


def test_times_of_ended_tasks_take_no_more_room_than_open_ones() -> None:
    board = TaskBoard(remembered=10)
    for task_id in range(1, 10_001):
        board.add(task(task_id), 1e9)
        board.lease(1, 1)
        board.extend(task_id, 1e6)
        board.end(task_id, State.REPLIED)
    assert len(board) == 0 and len(board._times) <= 65
    assert board.state(1) is None, "only the last ones are remembered"
    assert board.state(10_000) is State.REPLIED


@pytest.mark.parametrize(
    ("gone", "now", "state", "reason"),
    [
        (False, 11.0, State.EXPIRED, "the task's deadline passed"),
        (True, 6.0, State.FAILED, "its device is gone"),
        (True, 200.0, State.EXPIRED, "no reply within its time to live of 100 s"),
    ],
)
def test_why_a_task_ended_is_said(gone: bool, now: float, state: State, reason: str) -> None:
    board = TaskBoard()
    board.add(task(1), 100.0)
    board.lease(1, 1)
    board.extend(1, 10.0)
    if gone:
        board.orphan(1, 5.0)
    [ended] = board.due(now)
    assert (ended.task.state, ended.reason) == (state, reason)
    assert board.due(1e9) == []


def test_a_device_that_vanishes_each_time_loses_the_task_in_the_end() -> None:
    board = TaskBoard(attempts=3)
    board.add(task(1), INF)
    for attempt in (1, 2, 3):
        entry = board.lease(1, 1)
        assert entry is not None and entry.attempts == attempt
        board.orphan(1, INF)
        forget, ended = board.reclaim(1, [])
    assert forget == []
    [lost] = ended
    assert lost.reason == "its device vanished 3 times while it had the task"
    assert board.state(1) is State.FAILED
