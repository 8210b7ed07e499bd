"""Counter-based randomness: a draw is a function of (seed, purpose, row, counter), whoever asks, and in whatever order.

Plain integers and numpy arrays give the same bits. What is drawn goes through tables of quantiles rather than through
`exp` and `log`, whose last bit differs between the standard library and numpy.

Mixing: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators" (OOPSLA 2014), the finaliser of SplitMix64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
Floats = NDArray[np.float64]

MASK = 0xFFFF_FFFF_FFFF_FFFF
ROW_STRIDE = 0xD1B5_4A32_D192_ED03
COUNTER_STRIDE = 0x8CB9_2BA7_2F3D_8DD7
GAMMA = 0x9E37_79B9_7F4A_7C15
"""Odd constants that keep the counters of rows, tasks and draws apart before they are mixed."""

UNIT = 2.0**-53
CELLS_BITS = 12
CELLS = 1 << CELLS_BITS
FRACTION_BITS = 32 - CELLS_BITS
FRACTION_MASK = (1 << FRACTION_BITS) - 1
FRACTION = 2.0**-FRACTION_BITS
_END = 1.0 / (8 * CELLS)


def elements(array: NDArray[Any]) -> memoryview[Any]:
    """The same memory with plain Python numbers as its elements: three times as fast to get at as those of an array."""
    return array.data


def mix(word: int) -> int:
    """64 well-mixed bits of `word`, which is taken modulo 2**64."""
    word &= MASK
    word = ((word ^ (word >> 30)) * 0xBF58_476D_1CE4_E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D0_49BB_1331_11EB) & MASK
    return word ^ (word >> 31)


def mix_many(words: Words) -> Words:
    """`mix` of every element."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    mixed: Words = words ^ (words >> np.uint64(31))
    return mixed


def uniform_many(words: Words) -> Floats:
    """Numbers from 0 to 1, 1 excluded, with 53 bits of each mixed element."""
    return (mix_many(words) >> np.uint64(11)).astype(np.float64) * UNIT


def counters(key: int, rows: NDArray[np.int64], counts: NDArray[np.int64] | int) -> Words:
    """What is mixed for each (row, count): `key + row * ROW_STRIDE + count * COUNTER_STRIDE`, modulo 2**64."""
    counted = np.asarray(counts).astype(np.uint64).reshape(-1) * np.uint64(COUNTER_STRIDE)
    words: Words = rows.astype(np.uint64) * np.uint64(ROW_STRIDE) + (counted + np.uint64(key))
    return words


def quantile_table(quantile: Callable[[float], float]) -> Floats:
    """Quantiles at 0, 1/4096, ..., 1. The two ends are those of 1/32,768 and its complement, 4 standard deviations out:
    the straight line between the last two then has nearly the mean of what it stands for."""
    knots = [min(max(index / CELLS, _END), 1.0 - _END) for index in range(CELLS + 1)]
    return np.array([quantile(knot) for knot in knots], dtype=np.float64)


def normal_table(sd: float) -> Floats:
    """1 + sd * z, and never less than 0.05."""
    normal = NormalDist()
    return quantile_table(lambda share: max(0.05, 1.0 + sd * normal.inv_cdf(share)))


def lognormal_table(median: float, sigma: float) -> Floats:
    """median * exp(sigma * z)."""
    normal = NormalDist()
    return quantile_table(lambda share: median * math.exp(sigma * normal.inv_cdf(share)))


def exponential_table() -> Floats:
    """Exponential times of mean 1."""
    return quantile_table(lambda share: -math.log1p(-share))


def table_mean(table: Floats) -> float:
    """Mean of what `look_up` returns for uniform bits."""
    return float((table[:-1] + table[1:]).sum() / (2 * CELLS))


def residual_table(table: Floats) -> Floats:
    """Quantiles of what is left of a length drawn from `table` when one looks in at a random moment.

    Its density at x is P(length > x) / mean: a renewal process that starts with it is stationary from the start.
    """
    shares = np.arange(CELLS + 1) / CELLS
    pieces = np.diff(table) * (1.0 - (shares[:-1] + shares[1:]) / 2)
    reached = np.concatenate(([0.0, table[0]], table[0] + np.cumsum(pieces)))
    lengths = np.concatenate(([0.0], table))
    residual: Floats = np.interp(shares, reached / reached[-1], lengths)
    return residual


def look_up(table: Sequence[float], bits: int) -> float:
    """The quantile that 32 uniform bits stand for, on a straight line between two entries."""
    cell = bits >> FRACTION_BITS
    low = table[cell]
    return low + (table[cell + 1] - low) * ((bits & FRACTION_MASK) * FRACTION)


def look_up_many(table: Floats, bits: Words, which: NDArray[Any] | None = None) -> Floats:
    """`look_up` of every element; in row `which` of a table of tables, if given."""
    cells = (bits >> np.uint64(FRACTION_BITS)).astype(np.intp)
    low = table[cells] if which is None else table[which, cells]
    high = table[cells + 1] if which is None else table[which, cells + 1]
    found: Floats = low + (high - low) * ((bits & np.uint64(FRACTION_MASK)).astype(np.float64) * FRACTION)
    return found
