"""Gates: when to fold what has arrived.

All of a round; a round with over-selection and a deadline; every K arrivals. (The gate for groups that were planned to
arrive together is also their planner: `fedpace.strategies.planners.Together`.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fedpace.errors import ConfigError
from fedpace.strategies.parts import Context, Standing, Verdict

LONGEST_STRETCH = 1024.0
"""A deadline that nobody meets is doubled at most ten times."""


@dataclass(frozen=True, slots=True)
class All:
    """A synchronous round: folds once nothing of it is out any more (McMahan et al. 2017, "Communication-efficient
    learning of deep networks from decentralized data", Algorithm 1)."""

    reads_pace: ClassVar[bool] = False
    patient: ClassVar[bool] = True
    timed: ClassVar[bool] = False
    rounds: ClassVar[bool] = True
    late: ClassVar[str] = "discard"
    holds: ClassVar[bool] = False

    def sends(self, target: int) -> int:
        return target

    def decide(self, standing: Standing, context: Context) -> Verdict:
        return Verdict() if standing.out else _nothing_out(standing)


@dataclass(frozen=True, slots=True)
class Deadline:
    """A round that is closed once the updates wanted arrived, or at its deadline with at least `minimum` of them.

    The deadline is `seconds` after the round was opened, or the `quantile` (0 to 1) of the durations predicted for its
    tasks, where any are; with neither there is none, and the fastest make the round. More devices are asked than
    wanted, by the factor `over_selection` (Bonawitz et al. 2019, "Towards federated learning at scale: system design",
    section 2.2). Tasks that are out when the round closes are given up (`late="discard"`), or their updates are folded
    stale in the round in which they arrive (`late="fold"`; Abdelmoniem et al. 2023, "REFL: resource-efficient federated
    learning", section 4.2), where they count among the updates wanted.

    Where fewer than `minimum` met the deadline the round waits on for them, and the deadline of the rounds after is
    doubled until it would have been met (at most 1,024 times its length); it comes down again by halves, once half of
    it would have done.
    """

    seconds: float | None = None
    quantile: float | None = None
    over_selection: float = 1.3
    late: str = "discard"
    minimum: int = 1

    rounds: ClassVar[bool] = True
    holds: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.seconds is not None and self.quantile is not None:
            raise ConfigError("a deadline: give seconds or a quantile of the predicted durations, not both")
        if self.seconds is not None and not 0.0 < self.seconds < math.inf:
            raise ConfigError(f"a deadline of {self.seconds} seconds: choose a finite number above 0")
        if self.quantile is not None and not 0.0 < self.quantile <= 1.0:
            raise ConfigError(f"a deadline at quantile {self.quantile}: choose a number above 0 and at most 1")
        if not 1.0 <= self.over_selection < math.inf:
            raise ConfigError(f"a deadline: over_selection is {self.over_selection}; choose a finite number from 1 on")
        if self.late not in ("discard", "fold"):
            raise ConfigError(f"a deadline: late is {self.late!r}; choose 'discard' or 'fold'")
        if self.minimum < 1:
            raise ConfigError(f"a deadline: minimum is {self.minimum}; choose 1 or more updates")

    def sends(self, target: int) -> int:
        return math.ceil(target * self.over_selection - 1e-9)

    def decide(self, standing: Standing, context: Context) -> Verdict:
        """Remembers which round it is in, its length in seconds (None: no deadline), how far lengths are stretched, and
        whether the deadline was missed."""
        memory, arrived = context.memory, len(standing.waiting)
        opened = [context.round, standing.opened_at]
        if memory.get("opened") != opened:
            memory.update(opened=opened, length=self._length(standing), missed=False)
        if not standing.out:
            verdict = _nothing_out(standing)
            return self._close(standing, memory, verdict.why) if verdict.fold else verdict
        if arrived >= standing.target:
            return self._close(standing, memory, f"{arrived} updates arrived")
        length, needed = _stretched(memory), min(self.minimum, standing.target)
        if standing.now < standing.opened_at + length:
            return Verdict(until=standing.opened_at + length)
        if arrived >= needed:
            when = f"after the deadline of {length:.4g} s was missed" if memory["missed"] else f"in {length:.4g} s"
            return self._close(standing, memory, f"{arrived} of {standing.target} updates arrived {when}")
        if memory["missed"]:
            return Verdict()
        memory["missed"] = True
        return Verdict(why=f"{arrived} updates met the deadline of {length:.4g} s: waiting until {needed} are there")

    def _length(self, standing: Standing) -> float | None:
        if self.seconds is not None:
            return self.seconds
        if self.quantile is None:
            return None
        predicted = np.array(standing.predicted_seconds, dtype=np.float64)
        predicted = predicted[np.isfinite(predicted) & (predicted > 0.0)]
        return float(np.quantile(predicted, self.quantile)) if len(predicted) else None

    def _close(self, standing: Standing, memory: dict[str, Any], why: str) -> Verdict:
        """Folds all that wait, and moves the deadline of the rounds after by how long it took to get them."""
        length, elapsed = memory["length"], standing.now - standing.opened_at
        if length is not None:
            before = stretch = memory.get("stretch", 1.0)
            while memory["missed"] and stretch < LONGEST_STRETCH and length * stretch < elapsed:
                stretch *= 2.0
            if stretch > 1.0 and elapsed <= length * stretch / 2.0:
                stretch /= 2.0
            if stretch != before:
                memory["stretch"] = stretch
                why += f"; deadlines are now {stretch:g} times as long as set"
        return Verdict(standing.waiting, why=why)


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Folds the oldest `k` updates whenever as many wait (Nguyen et al. 2022, "Federated learning with buffered
    asynchronous aggregation" (FedBuff), Algorithm 1), and what waits once no device is left."""

    reads_pace: ClassVar[bool] = False

    k: int = 10

    timed: ClassVar[bool] = False
    rounds: ClassVar[bool] = False
    late: ClassVar[str] = "fold"
    holds: ClassVar[bool] = False

    @property
    def least(self) -> int:
        return self.k

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(f"a gate of K arrivals: k is {self.k}; choose 1 or more")

    def sends(self, target: int) -> int:
        return target

    def decide(self, standing: Standing, context: Context) -> Verdict:
        arrived = len(standing.waiting)
        if arrived >= self.k:
            return Verdict(standing.waiting[: self.k], why=f"{self.k} updates arrived")
        if arrived and not standing.out and not standing.late and not context.fleet.alive_count:
            return Verdict(standing.waiting, why=f"no device is left: {arrived} of {self.k} updates arrived")
        return Verdict()


def EachArrival() -> Arrivals:
    """Folds every update as it arrives (Xie et al. 2019, "Asynchronous federated optimization", Algorithm 1)."""
    return Arrivals(1)


def _nothing_out(standing: Standing) -> Verdict:
    """Nothing more can come: what waits is folded, and without any the round is empty."""
    if not standing.waiting:
        return Verdict(why="nothing of the round is out or waits: it is empty")
    return Verdict(standing.waiting, why=f"all came to their end, {len(standing.waiting)} with an update")


def _stretched(memory: dict[str, Any]) -> float:
    """Seconds from the opening of the round to its deadline."""
    length = memory["length"]
    return math.inf if length is None else length * memory.get("stretch", 1.0)
