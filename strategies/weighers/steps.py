"""By the number of local steps: devices that took more of them do not pull the model further their way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fedpace.strategies.fleet import Floats
from fedpace.strategies.parts import Context, Updates
from fedpace.strategies.weighers.samples import MOST


@dataclass(frozen=True, slots=True)
class NormalisedSteps:
    """FedNova's normalised averaging (Wang et al. 2020, "Tackling the Objective Inconsistency Problem", eq. 8). Absolute.

    For plain SGD, where a device's change is the sum of tau_i gradients: a_i = tau_eff / tau_i with tau_eff = sum of
    p_j tau_j, so the step is tau_eff times the mean change a step. Devices whose number of steps is not known count with
    the mean of the others; where nobody's is, all factors are 1.
    """

    reads_pace: ClassVar[bool] = False

    def refuse(self, strategy: Any) -> str | None:
        if strategy.folder.against == "current":
            return "it divides a change by its steps, and a change against the current model is not a sum of steps"
        return None

    def scale(self, updates: Updates, relative: Floats, context: Context) -> Floats:
        known = np.isfinite(updates.steps) & (updates.steps > 0)
        if not known.any():
            return np.ones(len(updates))
        counts = np.clip(updates.steps, 1.0, MOST)
        steps = np.where(known, counts, counts[known].mean())
        result: Floats = float(relative @ steps) / steps
        return result
