"""A few of the numbers: the largest ones, or random ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from fedpace.errors import ConfigError, PayloadError
from fedpace.protocol.codecs.bits import read_indices, write_indices
from fedpace.protocol.codecs.codec import (
    BLOCK,
    LIMIT,
    Buffer,
    Coder,
    Context,
    Layout,
    Reducer,
    Sparse,
    Total,
    Values,
    Vector,
    add_sparse,
)
from fedpace.protocol.codecs.reader import Reader, float32

_SAMPLE = 1 << 16
_SEED_BYTES = 4


class SparseLayout(Layout):
    """Numbers that belong at `indices` (int64, rising)."""

    def __init__(self, indices: NDArray[np.int64]) -> None:
        self.count = indices.size
        self._indices = indices

    def sparse(self, values: Values) -> Sparse:
        return self._indices, values.all()

    def add_to(self, total: Total, values: Values, weight: float) -> None:
        add_sparse(total, self.sparse(values), weight)


@dataclass(frozen=True)
class _Fraction(Reducer):
    """Keeps `fraction` of the numbers, rounded to nearest, at least one."""

    fraction: float

    def __post_init__(self) -> None:
        fraction = float(str(np.float32(self.fraction)))  # a frame has it as float32, and both sides count with it
        if not 0 < fraction <= 1:
            raise ConfigError(f"{self.name} keeps a fraction above 0 and at most 1, not {self.fraction}")
        object.__setattr__(self, "fraction", fraction)

    def kept(self, size: int) -> int:
        """How many of `size` numbers are kept."""
        return min(size, max(1, round(self.fraction * size)))

    def pack(self) -> bytes:
        return float32(self.fraction)

    def chained_bound(self, size: int, coder: Coder) -> float:
        """What is dropped and what the coder does to the rest are orthogonal."""
        own, then = self.error_bound(size), coder.error_bound(self.kept(size))
        return own + then * (1 - own) if then <= 1 else then


@dataclass(frozen=True)
class TopK(_Fraction):
    """The numbers of largest magnitude, exactly k of n; of equal ones the first. |x - decoded|^2 <= (1 - k/n) |x|^2."""

    code: ClassVar[int] = 1
    name: ClassVar[str] = "topk"

    def error_bound(self, size: int) -> float:
        return 1 - self.kept(size) / max(1, size)

    @classmethod
    def unpack(cls, reader: Reader) -> Self:
        return cls(reader.float32("the fraction of topk"))

    def reduce(self, vector: Vector, context: Context) -> tuple[list[Buffer], Vector]:
        indices = largest(vector, self.kept(vector.size))
        return write_indices(indices), vector[indices]

    def open(self, reader: Reader, size: int) -> Layout:
        return SparseLayout(read_indices(reader, self.kept(size), size))


def largest(vector: Vector, count: int) -> NDArray[np.int64]:
    """Where the `count` numbers of largest magnitude are, rising; of equal ones the first. Reads the vector twice.

    A sample says which numbers may be among them, and only those are compared.
    """
    if count >= vector.size:
        return np.arange(vector.size)
    sample = np.abs(vector[:: max(1, vector.size // _SAMPLE)])
    expected = count / vector.size * sample.size
    rank = math.ceil(expected + 4 * math.sqrt(expected) + 4)
    while True:
        threshold = float(np.partition(sample, -rank)[-rank]) if rank < sample.size else 0.0
        candidates = _at_least(vector, threshold)
        if candidates.size >= count:
            break
        rank *= 4  # the sample was not like the rest
    magnitudes = np.abs(vector[candidates])
    lowest = np.partition(magnitudes, -count)[-count]
    chosen = magnitudes > lowest
    ties = np.flatnonzero(magnitudes == lowest)
    chosen[ties[: count - np.count_nonzero(chosen)]] = True
    found: NDArray[np.int64] = candidates[chosen]
    return found


def _at_least(vector: Vector, threshold: float) -> NDArray[np.int64]:
    starts = range(0, vector.size, BLOCK)
    found = [np.flatnonzero(np.abs(vector[start : start + BLOCK]) >= np.float32(threshold)) for start in starts]
    return np.concatenate([part + start for part, start in zip(found, starts, strict=True)])


@dataclass(frozen=True)
class RandomK(_Fraction):
    """Random numbers, k of n: one of each of k strata, runs of n/k numbers whose lengths differ by one at most.

    Where they are follows from a seed in the frame. `scaled=True` multiplies each by the length of its stratum:
    unbiased, E|x - decoded|^2 <= (ceil(n/k) - 1) |x|^2. `scaled=False` leaves them: contractive,
    E|x - decoded|^2 <= (1 - 1 / ceil(n/k)) |x|^2.
    """

    scaled: bool = False

    code: ClassVar[int] = 2
    name: ClassVar[str] = "randomk"

    @property
    def unbiased(self) -> bool:
        return self.scaled

    def error_bound(self, size: int) -> float:
        longest = -(-max(1, size) // max(1, self.kept(size)))
        return longest - 1 if self.scaled else 1 - 1 / longest

    def chained_bound(self, size: int, coder: Coder) -> float:
        if not self.scaled:
            return super().chained_bound(size, coder)
        if not coder.unbiased:
            return math.inf
        return (1 + self.error_bound(size)) * (1 + coder.error_bound(self.kept(size))) - 1

    def pack(self) -> bytes:
        return super().pack() + bytes([self.scaled])

    @classmethod
    def unpack(cls, reader: Reader) -> Self:
        fraction, scaled = reader.float32("the fraction of randomk"), reader.byte("the scaling of randomk")
        if scaled > 1:
            raise PayloadError(f"the scaling of randomk is {scaled}; it is 0 or 1")
        return cls(fraction, bool(scaled))

    def reduce(self, vector: Vector, context: Context) -> tuple[list[Buffer], Vector]:
        seed = context.generator(self.code).integers(1 << 32, dtype=np.uint32)
        indices, _ = _strata(int(seed), self.kept(vector.size), vector.size)
        return [int(seed).to_bytes(_SEED_BYTES, "little")], vector[indices]

    def open(self, reader: Reader, size: int) -> Layout:
        seed = int.from_bytes(reader.take(_SEED_BYTES, "the seed of randomk"), "little")
        return RandomLayout(seed, self.kept(size), size, self.scaled)


class RandomLayout(Layout):
    """Numbers whose places are drawn when they are asked for, once the frame is known to hold as many."""

    def __init__(self, seed: int, count: int, size: int, scaled: bool) -> None:
        self.count = count
        self._seed = seed
        self._size = size
        self._scaled = scaled

    def check(self, values: Values) -> None:
        if self._scaled and values.peak * self._size > LIMIT * self.count:
            raise PayloadError("the frame holds a number that is not finite, or beyond 2**126, once it is scaled")

    def sparse(self, values: Values) -> Sparse:
        indices, lengths = _strata(self._seed, self.count, self._size)
        numbers = values.all()
        if self._scaled:
            numbers *= lengths
        return indices, numbers

    def add_to(self, total: Total, values: Values, weight: float) -> None:
        add_sparse(total, self.sparse(values), weight)


def _strata(seed: int, count: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """One index in each of `count` strata of a vector of `size` numbers, and the lengths of the strata.

    Stratum i has the numbers from floor(i n / k) on. The draw is the i-th of SplitMix64 (Steele et al., OOPSLA 2014)
    with this seed: integers alone, so the same on every machine.
    """
    draws = np.arange(count, dtype=np.uint64)
    draws += np.uint64(1)
    draws *= np.uint64(0x9E3779B97F4A7C15)
    draws += np.uint64(seed)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        draws ^= draws >> np.uint64(shift)
        draws *= np.uint64(factor)
    draws ^= draws >> np.uint64(31)
    bounds = np.arange(count + 1, dtype=np.int64) * size // max(1, count)
    lengths = np.diff(bounds)
    offsets = (draws >> np.uint64(32)).astype(np.int64) * lengths >> 32
    return bounds[:-1] + offsets, lengths
