"""The pace of each device: seconds a local step, and seconds of everything else a task, with their uncertainty.

Both are logarithms that a Kalman filter follows (a random walk observed with noise), with Huber's clipped innovation, so
that one outlier moves an estimate little and does not make it look surer (Masreliez & Martin 1977, "Robust Bayesian
estimation for the linear model and robustifying the Kalman filter", IEEE Trans. Automatic Control 22(3)). The noise of
each device is learnt from the same clipped innovations (Huber 1964, "Robust estimation of a location parameter", Annals
of Mathematical Statistics 35(1), Proposal 2). Innovations that keep pointing the same way are a change of pace, not
outliers: a cumulative sum of them (Page 1954, "Continuous inspection schemes", Biometrika 41) makes the filter begin anew.

Everything else a task, its overhead, is mostly transfers. Of a device's overhead at the size of its first task a share
is proportional to the bytes moved and the rest is fixed: a task of x times that size takes (1 - share + share x) times
as long. The share is a second state of the same filter. On simulated devices with a fixed part and a bandwidth this
predicts varying sizes two to four times closer than a mean of seconds a task or of seconds a byte does, and stays within
a third where overhead is all fixed or all proportional, where one of those means is right and the other 2 to 3 times off.

Durations are the coordinator's own: from sending to arrival. What a device says it computed splits them between
computing and transfers, and is believed no further than that: a device cannot look faster than its replies are.
Devices that say nothing, or are not believed (see claims.py), have all their seconds counted as computing.
"""

from __future__ import annotations

import math

import numpy as np

from fedpace.strategies.claims import DOUBT, claims_power, judge_claim, log_power, log_powers
from fedpace.strategies.fleet import Fleet, Floats, Rows

NOISE = 0.3**2
"""Variance of one observation of a logarithm, until a device's own is known: its tasks differ by about a third."""
NOISE_BOUNDS = (0.02**2, 1.5**2)
"""Least and greatest that it is taken to be."""
DRIFT = 0.05**2
"""Variance added between observations."""
SPREAD = 1.0
"""Variance between devices: published fleets have standard deviations of ln(speed) from 0.9 to 1.6."""
HUBER = 2.0
"""Innovations beyond so many standard deviations are clipped."""
CLIPPED_VARIANCE = 0.9205
"""Of a standard normal variable clipped there: min(z^2, 4) is so much on average."""
SLACK, ALARM = 0.75, 3.5
"""Of the cumulative sum, in standard deviations: three clipped innovations of one sign raise the alarm. Noise alone does in
less than one of 10,000 tasks, simulated, at the price of one estimate begun anew."""
SHARE, SHARE_VARIANCE = 0.8, 0.3**2
"""Share of a device's overhead that is proportional to the bytes moved, before sizes varied."""
PROMISE = 0.5
"""Exponent of speed in processors for devices not observed yet: half of what they promise, as a logarithm."""


def observe_task(
    fleet: Fleet, row: int, *, seconds: float, compute_seconds: float, steps: float, bytes_moved: float = math.nan
) -> bool:
    """One finished task of `steps` local steps (1 where nobody knows) that took `seconds` from sending to arrival.

    `compute_seconds` is the device's own word and `bytes_moved` the bytes both ways together, NaN where not known.
    Numbers that cannot be are ignored or clipped. Returns whether the device was just found out to misreport.
    O(log of what is remembered of the fleet), whatever its size.
    """
    if not 0.0 < seconds < math.inf:
        return False
    seconds = min(max(seconds, 1e-6), 1e9)
    steps = min(steps, 1e12) if steps >= 1.0 else 1.0
    computing, transfers = _split(fleet, row, seconds, compute_seconds, steps)
    _follow_steps(fleet, row, math.log(computing / steps))
    if transfers > 0.0:
        _follow_link(fleet, row, math.log(transfers), bytes_moved if 1.0 <= bytes_moved <= 1e18 else math.nan)
    return _mark(fleet, row)


def _split(fleet: Fleet, row: int, seconds: float, said: float, steps: float) -> tuple[float, float]:
    """Seconds of a task that count as computing, and as transfers (0 where nothing new is known of those)."""
    columns = fleet.columns
    if said > 0.0:
        claimed = min(max(said, 1e-6 * seconds), seconds)
        clock_only = judge_claim(fleet, row, claimed, seconds, steps)
        if clock_only != columns["clock_only"].item(row):  # what was learnt of the split is worth nothing now
            columns["clock_only"][row] = clock_only
            columns["step_count"][row] = 0
            columns["link_count"][row] = 0
        if clock_only:
            return seconds, 0.0
        if said <= seconds:
            transfers = max(seconds - claimed, 1e-3 * seconds)
            return seconds - transfers, transfers
    if columns["link_count"].item(row):  # of other tasks it said
        return seconds - min(math.exp(columns["link_mean"].item(row)), seconds / 2.0), 0.0
    return seconds, 0.0


