"""The clock by which a task's compute time is taken. A simulator sets its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Clock = Callable[[], float]
"""Seconds since whenever."""

_clock: ContextVar[Clock] = ContextVar("task_clock", default=time.perf_counter)


def task_clock() -> Clock:
    """The clock of the task at hand."""
    return _clock.get()


@contextmanager
def use_task_clock(clock: Clock) -> Iterator[None]:
    """Tasks run inside, in this thread or coroutine, take their time by `clock`."""
    token = _clock.set(clock)
    try:
        yield
    finally:
        _clock.reset(token)
