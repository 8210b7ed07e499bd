"""QSGD: random rounding to few levels, most of them zero."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from fedpace.errors import ConfigError, PayloadError
from fedpace.protocol.codecs.bits import pack, packed_bytes, read_indices, write_indices
from fedpace.protocol.codecs.codec import BLOCK, Buffer, Coder, Context, Sparse, Values, Vector
from fedpace.protocol.codecs.reader import Reader, varint
from fedpace.protocol.codecs.scaled import (
    Codes,
    ScaledValues,
    check_chunk,
    inverse,
    magnitudes,
    quantised,
    read_chunk,
    read_steps,
    rounded,
    step_table,
)

_LEVELS = {1: 2, 7: 4, 127: 8}  # highest number of levels on either side of zero: bits


class SparseScaledValues(Values):
    """The few codes that are not zero."""

    def __init__(self, size: int, indices: NDArray[np.int64], numbers: Vector, peak: float) -> None:
        self.size = size
        self.peak = peak
        self._indices = indices
        self._numbers = numbers

    def sparse(self) -> Sparse:
        return self._indices, self._numbers

    def blocks(self, weight: float = 1.0) -> Iterator[tuple[int, Vector]]:
        starts = range(0, self.size, BLOCK)
        bounds = np.searchsorted(self._indices, [*starts, self.size])
        for place, start in enumerate(starts):
            here = slice(bounds[place], bounds[place + 1])
            block = np.zeros(min(BLOCK, self.size - start), np.float32)
            block[self._indices[here] - start] = self._numbers[here] * np.float32(weight)
            yield start, block


@dataclass(frozen=True)
class QSGD(Coder):
    """Random rounding to `levels` (1 to 127) steps of the Euclidean norm of every `chunk` of numbers: unbiased.

    Alistarh et al., QSGD (NeurIPS 2017), section 3.1, with their buckets: with c numbers in a chunk and s levels,
    E|x - decoded|^2 <= min(c / 4s^2, sqrt(c) / s) |x|^2. Few levels make most numbers zero, and then only the others
    are written. Chunks whose largest magnitude is below 2**-100 are zero.
    """

    levels: int
    chunk: int = 512

    code: ClassVar[int] = 19
    name: ClassVar[str] = "qsgd"

    def __post_init__(self) -> None:
        if not 1 <= self.levels <= 127:
            raise ConfigError(f"qsgd takes 1 to 127 levels, not {self.levels}")
        check_chunk(self.chunk)

    @property
    def width(self) -> int:
        """Bits a number takes where all are written."""
        return next(bits for levels, bits in _LEVELS.items() if self.levels <= levels)

    @property
    def unbiased(self) -> bool:
        return True

    def error_bound(self, size: int) -> float:
        chunk = max(1, min(self.chunk, size))
        return min(chunk / (2 * self.levels) ** 2, math.sqrt(chunk) / self.levels)

    def pack(self) -> bytes:
        return bytes([self.levels, self.chunk.bit_length() - 1])

    @classmethod
    def unpack(cls, reader: Reader) -> Self:
        return cls(reader.byte("the levels of qsgd"), read_chunk(reader))

    def write(self, values: Vector, context: Context) -> list[Buffer]:
        random = context.generator(self.code)

        def rule(rows: Vector) -> tuple[Vector, Codes]:
            scales = _norms(rows)
            return scales, rounded(rows * inverse(scales, self.levels)[:, None], self.levels, self.width, random)

        scales, codes = quantised(values, self.chunk, rule, 8)  # a byte each: which are zero is not known yet
        few = self._few(codes)
        if few is not None:
            return [scales.data, b"\1", *few]
        return [scales.data, b"\0", pack(codes, self.width).data]

    def _few(self, codes: Codes) -> list[Buffer] | None:
        """Only the codes that are not zero, where that is shorter and they are few enough to be found quickly."""
        zero = 1 << self.width - 1
        chosen = codes != zero
        count = int(np.count_nonzero(chosen))
        width = 1 if self.levels == 1 else self.width
        if 4 * count > codes.size:
            return None
        indices = np.flatnonzero(chosen)
        kept = codes[indices]
        if width == 1:
            kept = (kept > zero).astype(np.uint8)
        found: list[Buffer] = [varint(count), *write_indices(indices), pack(kept, width).data]
        return found if sum(map(len, found)) < packed_bytes(codes.size, self.width) else None

    def open(self, reader: Reader, size: int) -> Values:
        steps = read_steps(reader, -(-size // self.chunk), self.levels)
        form = reader.byte("the form of qsgd")
        if form > 1:
            raise PayloadError(f"qsgd has no form {form}")
        if form == 0:
            codes = reader.take(packed_bytes(size, self.width), "the codes")
            return ScaledValues(codes, size, steps, self.chunk, self.width)
        count = reader.varint("the number of codes")
        indices = read_indices(reader, count, size)
        width = 1 if self.levels == 1 else self.width
        table = step_table(width)
        codes = reader.take(packed_bytes(count, width), "the codes")
        numbers = table.take(np.frombuffer(codes, np.uint8), axis=0).reshape(-1)[:count]
        numbers *= steps[indices // self.chunk]
        peak = float(steps.max(initial=0)) * float(np.abs(table).max())
        return SparseScaledValues(size, indices, numbers, peak)


def _norms(rows: Vector) -> Vector:
    """The Euclidean norm of every row, without overflow; 0 where the largest magnitude has no inverse."""
    largest = magnitudes(rows)
    scaled = rows * inverse(largest, 1)[:, None]
    norms: Vector = largest * np.sqrt(np.einsum("ij,ij->i", scaled, scaled))
    return norms
