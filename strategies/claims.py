"""Devices that misreport, found out by their own times.

**Seconds computed.** A task takes computing and transfers. Seconds that the clock saw and the device does not claim are
its transfers, so says an honest device; a liar hides computing there. Two signs, the first of which needs no other devices:

1. *Elasticity.* When an honest device claims 10 % more than in the task before, the whole takes 10 % of its computing
   longer: the elasticity of the clock's seconds in the claimed ones is the share of computing in the whole. A liar's
   whole grows by nearly 10 %, though it claims to compute for a small share of it. The elasticity is the least-squares
   slope of the changes of both logarithms from task to task (changes, as two slow drifts would look related), each pair
   of changes shrunk to a bounded length, so that one odd task cannot decide.
2. *Improbability.* Claims to compute much faster than its profile lets expect, over a link much slower than others'.
   Neither alone says anything: fast devices and slow links exist. This finds those who always claim the same.

Either counts only where less than half of the whole is claimed, as otherwise a lie changes little. A device that hides
little beside its transfers is not found, nor need be. One that always claims the same is not told
from a slow link where links are very unequal. Of simulated honest devices over links of a range of 1 to 100 one in 200 is
accused at some time in 40 tasks; one in 40 where a fifth of them, some fast ones too, have links 100 times slower.

While a device is not believed, its claims are followed all the same, so that it is cleared when it stops.

**Processors.** A device whose seconds a step, by its estimate, are those of one with a tenth of its processors, and far
outside what is usual in the fleet, claims more power than it has (or cannot use it: to a schedule that is the same).
"""

from __future__ import annotations

import math

import numpy as np

from fedpace.strategies.fleet import Fleet, Floats

# Here and in pace.py what is done for each task takes `fleet.columns`, whole arrays: a slice an access, as `fleet[...]`
# makes, would cost as much as all the arithmetic.

CLAIMS = 3
"""Observations before anybody is said to misreport."""
OTHERS = 6
"""Observations of the fleet before anything is called unusual in it."""
GAP = math.log(2.0)
"""Only who takes more than twice the seconds it claims misreports them: others' claims are close enough."""
MEMORY = 0.1
PAIRS = 2.0 / MEMORY - 1.0
"""Weight of the latest pair of changes, and how many pairs make a plain mean of the same variance."""
REACH = 0.7
"""Longest change of a logarithm, from one task to the next, that counts in full."""
CHANCE_SD = 3.72
"""An elasticity too large is chance once in 10,000 (as many standard errors, were these known): one looks after each task."""
DOUBT = 2.3
"""Standard deviations, on both counts together, that make claims improbable: were both normal and independent, one honest
device in a thousand is as odd."""
LEAST_SPREAD = 0.5
"""Of a fleet: where all are alike nobody is unusual for a small difference."""
POWER_GAP = math.log(10.0)
"""A device with a tenth of the speed that its processors promise claims too much."""

_MOMENTS = ("claim_squares", "claim_products", "claim_total", "claim_honest")


def _student(freedom: float, z: float = CHANCE_SD) -> float:
    """The quantile of Student's t where the normal one is z (Abramowitz & Stegun, 26.7.5, to the third order)."""
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def log_power(cpus: float, gpus: float) -> float:
    """What a profile promises, as the logarithm of a speed: a GPU counts as eight processors. 0 where it says nothing."""
    known = min(cpus, 4096.0) if cpus >= 1.0 else 1.0
    return math.log(known + 8.0 * min(gpus, 64.0) if gpus >= 1.0 else known)


def log_powers(cpus: Floats, gpus: Floats) -> Floats:
    """`log_power` of many."""
    known = np.fmin(np.fmax(cpus, 1.0), 4096.0)
    result: Floats = np.log(known + 8.0 * np.fmin(np.fmax(gpus, 0.0), 64.0))
    return result


