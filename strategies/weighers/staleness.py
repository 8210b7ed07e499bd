"""By staleness: how many versions the model moved on while the device trained.

The functions s(t - tau) of FedAsync (Xie et al. 2019, "Asynchronous Federated Optimization", section 5.2). As they stand
they are relative: they share out one step. `Absolute(Polynomial(0.5))` makes the step itself shorter, as FedAsync and
FedBuff do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedpace.errors import ConfigError
from fedpace.strategies.fleet import Floats
from fedpace.strategies.parts import Context, Updates
from fedpace.strategies.weighers.samples import MOST


@dataclass(frozen=True, slots=True)
class Polynomial:
    """(1 + staleness)^-a. With a = 0.5 it is FedBuff's 1 / sqrt(1 + staleness) (Nguyen et al. 2022, section 5)."""

    reads_pace: ClassVar[bool] = False

    a: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.a < np.inf:
            raise ConfigError(f"polynomial staleness: a is {self.a}; choose 0 or more")

    def weigh(self, updates: Updates, context: Context) -> Floats:
        result: Floats = (1.0 + _staleness(updates)) ** -self.a
        return result


@dataclass(frozen=True, slots=True)
class Hinge:
    """1 up to a staleness of b, then 1 / (a (staleness - b) + 1)."""

    reads_pace: ClassVar[bool] = False

    a: float = 10.0
    b: float = 4.0

    def __post_init__(self) -> None:
        if not 0.0 < self.a < np.inf:
            raise ConfigError(f"hinge staleness: a is {self.a}; choose more than 0")
        if not 0.0 <= self.b < np.inf:
            raise ConfigError(f"hinge staleness: b is {self.b}; choose 0 or more versions")

    def weigh(self, updates: Updates, context: Context) -> Floats:
        result: Floats = 1.0 / (self.a * np.maximum(_staleness(updates) - self.b, 0.0) + 1.0)
        return result


@dataclass(frozen=True, slots=True)
class Constant:
    """1, however stale."""

    reads_pace: ClassVar[bool] = False

    def weigh(self, updates: Updates, context: Context) -> Floats:
        return np.ones(len(updates))


def _staleness(updates: Updates) -> Floats:
    """In versions, 0 or more; 0 where it is not known."""
    result: Floats = np.clip(np.nan_to_num(updates.staleness, nan=0.0), 0.0, MOST)
    return result