def _mark(fleet: Fleet, row: int) -> bool:
    """Writes down whether the device misreports. Returns whether that is new."""
    columns = fleet.columns
    overstates = claims_power(fleet, row)
    guilty: bool = overstates or columns["clock_only"].item(row)
    before: bool = columns["misreports"].item(row)
    if guilty or before:
        columns["overstates"][row], columns["misreports"][row] = overstates, guilty
    return guilty and not before


def _follow_steps(fleet: Fleet, row: int, value: float) -> None:
    """One more ln(seconds a step)."""
    count = _filter(fleet, "step", row, value)
    if _is_milestone(count) and _is_usual(fleet, row):
        columns = fleet.columns
        mean, cpus = columns["step_mean"].item(row), columns["cpu_count"].item(row)
        power = log_power(cpus, columns["gpu_count"].item(row))
        fleet.usual["step"].add(mean + PROMISE * power)
        if cpus >= 1.0:
            fleet.usual["power"].add(mean + power)


def _follow_link(fleet: Fleet, row: int, value: float, size: float) -> None:
    """One more ln(seconds of overhead), of a task that moved `size` bytes (NaN: as many as usual)."""
    columns = fleet.columns
    if columns["link_count"].item(row) == 0:
        columns["link_bytes"][row], columns["link_share"][row] = size, SHARE
        columns["link_share_variance"][row] = SHARE_VARIANCE
    first = columns["link_bytes"].item(row)
    if math.isnan(first):
        columns["link_bytes"][row] = first = size
    if math.isnan(size) or size == first:
        count = _filter(fleet, "link", row, value)
    else:
        times = min(max(size / first, 1e-6), 1e6)
        share = columns["link_share"].item(row)
        scale = 1.0 - share + share * times
        count = _filter(fleet, "link", row, value - math.log(scale), slope=(times - 1.0) / scale)
    if _is_milestone(count) and _is_usual(fleet, row):
        fleet.usual["link"].add(columns["link_mean"].item(row))
        if first >= 1.0:
            fleet.usual["bytes"].add(math.log(first))


def _is_milestone(count: int) -> bool:
    """At the 1st, 2nd, 4th, 8th ... observation a device counts for what is usual: fast ones do not drown slow ones."""
    return count & (count - 1) == 0


def _is_usual(fleet: Fleet, row: int) -> bool:
    """A device that is doubted does not count for what is usual."""
    columns = fleet.columns
    return not (columns["misreports"].item(row) or columns["claim_doubt"].item(row) > DOUBT / 2.0)


def _filter(fleet: Fleet, what: str, row: int, value: float, slope: float = 0.0) -> int:
    """One observation of a logarithm. Returns how many there were.

    The update of a Kalman filter with a clipped innovation, and of the noise. `slope` is the derivative of what is
    observed by `link_share`, the second state, where it has one; correlations of both states are left out.
    """
    columns = fleet.columns
    names = _NAMES[what]
    mean, variance, noise, alarm, count = [columns[name].item(row) for name in names]
    if count == 0:
        mean, variance, noise, alarm = value, NOISE, NOISE, 0.0
    else:
        prior = variance + DRIFT
        share_variance = columns["link_share_variance"].item(row) if slope else 0.0
        both = prior + slope * slope * share_variance
        deviation = math.sqrt(both + noise)
        z = (value - mean) / deviation
        inside = -HUBER < z < HUBER
        z = min(max(z, -HUBER), HUBER)
        alarm += z
        alarm = math.copysign(max(abs(alarm) - SLACK, 0.0), alarm)
        if abs(alarm) > ALARM:  # it did change: begin anew from here
            mean, variance, alarm = value, noise, 0.0
        else:
            pull = z / deviation
            mean += prior * pull
            variance = prior * (1.0 - prior / (both + noise)) if inside else prior
            if slope:
                gain = slope * share_variance
                columns["link_share"][row] = min(max(columns["link_share"].item(row) + gain * pull, 0.05), 0.99)
                if inside:
                    columns["link_share_variance"][row] = share_variance * (1.0 - slope * gain / (both + noise))
            seen = z * z / CLIPPED_VARIANCE * (both + noise) - both
            noise += max(1.0 / (count + 4.0), 0.05) * (seen - noise)
            noise = min(max(noise, NOISE_BOUNDS[0]), NOISE_BOUNDS[1])
    count += 1
    for name, number in zip(names, (mean, variance, noise, alarm, count), strict=True):
        columns[name][row] = number
    return int(count)


