"""One large task, divided over the devices at hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpace.errors import ConfigError
from fedpace.strategies.fleet import Floats
from fedpace.strategies.gates import Deadline
from fedpace.strategies.parts import Context, Devices, Outcome, Work

SMOOTHING = 0.5
"""Weight of the latest duration in the logarithm of a device's speed."""


@dataclass(frozen=True, slots=True)
class Split:
    """A task over the samples [0, `samples`), in one range a device: disjoint, in order, together all of them.

    Each range is in proportion to the device's predicted samples a second, and at least `minimum` long. Where that is
    too much for so many devices the slowest get empty ranges, and need not be asked. Samples a second are observed from
    sending to arrival, so that round by round the ranges become such that all arrive together. A lost share is sent
    again; weighed by samples, shares add up to the undivided task wherever that is a sum over samples: a full-batch
    gradient step, a metric.
    """

    samples: int
    minimum: int = 1

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigError(f"a split task: samples is {self.samples}; choose 1 or more")
        if self.minimum < 1:
            raise ConfigError(f"a split task: minimum is {self.minimum}; choose 1 or more samples")

    def refuse(self, strategy: Any) -> str | None:
        if not strategy.gate.rounds or isinstance(strategy.gate, Deadline):
            return "a split task is whole with all its shares only: choose the gate All"
        return None

    def plan(self, devices: Devices, context: Context) -> Sequence[Work]:
        speed = self._speeds(devices, context)
        served = np.zeros(len(devices), dtype=bool)
        most = min(len(devices), max(1, self.samples // self.minimum))
        served[np.argsort(-speed, kind="stable")[:most]] = True
        sizes = np.zeros(len(devices), dtype=np.int64)
        sizes[served] = divide(self.samples, speed[served], min(self.minimum, self.samples))
        ends = np.cumsum(sizes)
        return [
            Work(samples=(end - size, end), share=True) for size, end in zip(sizes.tolist(), ends.tolist(), strict=True)
        ]

    def observe(self, outcome: Outcome, context: Context) -> None:
        """Follows each device's samples a second, as logarithms by row."""
        if outcome.reason or not outcome.samples > 0 or not 0.0 < outcome.seconds < math.inf:
            return
        seen = math.log(min(outcome.samples, self.samples) / outcome.seconds)
        speeds: dict[str, float] = context.memory.setdefault("log_speed", {})
        before = speeds.get(str(outcome.row), seen)
        speeds[str(outcome.row)] = before + SMOOTHING * (seen - before)

    def _speeds(self, devices: Devices, context: Context) -> Floats:
        """Relative and positive. Where no share of a device was seen yet: as its pace in other tasks, or the median."""
        speeds = context.memory.get("log_speed", {})
        logs = np.array([speeds.get(str(row), np.nan) for row in devices.row.tolist()], dtype=np.float64)
        if np.isnan(logs).all():
            with np.errstate(divide="ignore", invalid="ignore"):
                logs = -np.log(devices.seconds_per_step)
        logs[~np.isfinite(logs)] = np.nan
        middle = 0.0 if np.isnan(logs).all() else float(np.nanmedian(logs))
        result: Floats = np.exp(np.clip(np.nan_to_num(logs - middle, nan=0.0), -20.0, 20.0))
        return result


def divide(total: int, speed: Floats, minimum: int) -> NDArray[np.int64]:
    """`total` in whole parts in proportion to `speed` (> 0), each at least `minimum`; total >= minimum * len(speed).

    Parts that would fall short are raised to the minimum, and the others share the rest; remainders go to the largest
    fractions (Hamilton's method).
    """
    short = np.zeros(len(speed), dtype=bool)
    while True:
        rest = total - minimum * int(short.sum())
        ideal = np.where(short, minimum, rest * (speed / max(float(speed[~short].sum()), 1e-300)))
        falling = ~short & (ideal < minimum)
        if not falling.any():
            break
        short |= falling
    parts = np.maximum(np.floor(ideal).astype(np.int64), minimum)
    missing = total - int(parts.sum())
    order = np.argsort(parts - ideal, kind="stable")  # who lost most by rounding first
    while missing > 0:
        given = order[:missing]
        parts[given] += 1
        missing -= len(given)
    while missing < 0:  # floating-point sums of huge totals may be above them
        taken = np.flatnonzero(parts > minimum)[:-missing]
        parts[taken] -= 1
        missing += len(taken)
    return parts
