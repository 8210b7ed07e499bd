"""Ratios between strategies, with intervals: bootstrap over seeds (Efron 1979, "Bootstrap methods: another look at the
jackknife"; percentiles, by scipy).

Runs of one seed have the same fleet and the same data, so strategies are paired by seed: a ratio is the geometric mean
over seeds, and over apps, of one cost over the other. A run that does not reach its target is censored: it counts as what
it had spent at its end, which is a bound, and whatever is made of it says so. A run that died or diverged never arrives:
it counts as the costliest of its app and fleet.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
Row = Mapping[str, Any]
"""A row of `runs.parquet`."""

LEVEL = 0.95
RESAMPLES = 9_999
MEASURES = ("seconds", "device_seconds", "bytes")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its interval (NaN for one seed). `bound`: what censored runs make of it, "at least", "at most" or
    "unclear" (both); empty where none is."""

    value: float
    low: float
    high: float
    bound: str = ""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run spent until its target, in seconds or bytes; `censored` where it is only a bound from below."""

    value: float
    censored: bool


class Runs:
    """The runs of a comparison, by app, fleet, strategy (with whether it is tuned) and seed."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows: dict[tuple[str, str], dict[tuple[str, bool], dict[int, Row]]] = {}
        for row in rows:
            of = self._rows.setdefault((row["app"], row["fleet"]), {})
            of.setdefault((row["strategy"], row["tuned"]), {})[row["seed"]] = row

    @property
    def apps(self) -> list[str]:
        return sorted({app for app, _ in self._rows})

    @property
    def fleets(self) -> list[str]:
        return sorted({fleet for _, fleet in self._rows})

    @property
    def strategies(self) -> list[tuple[str, bool]]:
        """Names, and whether tuned."""
        return sorted({strategy for runs in self._rows.values() for strategy in runs})

    def of(self, app: str, fleet: str, strategy: tuple[str, bool]) -> dict[int, Row]:
        """Runs by seed."""
        return self._rows.get((app, fleet), {}).get(strategy, {})

    def variant(self, name: str) -> tuple[str, bool]:
        """A strategy as it is compared with: tuned, if it is. Raises LookupError where it was not run."""
        for strategy in ((name, True), (name, False)):
            if strategy in self.strategies:
                return strategy
        raise LookupError(f"there are no runs of {name}; there are {', '.join(name for name, _ in self.strategies)}")

    def cost(self, row: Row, measure: str) -> Cost:
        """What a run spent until its target: "seconds" (virtual), "device_seconds" or "bytes" (both ways)."""
        reached = row[f"{measure}_to_target"]
        if not math.isnan(reached):
            return Cost(max(float(reached), 1e-9), False)
        spent = _spent(row, measure)
        if row["status"] != "completed":
            runs = self._rows[row["app"], row["fleet"]].values()
            spent = max(_spent(other, measure) for seeds in runs for other in seeds.values())
        return Cost(max(spent, 1e-9), True)

    # ------------------------------------------------------------ estimates

    def costs(self, app: str, fleet: str, strategy: tuple[str, bool], measure: str) -> Estimate:
        """The geometric mean over seeds of what runs spent until their target."""
        found = [self.cost(row, measure) for row in self.of(app, fleet, strategy).values()]
        logs = np.array([[math.log(cost.value)] for cost in found])
        estimate = _estimate(logs, exponential=True)
        return _bounded(estimate, below=any(cost.censored for cost in found), above=False)

    def speedup(
        self,
        strategy: tuple[str, bool],
        reference: tuple[str, bool],
        fleet: str,
        apps: Sequence[str],
        measure: str = "seconds",
    ) -> Estimate:
        """How many times as much the reference needs: the geometric mean over seeds and apps. NaN without common seeds."""
        return self.speedup_on_best(strategy, [reference], fleet, apps, measure)

    def speedup_on_best(
        self,
        strategy: tuple[str, bool],
        others: Sequence[tuple[str, bool]],
        fleet: str,
        apps: Sequence[str],
        measure: str = "seconds",
    ) -> Estimate:
        """The same against the best of several; which that is, is decided anew in each resample."""
        seeds = self._common_seeds([strategy, *others], fleet, apps)
        logs = np.zeros((len(seeds), len(others)))
        below = above = False
        for app in apps:
            mine = self.of(app, fleet, strategy)
            for column, other in enumerate(others):
                theirs = self.of(app, fleet, other)
                for line, seed in enumerate(seeds):
                    own, its = self.cost(mine[seed], measure), self.cost(theirs[seed], measure)
                    logs[line, column] += (math.log(its.value) - math.log(own.value)) / len(apps)
                    below, above = below or its.censored, above or own.censored
        return _bounded(_estimate(logs, exponential=True), below=below, above=above)

    def gap(
        self,
        strategy: tuple[str, bool],
        reference: tuple[str, bool],
        fleet: str,
        apps: Sequence[str],
        column: str = "final_accuracy",
    ) -> Estimate:
        """By how much the reference is above the strategy in a column, the mean over seeds and apps."""
        seeds = self._common_seeds([strategy, reference], fleet, apps)
        gaps = np.zeros((len(seeds), 1))
        for app in apps:
            mine, theirs = self.of(app, fleet, strategy), self.of(app, fleet, reference)
            gaps[:, 0] += [(theirs[seed][column] - mine[seed][column]) / len(apps) for seed in seeds]
        return _estimate(gaps, exponential=False)

    def mean(self, app: str, fleet: str, strategy: tuple[str, bool], column: str) -> Estimate:
        """The mean of a column over seeds."""
        values = [row[column] for row in self.of(app, fleet, strategy).values()]
        return _estimate(np.array(values, np.float64).reshape(-1, 1), exponential=False)

    def _common_seeds(self, strategies: Sequence[tuple[str, bool]], fleet: str, apps: Sequence[str]) -> list[int]:
        found = [set(self.of(app, fleet, strategy)) for app in apps for strategy in strategies]
        return sorted(set.intersection(*found)) if found else []


def _spent(row: Row, measure: str) -> float:
    if measure == "bytes":
        return float(row["bytes_up"] + row["bytes_down"])
    return float(row["virtual_seconds" if measure == "seconds" else measure])


def _estimate(columns: Floats, *, exponential: bool) -> Estimate:
    """Of the least of the means of columns, (seeds, columns): itself, and between which values it lies."""
    if not columns.size or np.isnan(columns).any():
        return Estimate(math.nan, math.nan, math.nan)
    value = float(columns.mean(axis=0).min())
    if len(columns) == 1:
        low = high = math.nan
    elif (columns == columns[0]).all():
        low = high = value
    else:
        found = stats.bootstrap(
            tuple(columns.T),
            _least_mean,
            paired=True,
            vectorized=True,
            n_resamples=RESAMPLES,
            confidence_level=LEVEL,
            method="percentile",
            rng=np.random.default_rng(0),
        )
        low, high = (float(end) for end in found.confidence_interval)
    if exponential:
        value, low, high = math.exp(value), math.exp(low), math.exp(high)
    return Estimate(value, low, high)


def _least_mean(*columns: Floats, axis: int = -1) -> Floats:
    least: Floats = np.min([column.mean(axis=axis) for column in columns], axis=0)
    return least


def _bounded(estimate: Estimate, *, below: bool, above: bool) -> Estimate:
    """`below`: what it truly is may be more; `above`: it may be less."""
    bound = "unclear" if below and above else "at least" if below else "at most" if above else ""
    return Estimate(estimate.value, estimate.low, estimate.high, bound)
