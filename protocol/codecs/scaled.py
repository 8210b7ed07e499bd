"""Numbers as small integers times the scale of their chunk: 8, 4 or 1 bit, and signs with a norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from fedpace.errors import ConfigError, PayloadError
from fedpace.protocol.codecs.bits import pack, packed_bytes
from fedpace.protocol.codecs.codec import BLOCK, LIMIT, Buffer, Coder, Context, Values, Vector
from fedpace.protocol.codecs.reader import Reader

Rounding = Literal["nearest", "stochastic"]
_ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)
_BITS = (8, 4, 1)
_STOCHASTIC = 0x80  # beside the bits, in their byte
_CHUNKS = (32, BLOCK)
_TINY = 2.0**-100  # the inverse of a smaller scale is no float32
_LARGEST = LIMIT / 128  # so that no code times it overflows
Codes = NDArray[np.uint8]
Rule = Callable[[Vector], tuple[Vector, Codes]]  # of rows, shape (chunks, length): their scales, codes of all numbers


def check_chunk(chunk: int) -> None:
    if chunk.bit_count() != 1 or not _CHUNKS[0] <= chunk <= _CHUNKS[1]:
        raise ConfigError(f"a chunk of {chunk} numbers; it is a power of two from {_CHUNKS[0]} to {_CHUNKS[1]}")


def read_chunk(reader: Reader) -> int:
    exponent = reader.byte("the length of a chunk")
    if exponent > 16:
        raise PayloadError(f"a chunk of 2**{exponent} numbers; it has 2**16 at most")
    return 1 << exponent


def _spans(size: int, chunk: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of blocks of whole chunks, then of the last chunk where it is shorter."""
    whole = size - size % chunk
    for start in range(0, whole, BLOCK):
        yield start, min(start + BLOCK, whole)
    if whole < size:
        yield whole, size


