"""What selectors share: drawing the best or by weight, expected durations, and checks of numbers.

Every function is linear in the devices shown, whatever the size of the fleet.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpace.errors import ConfigError
from fedpace.strategies.fleet import Floats, Rows
from fedpace.strategies.pace import task_seconds
from fedpace.strategies.parts import Context, Devices


def best(count: int, rng: np.random.Generator, *keys: NDArray[Any]) -> Rows:
    """Positions of the `count` smallest (all, if there are fewer), smallest first.

    The first key counts most, the next ones where it ties; what ties in all is drawn at random. No key holds NaN.
    """
    left = np.arange(len(keys[0]))
    taken: list[Rows] = []
    for key in keys:
        if count >= len(left) or count == 0:
            break
        values = key[left]
        bound = np.partition(values, count - 1)[count - 1]
        taken.append(left[values < bound])
        left = left[values == bound]
        count -= len(taken[-1])
    taken.append(left if count >= len(left) else rng.choice(left, count, replace=False))
    chosen = np.concatenate(taken)
    order = np.lexsort((rng.random(len(chosen)), *(key[chosen] for key in reversed(keys))))
    return chosen[order]


def by_weight(count: int, rng: np.random.Generator, weights: Floats) -> Rows:
    """Positions of `count` drawn without replacement, each next one in proportion to the weights of those left.

    By exponential keys (Efraimidis and Spirakis 2006, "Weighted random sampling with a reservoir", algorithm A-ES).
    Weights of 0, and those that are not finite, come last.
    """
    usable = np.where(np.isfinite(weights) & (weights > 0), weights, 0.0)
    with np.errstate(divide="ignore", over="ignore"):
        keys = rng.exponential(size=len(weights)) / usable
    return best(count, rng, keys)


def portion(count: int, share: float, rng: np.random.Generator) -> int:
    """How many of `count` a share of them is: rounded at random, so that it holds on average for a count of 1 too."""
    return min(count, int(count * share + rng.random()))


def best_and_waiting(devices: Devices, count: int, share: float, rng: np.random.Generator, *keys: NDArray[Any]) -> Rows:
    """Positions of the best by `keys`, beside a share of `count` for those that wait longest: new ones before all."""
    waiting = best(portion(count, share, rng), rng, devices.last_selected)
    others = all_but(waiting, len(devices))
    chosen = others[best(count - len(waiting), rng, *(key[others] for key in keys))]
    return np.concatenate([chosen, waiting])


def all_but(some: Rows, size: int) -> Rows:
    """The positions from 0 to `size` - 1 that are not among `some`, in order."""
    left = np.ones(size, dtype=bool)
    left[some] = False
    return np.flatnonzero(left)


def known(values: Floats, otherwise: float) -> Floats:
    """The values, with the median of the finite ones (`otherwise`, if there are none) in place of all others."""
    finite = np.isfinite(values)
    if finite.all():
        return values
    usual = float(np.median(values[finite])) if finite.any() else otherwise
    result: Floats = np.where(finite, values, usual)
    return result


def usual_steps(devices: Devices) -> Floats:
    """Local steps that each device's next task will have, from its last one; the median of the others for a new device.

    1 where an observed device does not say: its pace is then known in tasks, not in steps.
    """
    steps = np.where(devices.steps > 0, devices.steps, np.nan)
    result: Floats = np.where(devices.step_count > 0, np.where(np.isfinite(steps), steps, 1.0), known(steps, 1.0))
    return result


def expected_seconds(devices: Devices, context: Context) -> Floats:
    """Seconds that each device's next task is expected to take: from 1e-9 to 1e12.

    Where nothing is known of a device and its like it is the median of the others, and 1 where nothing is of any.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        seconds = task_seconds(context.fleet, devices.row, usual_steps(devices))
    return np.clip(known(seconds, 1.0), 1e-9, 1e12)


def check_range(part: object, name: str, low: float, high: float = math.inf) -> None:
    """Raises ConfigError where a number of a part is not from `low` to `high`, both included."""
    value = getattr(part, name)
    if not low <= value <= high or math.isinf(value):
        wanted = f"{low:g} or more" if math.isinf(high) else f"from {low:g} to {high:g}"
        raise ConfigError(f"{type(part).__name__}: {name} is {value}; choose {wanted}")
