"""Accuracy over what it cost, averaged over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from fedpace.simulations.comparison.report.files import Run
from fedpace.simulations.comparison.statistics import LEVEL, Floats

_POINTS = 110
_DECADES = 3  # that a curve goes back from its end
_RESAMPLES = 999


@dataclass(frozen=True)
class Curve:
    """A mean over seeds, and its 95 % bootstrap interval over them; of one seed, the interval is empty."""

    x: Floats
    mean: Floats
    low: Floats
    high: Floats


def accuracy_curve(runs: Sequence[Run], cost: str, value: str) -> Curve | None:
    """`value` (an accuracy) over `cost`, at points evenly spaced on a logarithmic scale, as far as all the runs go.

    At each cost counts the last evaluation that a run had made by then. None where there is nothing to average.
    """
    found = []
    for run in runs:
        x, y = run.evaluations[cost], run.evaluations[value]
        there = np.isfinite(x) & np.isfinite(y)
        if there.any():
            found.append((x[there], y[there]))
    if not found:
        return None
    first, last = max(x[0] for x, _ in found), min(x[-1] for x, _ in found)
    first = max(first, last / 10**_DECADES)
    if first > last or last <= 0:  # one run ended before another's first evaluation, or none cost anything
        return None
    grid = np.geomspace(first, last, _POINTS)
    grid[0], grid[-1] = first, last  # not a rounding error beyond
    values = np.array([y[np.searchsorted(x, grid, side="right") - 1] for x, y in found])
    mean = values.mean(axis=0)
    if len(values) == 1:
        return Curve(grid, mean, mean, mean)
    interval = stats.bootstrap(
        (values,),
        np.mean,
        axis=0,
        n_resamples=_RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Curve(grid, mean, interval.low, interval.high)