def judge_claim(fleet: Fleet, row: int, claimed: float, seconds: float, steps: float) -> bool:
    """One more claim: 0 < `claimed` <= `seconds`. Returns whether the clock alone is to be believed of this device.

    The column `clock_only` holds the verdict that stood before; the caller writes the new one.
    """
    columns = fleet.columns
    log_claimed, log_seconds = math.log(claimed), math.log(seconds)
    count = columns["claim_count"].item(row)
    gap, doubt = log_seconds - log_claimed, _doubt(fleet, row, claimed, seconds, steps)
    excess, room, error = 0.0, 0.0, math.inf
    if count:
        gap_before, doubt_before = columns["claim_gap"].item(row), columns["claim_doubt"].item(row)
        gap, doubt = gap_before + 0.3 * (gap - gap_before), doubt_before + 0.3 * (doubt - doubt_before)
        excess, room, error = _elasticity(fleet, row, count, log_claimed, log_seconds)
    columns["claim_count"][row] = count + 1
    columns["claim_gap"][row] = gap
    columns["claim_doubt"][row] = doubt
    columns["claim_last"][row] = log_claimed
    columns["claim_clock"][row] = log_seconds
    if columns["clock_only"].item(row):
        honest = room / 2.0 - excess > error  # nearer to what an honest device's would be
        return not (gap < 0.7 * GAP or (honest and doubt < DOUBT / 2.0))
    by_itself = excess > room / 2.0 and excess > _student(min(count, PAIRS) - 1.0) * error
    return count + 1 >= CLAIMS and gap > GAP and (by_itself or doubt > DOUBT)


def _doubt(fleet: Fleet, row: int, claimed: float, seconds: float, steps: float) -> float:
    """How improbable a claim is beside others': the quadratic mean of both deviations, in standard deviations of the
    fleet; 0 unless both are there."""
    columns, step, link = fleet.columns, fleet.usual["step"], fleet.usual["link"]
    if seconds < 2.0 * claimed or len(step) < OTHERS or len(link) < OTHERS:
        return 0.0
    slower = (math.log(seconds - claimed) - link.median()) / max(link.spread(), LEAST_SPREAD)
    if slower < 1.0:
        return 0.0
    usual = step.median() - 0.5 * log_power(columns["cpu_count"].item(row), columns["gpu_count"].item(row))
    faster = (usual - math.log(claimed / steps)) / max(step.spread(), LEAST_SPREAD)
    if faster < 1.0:
        return 0.0
    return min(math.sqrt((faster * faster + slower * slower) / 2.0), 6.0)


def _elasticity(
    fleet: Fleet, row: int, count: int, log_claimed: float, log_seconds: float
) -> tuple[float, float, float]:
    """Takes in the changes of both logarithms since the task before.

    Returns by how much the elasticity exceeds the share of computing in the same tasks, by how much it would if all of
    their seconds were computing, and the standard error of both.
    """
    columns = fleet.columns
    last, clock = columns["claim_last"].item(row), columns["claim_clock"].item(row)
    share = (math.exp(last - clock) + math.exp(log_claimed - log_seconds)) / 2.0
    x, y = log_claimed - last, log_seconds - clock
    shrink = min(1.0, REACH / max(abs(x), abs(y), 1e-9))
    x, y = x * shrink, y * shrink
    gain = max(1.0 / count, MEMORY)
    moments = []
    for name, value in zip(_MOMENTS, (x * x, x * y, y * y, share * x * x), strict=True):
        before = columns[name].item(row)
        moments.append(before + gain * (value - before))
        columns[name][row] = moments[-1]
    squares, products, total, honest = moments
    pairs = min(count, PAIRS)
    if pairs < 3 or squares < 1e-6:
        return 0.0, 0.0, math.inf
    rest = max(total - products * products / squares, 0.0) + 0.02**2
    # Successive changes share a task, so both series have an autocorrelation of -1/2: half as much variance again.
    error = math.sqrt(1.5 * rest / (squares * (pairs - 1.0)))
    return (products - honest) / squares, 1.0 - honest / squares, error


def claims_power(fleet: Fleet, row: int) -> bool:
    """Whether the processors in a device's profile promise far more speed than its own times show.

    Not said of a device of which only the clock is believed: its times are not those of its processors alone.
    """
    columns, usual = fleet.columns, fleet.usual["power"]
    cpus = columns["cpu_count"].item(row)
    few = columns["step_count"].item(row) < CLAIMS or len(usual) < OTHERS
    if few or not cpus >= 1.0 or columns["clock_only"].item(row):
        return False
    excess = columns["step_mean"].item(row) + log_power(cpus, columns["gpu_count"].item(row)) - usual.median()
    limit: float = max(3.0 * usual.spread(), POWER_GAP)
    return bool(excess > (0.7 * limit if columns["overstates"].item(row) else limit))
