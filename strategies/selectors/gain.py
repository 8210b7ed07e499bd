"""Devices by how much there is to gain from them a second."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedpace.strategies.fleet import Floats, Rows
from fedpace.strategies.parts import Context, Devices
from fedpace.strategies.selectors.drawing import by_weight, check_range, expected_seconds

MOST = 100.0
"""No device is worth so many times another."""


@dataclass(frozen=True, slots=True)
class GainPerSecond:
    """Drawn in proportion to loss^`loss` / (seconds^`speed` * (1 + times selected)^`debt`). Ours, after Oort's utility
    (Lai et al. 2021, "Oort", section 4.2), with a debt in the place of exploration.

    Seconds are those expected of a task, the loss is what the device reported last. With `speed` alone slow devices come
    seldom; those that come seldom have little debt, and, where they know what the others do not, a high loss. In a long
    run, with equal losses, devices are selected in proportion to their speed to the power `speed` / (1 + `debt`).
    Before debts nobody is worth less than a hundredth of another, so everybody's turn comes.

    Losses count up to their 95th percentile. A device that has reported none counts as the 75th: it is worth a look.
    """

    speed: float = 2.0
    loss: float = 2.0
    debt: float = 1.0

    def __post_init__(self) -> None:
        for name in ("speed", "loss", "debt"):
            check_range(self, name, 0.0, 8.0)

    def select(self, devices: Devices, count: int, context: Context) -> Rows:
        gain = self.loss * np.log(_losses(devices.loss)) - self.speed * np.log(expected_seconds(devices, context))
        worth = np.exp(np.maximum(gain - gain.max(), -math.log(MOST)))
        return by_weight(count, context.rng, worth / (1.0 + devices.selected) ** self.debt)


def _losses(reported: Floats) -> Floats:
    """All above 0."""
    known = np.isfinite(reported) & (reported >= 0.0)
    if not known.any():
        return np.ones(len(reported))
    usual, most = np.percentile(reported[known], (75.0, 95.0))
    result: Floats = np.clip(np.where(known, reported, usual), 1e-3, max(float(most), 1e-3))
    return result
