"""Lets an app's `time.sleep`, `time.time` and `time.monotonic` run on a clock of the simulator's.

The functions of the module `time` are replaced, for one thread and for as long as a simulation runs. What the standard
library, fedpace and the executors do keeps to the wall clock: they are told by the module they are called from.
"""

from __future__ import annotations

import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

EPOCH = 1_735_689_600.0
"""What `time.time()` says when a run begins: 2025-01-01, 00:00 UTC. Fixed, so that runs repeat."""

_REAL = {
    name: getattr(time, name)
    for name in ("sleep", "time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns")
}
_ON_THE_WALL = frozenset(
    {
        *("fedpace", "torch", "numpy", "rich", "pytest", "_pytest", "hypothesis"),
        *("logging", "threading", "queue", "multiprocessing", "concurrent", "asyncio", "selectors", "subprocess"),
        *("socket", "ssl", "uuid", "tempfile"),
    }
)
"""Packages whose time is the wall's, whoever called them."""

_PATIENCE = 10_000
_NUDGE = 1e-3
"""A loop that only looks at the clock would never end: after so many looks at one instant each costs a millisecond."""

_LONGEST = 9e9
"""Seconds that `time.sleep` takes at most, as the real one does."""

_here = threading.local()


@contextmanager
def wall_time() -> Iterator[None]:
    """Inside, this thread's time is the wall's again."""
    before = getattr(_here, "clock", None)
    _here.clock = None
    try:
        yield
    finally:
        _here.clock = before


def carried(function: Callable[[], None]) -> Callable[[], None]:
    """`function` for another thread, whose time is then this one's."""
    clock = getattr(_here, "clock", None)

    def run() -> None:
        _here.clock = clock
        function()

    return run


class _Clock:
    def __init__(self, now: Callable[[], float], sleep: Callable[[float], None]) -> None:
        self._now, self._sleep = now, sleep
        self._last, self._looks = -1.0, 0

    def now(self) -> float:
        now = self._now()
        if now != self._last:
            self._last, self._looks = now, 0
        self._looks += 1
        if self._looks > _PATIENCE:
            self._sleep(_NUDGE)
            now = self._last = self._now()
        return now

    def sleep(self, seconds: float) -> None:
        if not seconds >= 0:
            raise ValueError("sleep length must be non-negative")
        if seconds > _LONGEST:
            raise OverflowError("timestamp too large to convert to C _PyTime_t")
        self._sleep(seconds)


@contextmanager
def virtual_time(now: Callable[[], float], sleep: Callable[[float], None]) -> Iterator[None]:
    """Inside, this thread's time is `now()` seconds after `EPOCH`, and sleeping is left to `sleep(seconds)`.

    Names that modules have imported from `time` already (Flower's, the app's) are replaced too, and all put back at the end.
    """
    clock = _Clock(now, sleep)
    changed: list[tuple[Any, str, Any]] = []
    replacements = {name: _replacement(name) for name in _REAL}
    for name, replacement in replacements.items():
        changed.append((time, name, _REAL[name]))
        setattr(time, name, replacement)
    real = {id(function): name for name, function in _REAL.items()}
    for module_name, module in list(sys.modules.items()):
        package = module_name.partition(".")[0]
        own = package not in _ON_THE_WALL and package not in sys.stdlib_module_names
        if own and isinstance(module, types.ModuleType):
            for attribute, value in list(vars(module).items()):
                if (found := real.get(id(value))) is not None:
                    changed.append((module, attribute, value))
                    setattr(module, attribute, replacements[found])
    before = getattr(_here, "clock", None)
    _here.clock = clock
    try:
        yield
    finally:
        _here.clock = before
        for owner, attribute, value in changed:
            setattr(owner, attribute, value)


def _replacement(name: str) -> Callable[..., Any]:
    real = _REAL[name]

    def virtual(clock: _Clock, *args: float) -> Any:
        if name == "sleep":
            return clock.sleep(*args)
        seconds = clock.now() + (EPOCH if name.startswith("time") else 0.0)
        return round(seconds * 1e9) if name.endswith("_ns") else seconds

    def function(*args: float) -> Any:
        clock: _Clock | None = getattr(_here, "clock", None)
        if clock is None or sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] in _ON_THE_WALL:
            return real(*args)
        return virtual(clock, *args)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = real.__doc__
    return function
