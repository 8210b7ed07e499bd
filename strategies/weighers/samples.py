"""By the number of samples that an update was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedpace.strategies.fleet import Floats
from fedpace.strategies.parts import Context, Updates

MOST = 2.0**53
"""Counts beyond this are taken for this: sums of weights stay finite whatever a device says."""


@dataclass(frozen=True, slots=True)
class FleetShare:
    """The share of the fleet's samples that is folded at once: with `Samples`, update i weighs n_i over the samples of all
    devices that were ever folded, as FedCompass adds up its groups (Li et al. 2024, section 3). Absolute.

    A device alone moves the model by its share, and not by a whole step.
    """

    reads_pace: ClassVar[bool] = False

    def scale(self, updates: Updates, relative: Floats, context: Context) -> Floats:
        known: dict[str, float] = context.memory.setdefault("samples", {})
        before = float(context.memory.get("total", 0.0))
        counts = Samples().weigh(updates, context)
        for row, count in zip(updates.row.tolist(), counts.tolist(), strict=True):
            before += count - known.get(str(row), 0.0)
            known[str(row)] = count
        context.memory["total"] = before
        return np.full(len(updates), min(1.0, float(counts.sum()) / before) if before > 0 else 1.0)


@dataclass(frozen=True, slots=True)
class Samples:
    """p_i = n_i / n, as federated averaging weighs (McMahan et al. 2017, algorithm 1). Relative.

    An update that does not say how many samples it had, or says none, has no weight.
    """

    reads_pace: ClassVar[bool] = False

    def weigh(self, updates: Updates, context: Context) -> Floats:
        counts = updates.samples
        known = np.isfinite(counts) & (counts > 0)
        result: Floats = np.where(known, np.minimum(counts, MOST), 0.0)
        return result
