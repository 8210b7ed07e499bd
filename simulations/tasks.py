"""Tasks of simulated devices: what is at work, what waits for its device, and when each ends."""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass
from enum import Enum

from fedpace.simulations.fleets import End
from fedpace.simulations.work import Answer, Computation


class Stage(Enum):
    QUEUED = "queued"  # its device has another task
    GOING = "going"
    ANSWERED = "answered"  # an event tells of it, which nobody has taken yet
    OVER = "over"  # taken, or cancelled


_OPEN = (Stage.QUEUED, Stage.GOING)


@dataclass(slots=True, eq=False)
class Task(Computation):
    """One task, and what is computed for it. Times are seconds of virtual time; `steps` are those its duration is of.

    `end` is drawn when it begins; `due` is when it is over, at its end or because its time to live is. `entry` is its
    place in the agenda (earlier ones no longer count), `event` the number of the event that tells of its end.
    """

    message_id: str = ""
    sent: float = 0.0
    steps: float = 0.0
    due: float = 0.0
    begun: float = 0.0
    stage: Stage = Stage.QUEUED
    end: End | None = None
    answer: Answer | None = None
    entry: int = 0
    event: int = 0

    def spent(self, now: float) -> float:
        """Seconds of compute its device has really spent on it by `now`."""
        if self.end is None:
            return 0.0
        return min(self.end.compute_seconds, max(0.0, now - self.begun - self.end.download_seconds))


class Agenda:
    """Tasks by the time they are over, and those whose results are still to be computed in the same order.

    Both O(log n) a task; what was cancelled is dropped when it comes up.
    """

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Task]] = []
        self._uncomputed: list[tuple[float, int, Task]] = []
        self._sequence = 0

    @property
    def next_due(self) -> float | None:
        """When the next task is over; None without one."""
        while self._due:
            at, entry, task = self._due[0]
            if entry == task.entry and task.stage in _OPEN:
                return at
            heapq.heappop(self._due)
        return None

    def wait(self, task: Task) -> None:
        """A task's device has another one; its time to live passes all the same."""
        self._sequence += 1
        task.entry = self._sequence
        heapq.heappush(self._due, (task.due, task.entry, task))

    def begin(self, task: Task, at: float, end: End) -> None:
        """A task's device has begun with it."""
        task.stage, task.begun, task.end = Stage.GOING, at, end
        computed = end.outcome == "replied" and end.at <= task.due
        task.due = max(at, min(end.at, task.due))
        self._sequence += 1
        task.entry = self._sequence
        entry = (task.due, task.entry, task)
        heapq.heappush(self._due, entry)
        if computed:
            heapq.heappush(self._uncomputed, entry)

    def pop(self) -> Task:
        """The next task that is over. `next_due` must have said that there is one."""
        return heapq.heappop(self._due)[2]

    def to_compute(self, count: int) -> list[Task]:
        """Up to `count` tasks whose results are needed first."""
        found: list[Task] = []
        while self._uncomputed and len(found) < count:
            task = heapq.heappop(self._uncomputed)[2]
            if task.stage is Stage.GOING:
                found.append(task)
        return found


class Chains:
    """Devices at work, each with the tasks that wait for it."""

    def __init__(self) -> None:
        self._waiting: dict[int, deque[Task] | None] = {}

    def take(self, task: Task) -> bool:
        """Whether the task's device was free; it has the task now. Otherwise the task waits its turn."""
        row = task.device
        if row not in self._waiting:
            self._waiting[row] = None
            return True
        waiting = self._waiting[row]
        if waiting is None:
            waiting = self._waiting[row] = deque()
        waiting.append(task)
        return False

    def free(self, row: int) -> Task | None:
        """A device is done with its task. Returns the next one that it has."""
        waiting = self._waiting[row]
        while waiting:  # most have none
            task = waiting.popleft()
            if task.stage is Stage.QUEUED:
                return task
        del self._waiting[row]
        return None


class Counts:
    """What became of tasks."""

    def __init__(self) -> None:
        self.sent = self.received = self.rejected = self.failed = self.expired = self.cancelled = self.computed = 0
        self.bytes_down = self.bytes_up = 0
        self.device_seconds = 0.0
