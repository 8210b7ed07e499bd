"""By how often a device takes part: fast ones send more often, and do not drown slow ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedpace.errors import ConfigError
from fedpace.strategies.fleet import Floats
from fedpace.strategies.parts import Context, Updates


@dataclass(frozen=True, slots=True)
class Speed:
    """The inverse of a device's participation rate, against the mean of those that ever took part. Relative.

    An estimator of the sum over all devices from those that came weighs each by one over its chance to come (Horvitz &
    Thompson 1952, "A Generalization of Sampling Without Replacement From a Finite Universe"). The rate is the device's
    share of updates folded, these included. Factors stay in [1 / bound, bound], so that one that is new, or returns after
    long, does not move the model alone.
    """

    reads_pace: ClassVar[bool] = False

    bound: float = 4.0

    def __post_init__(self) -> None:
        if not 1.0 <= self.bound < np.inf:
            raise ConfigError(f"speed: bound is {self.bound}; choose 1 (no effect) or more")

    def weigh(self, updates: Updates, context: Context) -> Floats:
        folded, memory = updates.fleet["folded"], context.memory
        if not memory:  # the one look at the whole fleet; totals are kept from here on
            memory.update(updates=int(folded.sum()), devices=int(np.count_nonzero(folded)))
        rows, place, times = np.unique(updates.row, return_inverse=True, return_counts=True)
        memory["updates"] += len(updates)
        memory["devices"] += int(np.count_nonzero(folded[rows] == 0))
        usual = memory["updates"] / max(memory["devices"], 1)
        result: Floats = np.clip(usual / (folded[rows] + times), 1.0 / self.bound, self.bound)[place]
        return result
