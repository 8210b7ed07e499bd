"""The task board: who holds which task, until when, and what became of it. No I/O and no clock: time is passed in.

    queued ──lease──> leased ──complete──> done (replied, failed, rejected)
      ^                 │ │
      │                 │ └─ deadline or time to live over ─> done (expired)
      └── the device is back without it                  cancel ─> done (cancelled)
          leased ── the device is gone ──> orphaned ── it returns with it ──> leased
                                              └─ it does not return ─> done (failed)

The board knows no training: a task is a message for a node, an envelope, and a deadline. Every task ends in exactly one
of the `done` states; `validate` says so. An operation costs O(log n) in the number of open tasks.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from fedpace.protocol import fleet_pb2 as pb


class State(StrEnum):
    QUEUED = "queued"
    LEASED = "leased"
    ORPHANED = "orphaned"
    REPLIED = "replied"
    FAILED = "failed"
    REJECTED = "rejected"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


OPEN = frozenset({State.QUEUED, State.LEASED, State.ORPHANED})


@dataclass(slots=True)
class BoardTask:
    """A task. Times are seconds on the coordinator's clock; `expires` is the end of its time to live."""

    task: pb.Task
    expires: float
    state: State = State.QUEUED
    deadline: float = float("inf")
    attempts: int = 0

    @property
    def id(self) -> int:
        return self.task.task_id

    @property
    def node_id(self) -> int:
        return self.task.node_id


@dataclass(slots=True)
class Ended:
    """A task the board ended by itself, and why."""

    task: BoardTask
    reason: str


@dataclass(slots=True)
class _Node:
    queue: OrderedDict[int, None] = field(default_factory=OrderedDict)
    held: set[int] = field(default_factory=set)