def quantised(values: Vector, chunk: int, rule: Rule, width: int) -> tuple[Vector, Codes]:
    """The scales, and the codes packed; `width` 8 leaves them as they are."""
    scales = np.empty(-(-values.size // chunk), "<f4")
    codes = np.empty(packed_bytes(values.size, width), np.uint8)
    for start, stop in _spans(values.size, chunk):
        first = start // chunk
        found, part = rule(values[start:stop].reshape(-1, min(chunk, stop - start)))
        scales[first : first + found.size] = found
        packed = pack(part, width)
        codes[start * width // 8 :][: packed.size] = packed
    return scales, codes


def magnitudes(rows: Vector) -> Vector:
    """The largest magnitude of every row; 0 where it is too small to have an inverse."""
    found: Vector = np.abs(rows).max(axis=1)
    found *= found >= _TINY
    return found


def inverse(scales: Vector, levels: float) -> Vector:
    return np.divide(np.float32(levels), scales, out=np.zeros_like(scales), where=scales > 0)


def rounded(scaled: Vector, levels: int, width: int, random: np.random.Generator | None) -> Codes:
    """Codes of the whole numbers, from -levels to levels, nearest to `scaled`, or random and right on average."""
    if random is None:
        np.rint(scaled, out=scaled)
    else:
        scaled += random.random(scaled.shape, dtype=np.float32)
        np.floor(scaled, out=scaled)
        np.clip(scaled, -levels, levels, out=scaled)
    scaled += np.float32(1 << width - 1)
    return scaled.astype(np.uint8).ravel()


def step_table(width: int) -> Vector:
    """What a byte of codes stands for, in steps of its chunk: float32, shape (256, codes a byte)."""
    steps = np.array([-1, 1]) if width == 1 else np.arange(1 << width) - (1 << width - 1)
    places = np.arange(256)[:, None] >> np.arange(0, 8, width) & (1 << width) - 1
    table: Vector = steps.astype(np.float32)[places]
    return table


def read_steps(reader: Reader, count: int, levels: int) -> Vector:
    """`count` scales, each over the number of levels: the length of a step. Raises PayloadError for one that is none."""
    found = reader.floats(count, "the scales")
    if not ((found >= 0) & (found <= _LARGEST)).all():
        raise PayloadError("the frame holds a scale that is negative, not finite, or beyond 2**119")
    return found / np.float32(levels)


class ScaledValues(Values):
    """Codes of 1, 2, 4 or 8 bits in place, and the length of a step in every chunk."""

    def __init__(self, codes: memoryview, size: int, steps: Vector, chunk: int, width: int) -> None:
        self.size = size
        self._codes = np.frombuffer(codes, np.uint8)
        self._steps = steps
        self._chunk = chunk
        self._width = width
        self._table = step_table(width)
        self.peak = float(steps.max(initial=0)) * float(np.abs(self._table).max())

    def blocks(self, weight: float = 1.0) -> Iterator[tuple[int, Vector]]:
        chunk, width = self._chunk, self._width
        for start, stop in _spans(self.size, chunk):
            packed = self._codes[start * width // 8 : packed_bytes(stop, width)]
            if width == 8:  # a code is 128 more than the number of steps
                block = np.bitwise_xor(packed, 128).view(np.int8).astype(np.float32)
            else:
                block = self._table.take(packed, axis=0).reshape(-1)[: stop - start]
            steps = self._steps[start // chunk : -(-stop // chunk)] * np.float32(weight)
            rows = block.reshape(steps.size, -1)
            rows *= steps[:, None]
            yield start, block


@dataclass(frozen=True)
class Quantise(Coder):
    """8, 4 or 1 bit a number, and a float32 scale for every `chunk` of them (a power of two from 32 to 65,536).

    With 8 and 4 bits the scale s is the largest magnitude of the chunk, in L = 127 or 7 steps to either side of zero:
    `nearest` has |x - decoded| <= s / 2L and never more than |x|, so it is contractive; `stochastic` has at most s / L
    and is unbiased. With 1 bit, `nearest` is the sign times the mean magnitude of the chunk (contractive), and
    `stochastic` -s or s at random, right on average (unbiased, with a large variance).
    Chunks whose largest magnitude is below 2**-100 are zero, except with 1 bit `nearest`.
    """

    bits: int = 8
    rounding: Rounding = "nearest"
    chunk: int = 1024

    code: ClassVar[int] = 18
    name: ClassVar[str] = "quantise"

    def __post_init__(self) -> None:
        if self.bits not in _BITS:
            raise ConfigError(f"quantise takes 8, 4 or 1 bits, not {self.bits}")
        if self.rounding not in _ROUNDINGS:
            raise ConfigError(f"quantise rounds {' or '.join(_ROUNDINGS)}, not {self.rounding!r}")
        check_chunk(self.chunk)

    @property
    def levels(self) -> int:
        return max(1, (1 << self.bits - 1) - 1)

    @property
    def unbiased(self) -> bool:
        return self.rounding == "stochastic"

    def error_bound(self, size: int) -> float:
        chunk = max(1, min(self.chunk, size))
        if self.bits == 1:
            return chunk - 1 if self.unbiased else 1 - 1 / chunk
        return min(chunk / (2 * self.levels) ** 2, math.sqrt(chunk) / self.levels if self.unbiased else 1 - 1 / chunk)

    def pack(self) -> bytes:
        return bytes([self.bits | (_STOCHASTIC if self.unbiased else 0), self.chunk.bit_length() - 1])

    @classmethod
    def unpack(cls, reader: Reader) -> Self:
        bits = reader.byte("the bits of quantise")
        rounding = _ROUNDINGS[bits >= _STOCHASTIC]
        return cls(bits & ~_STOCHASTIC, rounding, read_chunk(reader))

    def write(self, values: Vector, context: Context) -> list[Buffer]:
        random = context.generator(self.code) if self.unbiased else None

        def rule(rows: Vector) -> tuple[Vector, Codes]:
            if self.bits == 1 and random is None:
                return np.abs(rows).mean(axis=1), (rows >= 0).astype(np.uint8).ravel()
            scales = magnitudes(rows)
            if self.bits == 1 and random is not None:
                chances = rows * inverse(scales, 0.5)[:, None] + np.float32(0.5)
                return scales, (random.random(rows.shape, dtype=np.float32) < chances).astype(np.uint8).ravel()
            return scales, rounded(rows * inverse(scales, self.levels)[:, None], self.levels, self.bits, random)

        scales, codes = quantised(values, self.chunk, rule, self.bits)
        return [scales.data, codes.data]

    def open(self, reader: Reader, size: int) -> Values:
        steps = read_steps(reader, -(-size // self.chunk), self.levels)
        codes = reader.take(packed_bytes(size, self.bits), "the codes")
        return ScaledValues(codes, size, steps, self.chunk, self.bits)


@dataclass(frozen=True)
class Sign(Coder):
    """One bit a number, and one norm: the sign times |x|_1 / n.

    Karimireddy et al., Error Feedback Fixes SignSGD (ICML 2019): |x - decoded|^2 = |x|^2 - |x|_1^2 / n, so contractive.
    """

    code: ClassVar[int] = 20
    name: ClassVar[str] = "sign"

    def error_bound(self, size: int) -> float:
        return 1 - 1 / max(1, size)

    def write(self, values: Vector, context: Context) -> list[Buffer]:
        blocks = [values[start : start + BLOCK] for start in range(0, values.size, BLOCK)]
        total = sum(float(np.abs(block).sum(dtype=np.float64)) for block in blocks)
        scale = np.array([total / max(1, values.size)], "<f4")
        return [scale.data, *(pack((block >= 0).view(np.uint8), 1).data for block in blocks)]

    def open(self, reader: Reader, size: int) -> Values:
        steps = read_steps(reader, 1, 1).repeat(-(-size // BLOCK))
        return ScaledValues(reader.take(packed_bytes(size, 1), "the signs"), size, steps, BLOCK, 1)
