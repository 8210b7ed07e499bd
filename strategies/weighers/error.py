"""By each device's observed error: what disagrees with all others, far beyond how much they disagree, counts less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedpace.errors import ConfigError
from fedpace.strategies.fleet import Floats
from fedpace.strategies.parts import Context, Updates

TO_SD = 1.4826
"""Median absolute deviation of a normal distribution, times this, is its standard deviation."""
FEWEST = 5
"""Devices seen before anybody is judged."""


@dataclass(frozen=True, slots=True)
class ErrorWeight:
    """1 for everybody within the usual, less for those clearly beyond it, and 1 again once they return. Relative.

    An update's error is 1 less its cosine with the consensus of the others: 0 with it, 1 unrelated, 2 against it. Where
    the server has a validation set it is at least what the device's loss there says: 1 for three, and 2 for six, standard
    deviations above the batch's median. `fleet["error"]` follows it with weight `smoothing` an update, from the usual.

    What is usual are median and MAD of the `window` devices seen last, one vote each (Hampel 1974, "The Influence Curve
    and its Role in Robust Estimation"), so devices whose data differ are not punished where all differ. Up to `cut`
    standard deviations above the median the factor is 1, from there it falls in a line that reaches 0 at twice as many,
    but never under `floor`. `least_spread` is the smallest standard deviation believed.

    Where an update can be compared with nothing (NaN), its device's error stays as it was.
    """

    reads_pace: ClassVar[bool] = False

    smoothing: float = 0.3
    cut: float = 3.0
    floor: float = 0.1
    least_spread: float = 0.05
    window: int = 256
    needs_scores = True

    def __post_init__(self) -> None:
        if not 0.0 < self.smoothing <= 1.0:
            raise ConfigError(f"error weight: smoothing is {self.smoothing}; choose more than 0.0 and at most 1.0")
        if not 0.0 < self.cut < np.inf:
            raise ConfigError(f"error weight: cut is {self.cut}; choose more than 0 standard deviations")
        if not 0.0 <= self.floor <= 1.0:
            raise ConfigError(f"error weight: floor is {self.floor}; choose from 0.0 to 1.0")
        if not 0.0 < self.least_spread < np.inf:
            raise ConfigError(f"error weight: least_spread is {self.least_spread}; choose more than 0")
        if self.window < FEWEST:
            raise ConfigError(f"error weight: window is {self.window} devices; choose {FEWEST} or more")

    def weigh(self, updates: Updates, context: Context) -> Floats:
        error = updates.fleet["error"]
        self._follow(updates, context)
        usual, spread = self._usual(updates, context)
        beyond = (np.nan_to_num(error[updates.row], nan=usual) - usual) / spread
        result: Floats = np.clip(2.0 - beyond / self.cut, self.floor, 1.0)
        return result

    def _follow(self, updates: Updates, context: Context) -> None:
        """Takes what this batch shows into `fleet["error"]`, and its devices into those seen last."""
        seen = _observed(updates)
        known = np.isfinite(seen)
        if not known.any():
            return
        rows, place = np.unique(updates.row[known], return_inverse=True)
        found = np.bincount(place, seen[known]) / np.bincount(place)
        error = updates.fleet["error"]
        recent = context.memory.setdefault("rows", [])
        if len(recent) >= FEWEST:
            before = np.nan_to_num(error[rows], nan=float(np.median(error[recent])))
        else:
            before = np.where(np.isnan(error[rows]), found, error[rows])
        error[rows] = before + self.smoothing * (found - before)
        again = set(rows.tolist())
        context.memory["rows"] = [*(row for row in recent if row not in again), *rows.tolist()][-self.window :]

    def _usual(self, updates: Updates, context: Context) -> tuple[float, float]:
        """Median and standard deviation, from the MAD, of the devices seen last."""
        recent = context.memory.get("rows", [])
        if len(recent) < FEWEST:
            return 0.0, np.inf
        errors = updates.fleet["error"][recent]
        usual = float(np.median(errors))
        return usual, max(TO_SD * float(np.median(np.abs(errors - usual))), self.least_spread)


def _observed(updates: Updates) -> Floats:
    """The error that each update shows, from 0 to 2; NaN where it shows none."""
    angle = np.clip(1.0 - updates.agreement, 0.0, 2.0)
    loss = updates.validation_loss
    finite = loss[np.isfinite(loss)]
    if len(finite) < 3:
        return angle
    usual = float(np.median(finite))
    with np.errstate(over="ignore", invalid="ignore"):
        spread = max(TO_SD * float(np.median(np.abs(finite - usual))), 0.05 * abs(usual), np.finfo(np.float64).tiny)
        result: Floats = np.fmax(angle, np.clip((loss - usual) / (3.0 * spread), 0.0, 2.0))
    return result
