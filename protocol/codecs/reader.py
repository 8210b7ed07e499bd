"""Reads a frame from front to back and never past its end."""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from fedpace.errors import PayloadError

_VARINT_BYTES = 9
_FLOAT32 = struct.Struct("<f")


class Reader:
    """A place in the bytes of a frame. Every method raises PayloadError where they end too soon."""

    def __init__(self, view: bytes | memoryview) -> None:
        flat = memoryview(view)
        if not flat.c_contiguous:
            raise PayloadError("a frame is to be contiguous bytes; copy them first")
        self._view = flat.cast("B") if flat.nbytes else memoryview(b"")
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self._view) - self._at

    def take(self, count: int, what: str) -> memoryview:
        """The next `count` bytes, without copying them."""
        if count > self.left:
            raise PayloadError(f"the frame ends at {what}: {count} bytes are needed, {self.left} are left")
        self._at += count
        return self._view[self._at - count : self._at]

    def byte(self, what: str) -> int:
        return self.take(1, what)[0]

    def float32(self, what: str) -> float:
        return float(_FLOAT32.unpack(self.take(_FLOAT32.size, what))[0])

    def varint(self, what: str) -> int:
        """An unsigned integer below 2**63: seven bits a byte, lowest first, the eighth says that more follow."""
        value = 0
        for position in range(_VARINT_BYTES):
            byte = self.byte(what)
            value |= (byte & 0x7F) << (7 * position)
            if byte < 0x80:
                return value
        raise PayloadError(f"{what} is a number of more than {_VARINT_BYTES} bytes")

    def floats(self, count: int, what: str) -> NDArray[np.float32]:
        """`count` float32 in place, shape (count,); they may be anything."""
        return np.frombuffer(self.take(4 * count, what), dtype="<f4").view(np.float32)


def varint(value: int) -> bytes:
    """What `Reader.varint` reads; `value` is not negative."""
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def float32(value: float) -> bytes:
    """What `Reader.float32` reads."""
    return _FLOAT32.pack(value)
