"""TiFL: all devices of a round from one tier of similar speed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedpace.errors import ConfigError
from fedpace.strategies.fleet import Floats, Rows
from fedpace.strategies.parts import Context, Devices
from fedpace.strategies.selectors.drawing import best, check_range, expected_seconds, known


@dataclass(frozen=True, slots=True)
class Tiers:
    """Tier-based selection (Chai et al. 2020, "TiFL: a tier-based federated learning system", HPDC).

    Devices never selected are profiled first (section 4.2), until `profile` of them were: in a fleet larger than that
    the others are placed by what their profiles say. Then devices are divided into at most `tiers` groups of equal size
    by the time their tasks take, few enough that each can fill a round, and anew every `interval` rounds. Each choice
    draws a tier by its probability and then devices of that tier uniformly (algorithm 2).

    Every `interval` rounds the probabilities change if the loss of the last tier drawn did not fall: the higher a tier's
    loss, the higher its probability (see `tier_probabilities`). The paper tests accuracies on each tier's own data;
    here it is the mean loss that the tier's devices reported. A choice costs the tier one of its `credits` (one number
    for all, or one a tier, fastest first); a tier without credits is passed over. Once none of those at hand has any,
    all are given theirs again, since a run need not know its length.
    """

    tiers: int = 5
    interval: int = 10
    credits: int | tuple[int, ...] = 100
    profile: int = 1000

    def __post_init__(self) -> None:
        check_range(self, "tiers", 1)
        check_range(self, "interval", 1)
        check_range(self, "profile", 0)
        credits = (self.credits,) * self.tiers if isinstance(self.credits, int) else self.credits
        if len(credits) != self.tiers or min(credits) < 1:
            raise ConfigError(
                f"Tiers: credits is {self.credits}; give 1 or more, for all or for each of the {self.tiers} tiers"
            )

    def select(self, devices: Devices, count: int, context: Context) -> Rows:
        memory = context.memory
        new = np.flatnonzero(devices.selected == 0)
        if len(new) and memory.get("profiled", 0) < self.profile:
            memory["profiled"] = memory.get("profiled", 0) + min(count, len(new))
            return best(count, context.rng, devices.selected > 0)
        seconds = expected_seconds(devices, context)
        if context.round - memory.get("changed", -math.inf) >= self.interval:
            self._change(memory, devices, seconds, min(self.tiers, max(1, context.fleet.alive_count // count)))
            memory["changed"] = context.round
        tier_of = np.searchsorted(memory["bounds"], seconds)
        tier = self._draw(memory, np.bincount(tier_of, minlength=len(memory["credits"])), context.rng)
        members = np.flatnonzero(tier_of == tier)
        return members[context.rng.choice(len(members), min(count, len(members)), replace=False)]

    def _credits(self, tiers: int) -> list[int]:
        return [self.credits] * tiers if isinstance(self.credits, int) else list(self.credits[:tiers])

    def _change(self, memory: dict[str, Any], devices: Devices, seconds: Floats, tiers: int) -> None:
        """Adapts the probabilities, if the tier drawn last did not improve since the last time; divides devices anew."""
        if len(memory.get("credits", [])) != tiers:
            memory["probabilities"] = [1.0 / tiers] * tiers
            memory["credits"] = self._credits(tiers)
            memory["losses"] = [None] * tiers
        else:
            losses = tier_losses(np.searchsorted(memory["bounds"], seconds), devices.loss, tiers)
            before, after = memory["losses"][memory["drawn"]], losses[memory["drawn"]]
            if before is not None and after >= before:
                memory["probabilities"] = tier_probabilities(losses).tolist()
            memory["losses"] = [None if math.isnan(loss) else float(loss) for loss in losses]
        memory["bounds"] = np.quantile(seconds, np.arange(1, tiers) / tiers).tolist()

    def _draw(self, memory: dict[str, Any], members: Rows, rng: np.random.Generator) -> int:
        """A tier that has members and credits, by its probability; one of its credits is spent."""
        there = members > 0
        if not (there & (np.array(memory["credits"]) > 0)).any():
            memory["credits"] = self._credits(len(there))
        open_ = there & (np.array(memory["credits"]) > 0)
        weights = np.where(open_, memory["probabilities"], 0.0)
        tier = int(rng.choice(len(weights), p=weights / weights.sum()))
        memory["credits"][tier] -= 1
        memory["drawn"] = tier
        return tier


def tier_losses(tier_of: Rows, loss: Floats, tiers: int) -> Floats:
    """Mean loss of each tier's devices, shape (tiers,); NaN for a tier of which no device said any."""
    said = np.abs(loss) < 1e150  # no NaN, and nothing whose sum overflows
    counts = np.bincount(tier_of[said], minlength=tiers)
    sums = np.bincount(tier_of[said], loss[said], minlength=tiers)
    result: Floats = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return result


def tier_probabilities(losses: Floats) -> Floats:
    """Probability of each tier, shape (tiers,): it falls linearly with the rank, the highest loss first.

    Of n tiers, that of rank k = 0, 1, ... gets (n - k) / (n (n + 1) / 2). The paper (function ChangeProbs of algorithm 2)
    asks that lower accuracies get higher probabilities, and leaves it open how. A tier whose loss is unknown ranks as
    the median of the others.
    """
    n = len(losses)
    probabilities = np.zeros(n)
    probabilities[np.argsort(-known(losses, 0.0), kind="stable")] = (n - np.arange(n)) / (n * (n + 1) / 2)
    return probabilities
