"""Oort: the devices whose data teaches most, as far as they are fast enough."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedpace.errors import ConfigError
from fedpace.strategies.fleet import Floats, Rows
from fedpace.strategies.parts import Context, Devices, Outcome
from fedpace.strategies.selectors.drawing import best, by_weight, check_range, expected_seconds, known, portion


@dataclass(frozen=True, slots=True)
class Utility:
    """Guided participant selection (Lai et al. 2021, "Oort: efficient federated learning via guided participant
    selection", OSDI, algorithm 1). Defaults are the paper's (section 7.1), those of the pacer and `max_left_out` its authors' program's.

    - Exploration: a share of each choice, `exploration * exploration_decay ** round` and not under `exploration_floor`,
      goes to devices that never brought an update, drawn by speed (failures make a device look slower).
    - Exploitation: the rest is drawn by `utility` from those above `cut_off` times that of the last one that would fit.
      Utilities beyond the percentile `clip_percentile` are clipped; devices selected `max_participations` times or more
      (None: no limit) are left out, though at most the share `max_left_out`, and none that is needed.
    - Pacer: the preferred duration is the percentile `preferred_percentile` of the devices' durations. It rises by
      `pacer_step` whenever the devices' utilities of the last `pacer_rounds` rounds sum to less than those before.

    So every device is seen once; one that was seen and is slow or has learned all it can may not be again.

    The loss is what devices report (mean training loss): with sqrt(mean loss^2) taken for its absolute value, the
    utility is a lower bound. A device that brings updates and reports no loss counts as the median of those that do.
    """

    exploration: float = 0.9
    exploration_decay: float = 0.98
    exploration_floor: float = 0.2
    cut_off: float = 0.95
    clip_percentile: float = 95.0
    penalty: float = 2.0
    max_participations: int | None = 10
    max_left_out: float = 0.3
    preferred_percentile: float = 30.0
    pacer_step: float = 5.0
    pacer_rounds: int = 20

    def __post_init__(self) -> None:
        for name in ("exploration", "exploration_decay", "exploration_floor", "cut_off", "max_left_out"):
            check_range(self, name, 0.0, 1.0)
        for name in ("clip_percentile", "preferred_percentile", "pacer_step"):
            check_range(self, name, 0.0, 100.0)
        check_range(self, "penalty", 0.0)
        check_range(self, "pacer_rounds", 1)
        if self.max_participations is not None and self.max_participations < 1:
            raise ConfigError(f"Utility: max_participations is {self.max_participations}; choose 1 or more, or None")

    def select(self, devices: Devices, count: int, context: Context) -> Rows:
        rng = context.rng
        seconds = expected_seconds(devices, context)
        preferred = float(np.percentile(seconds, self._pace(context)))
        statistical = statistical_utility(devices.samples, devices.loss)
        seen = (devices.folded > 0) | np.isfinite(statistical)
        explored, unexplored = np.flatnonzero(seen), np.flatnonzero(~seen)
        share = max(self.exploration_floor, self.exploration * self.exploration_decay ** max(context.round, 0))
        explore = min(len(unexplored), max(portion(count, share, rng), count - len(explored)))
        exploit = min(len(explored), count - explore)

        explored = self._keep(explored, exploit, devices.selected, rng)
        scores = utility(
            known(statistical[explored], 1.0),
            devices.last_selected[explored],
            context.round + 1,
            seconds[explored],
            preferred,
            self.penalty,
            self.clip_percentile,
        )
        speed = 1.0 / (seconds[unexplored] * (1.0 + devices.failed[unexplored]))
        return np.concatenate(
            [explored[self._exploit(scores, exploit, rng)], unexplored[by_weight(explore, rng, speed)]]
        )

    def observe(self, outcome: Outcome, context: Context) -> None:
        """Counts the utility that came in, for the pacer."""
        achieved = float(statistical_utility(np.array([outcome.samples]), np.array([outcome.loss]))[0])
        if not outcome.reason and math.isfinite(achieved):
            context.memory["achieved"] = min(context.memory.get("achieved", 0.0) + achieved, 1e300)  # never infinite

    def _keep(self, explored: Rows, needed: int, selected: Rows, rng: np.random.Generator) -> Rows:
        """Leaves out those that took part most often, beyond the limit."""
        if self.max_participations is None:
            return explored
        worn = explored[selected[explored] >= self.max_participations]
        most = min(int(self.max_left_out * len(explored)), len(explored) - needed)
        out = worn[best(most, rng, -selected[worn])]
        return np.setdiff1d(explored, out, assume_unique=True)

    def _exploit(self, scores: Floats, count: int, rng: np.random.Generator) -> Rows:
        """Positions in `scores` drawn by score from those above the cut-off."""
        if count == 0:
            return np.zeros(0, dtype=np.intp)
        last = np.partition(scores, len(scores) - count)[len(scores) - count]
        pool = np.flatnonzero(scores >= self.cut_off * last)
        return pool[by_weight(count, rng, scores[pool])]

    def _pace(self, context: Context) -> float:
        """The percentile of the preferred duration, once a round that ended since is counted."""
        memory: dict[str, Any] = context.memory
        if "percentile" not in memory:
            memory.update(percentile=self.preferred_percentile, round=context.round, history=[], achieved=0.0)
        if context.round != memory["round"]:
            history: list[float] = memory["history"]
            history.append(memory["achieved"])
            memory.update(round=context.round, achieved=0.0)
            window = self.pacer_rounds
            if len(history) >= 2 * window:
                if sum(history[:window]) > sum(history[window:]):
                    memory["percentile"] = min(100.0, memory["percentile"] + self.pacer_step)
                del history[:window]
        return float(memory["percentile"])


def statistical_utility(samples: Floats, loss: Floats) -> Floats:
    """|B| sqrt(mean loss^2) (section 4.2), from numbers of samples and root mean square losses, shape (devices,).

    NaN where one of them is missing or is no number to reckon with.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        product = samples * np.abs(loss)
    result: Floats = np.where((samples > 0) & np.isfinite(product), product, np.nan)
    return result


def utility(
    statistical: Floats, last_round: Rows, now: int, seconds: Floats, preferred: float, penalty: float, clip: float
) -> Floats:
    """Utility of explored devices, shape (devices,), finite and >= 0 (algorithm 1, exploitation, and equation 1).

    min(U, percentile) + sqrt(0.1 ln R / L), times (T / t)^penalty where a device's `seconds` t are more than the
    `preferred` T. Rounds R = `now` and L = `last_round` count from 1. Statistical utilities are taken in units of the
    largest one after clipping, so that the term of temporal uncertainty weighs the same whatever the loss and the data.
    """
    if not len(statistical):
        return statistical
    clipped = np.minimum(statistical, np.percentile(statistical, clip))
    largest = float(clipped.max())
    rounds = np.maximum(last_round, 1)
    result: Floats = clipped / largest if largest > 0 else np.zeros(len(clipped))
    result = result + np.sqrt(0.1 * math.log(max(now, 1)) / rounds)
    return result * np.minimum(preferred / seconds, 1.0) ** penalty