class TaskBoard:
    """All tasks of a run. `remembered` ended ones are kept to tell a late or repeated reply from an unknown one."""

    def __init__(self, *, attempts: int = 3, remembered: int = 100_000) -> None:
        self._attempts = attempts
        self._open: dict[int, BoardTask] = {}
        self._ended: OrderedDict[int, State] = OrderedDict()
        self._remembered = remembered
        self._nodes: dict[int, _Node] = {}
        self._times: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._open)

    def get(self, task_id: int) -> BoardTask | None:
        """An open task."""
        return self._open.get(task_id)

    def state(self, task_id: int) -> State | None:
        """The state of a task, open or remembered; None for one that never was."""
        task = self._open.get(task_id)
        return task.state if task is not None else self._ended.get(task_id)

    def held(self, node_id: int) -> Collection[int]:
        """Ids of the tasks a node holds."""
        node = self._nodes.get(node_id)
        return frozenset(node.held) if node is not None else frozenset()

    def add(self, task: pb.Task, expires: float) -> BoardTask:
        """Queues a task for its node. Raises ValueError for an id that was there before."""
        if task.task_id in self._open or task.task_id in self._ended:
            raise ValueError(f"task {task.task_id} is on the board already")
        entry = BoardTask(task, expires)
        self._open[entry.id] = entry
        self._nodes.setdefault(entry.node_id, _Node()).queue[entry.id] = None
        self._wake_at(expires, entry.id)
        return entry

    def lease(self, node_id: int, slots: int) -> BoardTask | None:
        """The next queued task of a node that has a free slot, now leased to it; None where there is none."""
        node = self._nodes.get(node_id)
        if node is None or not node.queue or len(node.held) >= slots:
            return None
        task_id, _ = node.queue.popitem(last=False)
        entry = self._open[task_id]
        entry.state = State.LEASED
        entry.attempts += 1
        node.held.add(task_id)
        return entry

    def extend(self, task_id: int, deadline: float) -> None:
        """Sets the deadline of a leased task."""
        entry = self._open.get(task_id)
        if entry is not None and entry.state is State.LEASED:
            entry.deadline = deadline
            self._wake_at(deadline, task_id)

    def end(self, task_id: int, state: State) -> BoardTask | None:
        """Ends an open task; None where it had ended before, so that nothing ends twice."""
        entry = self._open.pop(task_id, None)
        if entry is None:
            return None
        entry.state = state
        node = self._nodes[entry.node_id]
        node.held.discard(task_id)
        node.queue.pop(task_id, None)
        if not node.held and not node.queue:
            del self._nodes[entry.node_id]
        self._ended[task_id] = state
        while len(self._ended) > self._remembered:
            self._ended.popitem(last=False)
        return entry

    def orphan(self, node_id: int, until: float) -> None:
        """A node is gone: what it held waits for it, what was queued too, until that time."""
        for entry in self._of(node_id):
            if entry.state is State.LEASED:
                entry.state = State.ORPHANED
            entry.deadline = min(entry.deadline, until) if entry.state is State.QUEUED else until
            self._wake_at(entry.deadline, entry.id)

    def reclaim(self, node_id: int, in_hand: Collection[int]) -> tuple[list[int], list[Ended]]:
        """A node is back with some tasks in hand.

        Returns those nobody waits for, which it should forget, and those it has lost once too often. What it lost for
        the first times is queued again, first in line.
        """
        forget = [task for task in in_hand if not self._holds(node_id, task)]
        hands = frozenset(in_hand)
        ended: list[Ended] = []
        for entry in sorted(self._of(node_id), key=lambda entry: entry.id, reverse=True):
            entry.deadline = float("inf")
            if entry.id in hands and entry.state is not State.QUEUED:
                entry.state = State.LEASED
            elif entry.state in (State.ORPHANED, State.LEASED):
                self._requeue(entry, ended)
        return forget, ended

    def _requeue(self, entry: BoardTask, ended: list[Ended]) -> None:
        if entry.attempts >= self._attempts:
            self.end(entry.id, State.FAILED)
            ended.append(Ended(entry, f"its device vanished {entry.attempts} times while it had the task"))
        else:
            node = self._nodes[entry.node_id]
            node.held.discard(entry.id)
            entry.state = State.QUEUED
            node.queue[entry.id] = None
            node.queue.move_to_end(entry.id, last=False)

    def due(self, now: float) -> list[Ended]:
        """Ends every task whose time is over, in order of their times."""
        ended: list[Ended] = []
        while self._times and self._times[0][0] <= now:
            time, task_id = heapq.heappop(self._times)
            entry = self._open.get(task_id)
            if entry is None or time != min(entry.expires, entry.deadline):  # ended, or its time has moved since
                continue
            gone = entry.state is State.ORPHANED or (entry.state is State.QUEUED and entry.deadline <= now)
            if entry.expires <= now:
                reason, state = f"no reply within its time to live of {entry.task.ttl:g} s", State.EXPIRED
            elif gone:
                reason, state = "its device is gone", State.FAILED
            else:
                reason, state = "the task's deadline passed", State.EXPIRED
            self.end(task_id, state)
            ended.append(Ended(entry, reason))
        return ended

    def clear(self, state: State) -> list[BoardTask]:
        """Ends everything open."""
        return [entry for task_id in list(self._open) if (entry := self.end(task_id, state)) is not None]

    def validate(self) -> None:
        """Raises AssertionError unless the board is consistent."""
        times = set(self._times)
        for task_id, entry in self._open.items():
            assert entry.id == task_id and entry.state in OPEN and task_id not in self._ended
            node = self._nodes[entry.node_id]
            assert (task_id in node.held) == (entry.state in (State.LEASED, State.ORPHANED))
            assert (task_id in node.queue) == (entry.state is State.QUEUED), entry
            assert (min(entry.expires, entry.deadline), task_id) in times, entry
        for node_id, node in self._nodes.items():
            assert all(task in self._open and self._open[task].node_id == node_id for task in node.held)
        assert all(state not in OPEN for state in self._ended.values())

    def _holds(self, node_id: int, task_id: int) -> bool:
        entry = self._open.get(task_id)
        return entry is not None and entry.node_id == node_id and entry.state is not State.QUEUED

    def _of(self, node_id: int) -> Iterable[BoardTask]:
        node = self._nodes.get(node_id)
        if node is None:
            return []
        return [self._open[task] for task in (*node.held, *node.queue)]

    def _wake_at(self, when: float, task_id: int) -> None:
        """Notes a time of a task. Of times that have moved since, no more are kept than there are open tasks, or few."""
        if len(self._times) > 4 * len(self._open) + 64:
            self._times = [(time, task.id) for task in self._open.values() for time in (task.expires, task.deadline)]
            heapq.heapify(self._times)
        heapq.heappush(self._times, (when, task_id))