_NAMES = {
    what: [f"{what}_{part}" for part in ("mean", "variance", "noise", "alarm", "count")] for what in ("step", "link")
}


def seconds_per_step(fleet: Fleet, rows: Rows, *, quantile_sd: float = 0.0) -> Floats:
    """Seconds that one local step is expected to take on each device; NaN where no device was ever observed.

    `quantile_sd` standard deviations of the next observation are added, so 1.0 gives a time that is kept in 84 of 100
    cases.
    """
    mean, variance = _log_step(fleet, rows)
    result: Floats = np.exp(mean + quantile_sd * np.sqrt(variance))
    return result


def overhead_seconds(fleet: Fleet, rows: Rows, bytes_moved: Floats | float | None = None) -> Floats:
    """Seconds a task beside computing (transfers, waiting); the fleet's median where a device was not observed.

    For tasks that move `bytes_moved` bytes, both ways together; as many as each device's first if None or NaN. 0 where
    all seconds count as computing; NaN where no device was ever observed.
    """
    result: Floats = np.exp(_log_overhead(fleet, rows, bytes_moved)[0])
    return result


def bytes_per_second(fleet: Fleet, rows: Rows) -> Floats:
    """Bytes that each device moves a second while it transfers, both ways taken together; NaN where not known."""
    known = (fleet["link_count"][rows] > 0) & ~np.isnan(fleet["link_bytes"][rows])
    mean = np.where(known, fleet["link_mean"][rows], np.nan)
    result: Floats = fleet["link_bytes"][rows] / (fleet["link_share"][rows] * np.exp(mean))
    return result


def task_seconds(
    fleet: Fleet,
    rows: Rows,
    steps: Floats | float,
    *,
    bytes_moved: Floats | float | None = None,
    quantile_sd: float = 0.0,
) -> Floats:
    """Seconds from sending to arrival that tasks of so many steps are expected to take; NaN where nothing is known.

    With `quantile_sd`, as in `seconds_per_step`: computing and overhead are taken as independent, and their sum as log-normal
    with its variance to first order.
    """
    step, step_variance = _log_step(fleet, rows)
    link, link_variance = _log_overhead(fleet, rows, bytes_moved)
    computing, overhead = np.exp(step) * steps, np.exp(link)
    total: Floats = computing + overhead
    if quantile_sd:
        share = computing / np.maximum(total, np.finfo(np.float64).tiny)
        variance = share**2 * step_variance + (1.0 - share) ** 2 * link_variance
        total = total * np.exp(quantile_sd * np.sqrt(variance))
    return total


def _log_step(fleet: Fleet, rows: Rows) -> tuple[Floats, Floats]:
    """ln(seconds a step) and the variance of its next observation: a device's own, or as its profile says beside those
    observed."""
    mean = fleet["step_mean"][rows]
    variance: Floats = fleet["step_variance"][rows].astype(np.float64) + fleet["step_noise"][rows]
    unseen = np.flatnonzero(fleet["step_count"][rows] == 0)
    if len(unseen):
        usual = fleet.usual["step"]
        cpus, gpus = fleet["cpu_count"][rows[unseen]], fleet["gpu_count"][rows[unseen]]
        mean[unseen] = usual.median() - PROMISE * log_powers(cpus, gpus)
        variance[unseen] = max(SPREAD, usual.spread() ** 2 if len(usual) else 0.0) + NOISE
    return mean, variance


def _log_overhead(fleet: Fleet, rows: Rows, bytes_moved: Floats | float | None) -> tuple[Floats, Floats]:
    """ln(seconds of overhead) and the variance of its next observation: a device's own, or what is usual in the fleet."""
    seen = fleet["link_count"][rows] > 0
    nobody_says = not len(fleet.usual["link"]) and len(fleet.usual["step"])
    usual = -math.inf if nobody_says else fleet.usual["link"].median()
    mean = np.where(seen, fleet["link_mean"][rows], usual)
    mean[~seen & (fleet["step_count"][rows] > 0)] = -np.inf
    variance = np.where(seen, fleet["link_variance"][rows] + fleet["link_noise"][rows], SPREAD + NOISE)
    if bytes_moved is not None:
        first = np.where(seen, fleet["link_bytes"][rows], math.exp(fleet.usual["bytes"].median()))
        times = np.minimum(np.maximum(bytes_moved, 0.0) / first, 1e6)
        times = np.where(np.isnan(times), 1.0, times)
        share = np.where(seen, fleet["link_share"][rows], SHARE)
        scale = 1.0 - share + share * times
        mean += np.log(scale)
        unsure = np.where(seen, fleet["link_share_variance"][rows], SHARE_VARIANCE)
        variance += ((times - 1.0) / scale) ** 2 * unsure
    return mean, variance
