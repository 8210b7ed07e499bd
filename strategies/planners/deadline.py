"""As many local steps as fit a deadline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from fedpace.errors import ConfigError
from fedpace.strategies.pace import task_seconds
from fedpace.strategies.parts import Context, Devices, Work


@dataclass(frozen=True, slots=True)
class StepsForDeadline:
    """Each device gets as many local steps as it is expected to finish, and to send back, in `seconds`: at least
    `minimum`, at most `maximum`.

    By the uncertainty of its estimated pace a device keeps the deadline with a probability of `confidence`, where even
    `minimum` steps do not take it longer. Devices of unknown pace get `minimum`.
    """

    seconds: float
    minimum: int = 1
    maximum: int = 100
    confidence: float = 0.8

    def __post_init__(self) -> None:
        if not 0.0 < self.seconds < math.inf:
            raise ConfigError(f"steps for a deadline: seconds is {self.seconds}; choose a finite number above 0")
        if not 1 <= self.minimum <= self.maximum:
            raise ConfigError(
                f"steps for a deadline: from {self.minimum} to {self.maximum}; choose 1 <= minimum <= maximum"
            )
        if not 0.0 < self.confidence < 1.0:
            raise ConfigError(f"steps for a deadline: confidence is {self.confidence}; choose between 0 and 1")

    def plan(self, devices: Devices, context: Context) -> Sequence[Work]:
        """Bisects: the seconds grow with the steps."""
        deviations = NormalDist().inv_cdf(self.confidence)
        low = np.full(len(devices), self.minimum, dtype=np.int64)
        high = np.full(len(devices), self.maximum, dtype=np.int64)
        while (low < high).any():
            middle = (low + high + 1) // 2
            seconds = task_seconds(context.fleet, devices.row, middle.astype(np.float64), quantile_sd=deviations)
            fits = seconds <= self.seconds  # not where they are NaN
            low = np.where(fits, middle, low)
            high = np.where(fits, high, middle - 1)
        return [Work(steps=steps) for steps in low.tolist()]
