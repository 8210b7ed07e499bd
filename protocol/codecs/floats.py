"""Numbers as floating-point ones: float32 as they are, float16 or bfloat16."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from fedpace.errors import ConfigError, PayloadError
from fedpace.protocol.codecs.codec import BLOCK, Buffer, Coder, Context, Values, Vector
from fedpace.protocol.codecs.reader import Reader

Format = Literal["float16", "bfloat16"]
_FORMATS: tuple[Format, ...] = get_args(Format)
_SHIFT = 112  # 2**112 and its inverse are float32
_TOP = 15  # the exponent of the largest number in a float16 frame: 2**15 <= 65504


def peak_of(vector: Vector) -> float:
    """The largest magnitude in the vector, 0 where it is empty, NaN where it holds one."""
    found = [
        abs(float(extreme))
        for start in range(0, vector.size, BLOCK)
        for extreme in (vector[start : start + BLOCK].min(), vector[start : start + BLOCK].max())
    ]
    return float(np.max(found)) if found else 0.0


@dataclass(frozen=True)
class Raw(Coder):
    """The numbers as float32, exactly: `decoded == x`."""

    code: ClassVar[int] = 16
    name: ClassVar[str] = "raw"
    numberwise: ClassVar[bool] = True

    @property
    def unbiased(self) -> bool:
        return True

    def error_bound(self, size: int) -> float:
        return 0.0

    def write(self, values: Vector, context: Context) -> list[Buffer]:
        return [values.astype("<f4", copy=False).data]

    def open(self, reader: Reader, size: int) -> Values:
        return RawValues(reader.floats(size, "the numbers"))


class RawValues(Values):
    """float32 in place."""

    def __init__(self, data: Vector) -> None:
        self.size = data.size
        self.peak = peak_of(data)
        self._data = data

    def blocks(self, weight: float = 1.0) -> Iterator[tuple[int, Vector]]:
        scratch = np.empty(min(BLOCK, self.size), np.float32)
        for start in range(0, self.size, BLOCK):
            block = self._data[start : start + BLOCK]
            yield start, block if weight == 1 else np.multiply(block, np.float32(weight), out=scratch[: block.size])


@dataclass(frozen=True)
class Half(Coder):
    """Two bytes a number, rounded to nearest: contractive, and nearly exact.

    `bfloat16`: |x - decoded| <= 2**-8 |x| for |x| >= 2**-126. `float16`, whose numbers are scaled by a power of two so
    that the largest magnitude m fits: |x - decoded| <= 2**-11 |x|, or 2**-39 m where that is more.
    """

    format: Format = "float16"

    code: ClassVar[int] = 17
    name: ClassVar[str] = "half"
    numberwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.format not in _FORMATS:
            raise ConfigError(f"half knows {' and '.join(_FORMATS)}, not {self.format!r}")

    def error_bound(self, size: int) -> float:
        return 2.0**-22 + size * 2.0**-78 if self.format == "float16" else 2.0**-16

    def pack(self) -> bytes:
        return bytes([_FORMATS.index(self.format)])

    @classmethod
    def unpack(cls, reader: Reader) -> Self:
        number = reader.byte("the format of half")
        if number >= len(_FORMATS):
            raise PayloadError(f"half has no format {number}")
        return cls(_FORMATS[number])

    def write(self, values: Vector, context: Context) -> list[Buffer]:
        found = np.empty(values.size, "<u2")
        if self.format == "bfloat16":
            for start in range(0, values.size, BLOCK):
                bits = values[start : start + BLOCK].view(np.uint32)
                found[start : start + BLOCK] = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
            return [found.data]
        peak = peak_of(values)
        shift = max(-_SHIFT, math.frexp(peak)[1] - _TOP)
        factor = np.float32(2.0**-shift)
        for start in range(0, values.size, BLOCK):
            scaled = values[start : start + BLOCK] * factor
            found[start : start + BLOCK] = scaled.astype(np.float16).view(np.uint16)
        return [shift.to_bytes(1, "little", signed=True), found.data]

    def open(self, reader: Reader, size: int) -> Values:
        shift = 0
        if self.format == "float16":
            shift = int.from_bytes(reader.take(1, "the exponent of half"), "little", signed=True)
            if abs(shift) > _SHIFT:
                raise PayloadError(f"the exponent of half is {shift}; it is {_SHIFT} at most")
        data = np.frombuffer(reader.take(2 * size, "the numbers"), "<u2").view(np.uint16)
        return HalfValues(data, shift, self.format)


class HalfValues(Values):
    """float16 x 2**shift, or bfloat16, in place."""

    def __init__(self, data: NDArray[np.uint16], shift: int, form: Format) -> None:
        self.size = data.size
        self._data = data
        self._float16 = form == "float16"
        self._scale = 2.0**shift
        highest = max((int((data[at : at + BLOCK] & 0x7FFF).max()) for at in range(0, data.size, BLOCK)), default=0)
        self.peak = float(self._floats(np.array([highest], np.uint16))[0]) * self._scale  # magnitudes sort as integers

    def _floats(self, data: NDArray[np.uint16]) -> Vector:
        if self._float16:
            return data.view(np.float16).astype(np.float32)
        return (data.astype(np.uint32) << 16).view(np.float32)

    def blocks(self, weight: float = 1.0) -> Iterator[tuple[int, Vector]]:
        factor = np.float32(weight * self._scale)
        for start in range(0, self.size, BLOCK):
            block = self._floats(self._data[start : start + BLOCK])
            if factor != 1:
                block *= factor
            yield start, block
