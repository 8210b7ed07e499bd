"""Virtual time, which jumps from one thing that happens to the next."""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from typing import Protocol

from fedpace.errors import RunError
from fedpace.hosting.flower import RunNotRunningException
from fedpace.hosting.onethread import Turns
from fedpace.hosting.virtualtime import wall_time
from fedpace.simulations.tasks import Agenda, Task


class Changes(Protocol):
    """Devices that come and go."""

    @property
    def next_change(self) -> float:
        """When one does next; infinity for never."""


class EventLoop(ABC):
    """What happens: tasks are over, by the agenda, and devices come and go. For one thread; with `turns` set, the threads
    that take turns may use it too. Times are seconds of virtual time; `events` is how many things have happened.

    Classes that build on it are the loop, rather than have one: its time is read many times a task.
    """

    def __init__(self, presence: Changes | None, until: float = math.inf) -> None:
        """`presence` is None where nobody comes or goes. The run is told to stop at `until`."""
        self.events = 0
        self.turns: Turns | None = None
        self._thread = threading.get_ident()
        self._until = until
        self._now = 0.0
        self._stopped = False
        self._agenda = Agenda()
        self._presence = presence

    @abstractmethod
    def _end(self, task: Task) -> None:
        """A task is over: at its own end, or because its time to live is."""

    @abstractmethod
    def _change_presence(self) -> None:
        """The next device comes or goes."""

    @abstractmethod
    def _show_progress(self) -> None:
        """Called now and then."""

    def stop(self) -> None:
        """Lets the run end at its next look at the grid. Safe from a signal handler."""
        self._stopped = True

    @property
    def seconds(self) -> float:
        """The same as `now()`, for those who watch a run and are no part of it."""
        return self._now

    def now(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        """Lets virtual time pass, with all that happens in it."""
        self._check_running()
        if self.turns is not None and self.turns.here:
            until = self._now + seconds
            self.turns.wait(lambda: self._now >= until, until)
        else:
            self._advance(self._now + seconds)

    def pass_until(self, until: float) -> None:
        """Lets time pass to the next thing that happens, or to `until`."""
        before = self.events
        while self.events == before and self._now < until:
            self._advance(min(self._next_event_at(), until))

    def _next_event_at(self) -> float:
        due = self._agenda.next_due
        change = math.inf if self._presence is None else self._presence.next_change
        return change if due is None else min(due, change)

    def _advance(self, until: float) -> None:
        """Lets everything happen that happens by a time."""
        self._check_running()
        while (at := self._next_event_at()) <= until:
            self._happen(at)
        if until < math.inf:
            self._move_to(until)

    def _happen(self, at: float) -> None:
        """Lets the next thing happen, which does at this time."""
        self._move_to(at)
        if self._presence is not None and self._presence.next_change <= at:
            self._change_presence()
        else:
            self._end(self._agenda.pop())
        self.events += 1
        if not self.events % 64:
            self._check_running()
            with wall_time():
                self._show_progress()

    def _move_to(self, at: float) -> None:
        if at > self._now:
            if at > self._until:
                self._now, self._stopped = self._until, True
                raise RunNotRunningException
            self._now = at

    def _check_running(self) -> None:
        if threading.get_ident() != self._thread and not (self.turns is not None and self.turns.here):
            raise RunError(
                "a simulated grid is for the thread that runs the ServerApp; let other threads leave it alone"
            )
        if self._stopped:
            raise RunNotRunningException
