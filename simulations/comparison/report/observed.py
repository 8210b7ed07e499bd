"""What an entry's runs show of its devices and updates: shares of work, staleness, weights by speed, tasks over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedpace.simulations.comparison.report.files import Details, Gantt
from fedpace.simulations.comparison.statistics import Floats

STALENESS_QUANTILES = (5, 25, 50, 75, 95, 100)
_BUSIEST = 0.3  # the share of devices of which FLASH tells the work
_BINS = 10
_POINTS = 121


@dataclass(frozen=True)
class Work:
    """Tasks over devices. Means over seeds."""

    share_of_devices: Floats
    share_of_tasks: Floats
    jain: float
    busiest: float  # share of the tasks that the busiest 30 % did
    idle: float  # share of the devices that did none


@dataclass(frozen=True)
class WeightsBySpeed:
    """Weights by device speed. Bins hold a tenth of the fleet each, or all devices of one speed where many share it."""

    percentile: Floats  # the middle of each bin, of the fleet from slowest (0) to fastest (100)
    each: Floats  # mean weight of an update, over that of all updates; NaN where there was none
    influence: Floats  # share of all weight, over the share of the devices


@dataclass(frozen=True)
class Observed:
    """None, each, where the runs noted nothing of it. `staleness` are the quantiles above, of all seeds' updates."""

    work: Work | None
    staleness: tuple[float, ...] | None
    weights: WeightsBySpeed | None
    gantt: Gantt | None


def observe(found: Sequence[Details]) -> Observed:
    """Of an entry's runs, one element a seed; the strip is of the first."""
    worked = [details.tasks for details in found if details.tasks.sum() > 0]
    stale = [details.staleness for details in found if details.staleness.size]
    weighed = [details for details in found if details.weights.size and details.weights.mean() > 0]
    return Observed(
        work=_work(worked) if worked else None,
        staleness=tuple(np.percentile(np.concatenate(stale), STALENESS_QUANTILES).tolist()) if stale else None,
        weights=_weights_by_speed(weighed) if weighed else None,
        gantt=found[0].gantt if found and found[0].gantt.start.size else None,
    )


def jain(tasks: Floats) -> float:
    """Jain's index of fairness (Jain, Chiu and Hawe 1984): 1 if all did the same, 1/n if one of n did all."""
    return float(tasks.sum()) ** 2 / (tasks.size * float(np.square(tasks).sum()))


def lorenz(tasks: Floats) -> tuple[Floats, Floats]:
    """Share of all tasks (y) done by a share of the devices (x), from those that did least."""
    done = np.concatenate([[0.0], np.cumsum(np.sort(tasks))])
    return np.linspace(0.0, 1.0, done.size), done / done[-1]


def _work(worked: Sequence[Floats]) -> Work:
    devices = np.linspace(0.0, 1.0, _POINTS)
    shares = [np.interp(devices, *lorenz(tasks)) for tasks in worked]
    busiest = [1.0 - np.interp(1.0 - _BUSIEST, *lorenz(tasks)) for tasks in worked]
    return Work(
        devices,
        np.mean(shares, axis=0),
        jain=float(np.mean([jain(tasks) for tasks in worked])),
        busiest=float(np.mean(busiest)),
        idle=float(np.mean([(tasks == 0).mean() for tasks in worked])),
    )


def _weights_by_speed(weighed: Sequence[Details]) -> WeightsBySpeed:
    """All seeds together, each seed's weights as multiples of their mean."""
    speed = np.concatenate([details.speed for details in weighed])
    of_update = np.concatenate([details.weight_speed for details in weighed])
    weights = np.concatenate([details.weights / details.weights.mean() for details in weighed])
    inner = np.unique(np.quantile(speed, np.arange(_BINS) / _BINS, method="lower"))[1:]
    bins = inner.size + 1
    shares = np.bincount(np.searchsorted(inner, speed, side="right"), minlength=bins) / speed.size
    placed = np.searchsorted(inner, of_update, side="right")
    updates = np.bincount(placed, minlength=bins)
    weight = np.bincount(placed, weights=weights, minlength=bins)
    each = np.divide(weight, updates, out=np.full(bins, np.nan), where=updates > 0)
    return WeightsBySpeed((np.cumsum(shares) - shares / 2) * 100, each, weight / weight.sum() / shares)
