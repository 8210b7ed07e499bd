"""Small integers as bits: codes of 1, 2, 4 or 8 bits, and rising indices as Rice codes of their gaps."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpace.errors import PayloadError
from fedpace.protocol.codecs.codec import Buffer
from fedpace.protocol.codecs.reader import Reader, varint

_BLOCK = 1 << 15
_MAX_PARAMETER = 31


def packed_bytes(count: int, width: int) -> int:
    """How many bytes `count` numbers of `width` bits take."""
    return (count * width + 7) // 8


def pack(codes: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """Codes below 2**width, width 1, 2, 4 or 8, lowest bits first; the last byte is filled up with zeros."""
    if width == 8:
        return codes
    if width == 1:
        return np.packbits(codes, bitorder="little")
    per_byte = 8 // width
    if spare := -codes.size % per_byte:
        codes = np.concatenate([codes, np.zeros(spare, np.uint8)])
    words = codes.view(f"<u{per_byte}")
    found = words.copy()
    for place in range(1, per_byte):
        found |= words >> ((8 - width) * place)
    return found.astype(np.uint8)


def pack_numbers(numbers: NDArray[np.int64], width: int) -> bytes:
    """Numbers below 2**width, width up to 31, lowest bits first."""
    bits = np.arange(width, dtype=np.uint32)
    parts = [
        np.packbits((block[:, None] >> bits & 1).astype(np.uint8), bitorder="little")
        for block in np.split(numbers.astype(np.uint32), range(_BLOCK, numbers.size, _BLOCK))
    ]
    return b"".join(part.tobytes() for part in parts)


def unpack_numbers(view: memoryview, count: int, width: int) -> NDArray[np.int64]:
    """The inverse of `pack_numbers`, from exactly its bytes."""
    found = np.zeros(count, np.int64)
    data = np.frombuffer(view, np.uint8)
    for start in range(0, count if width else 0, _BLOCK):
        size = min(_BLOCK, count - start)
        part = data[start // 8 * width :]
        bits = np.unpackbits(part[: packed_bytes(size, width)], count=size * width, bitorder="little")
        rows = bits.reshape(size, width)
        block = found[start : start + size]
        for place in range(width):
            block |= rows[:, place].astype(np.int64) << place
    return found


def write_indices(indices: NDArray[np.int64]) -> list[Buffer]:
    """Strictly rising indices, shape (k,), as Rice codes of their gaps.

    A gap g is (index - one before - 1). With the parameter b that makes the frame smallest, its low b bits are packed
    one after the other; g >> b is written in unary, that many zeros and a one.
    """
    if not indices.size:
        return [b"\0", varint(0)]
    gaps = np.diff(indices, prepend=-1) - 1
    parameter = _parameter(gaps)
    ends = np.cumsum((gaps >> parameter) + 1)
    unary = np.zeros(int(ends[-1]), np.uint8)
    unary[ends - 1] = 1
    packed = np.packbits(unary, bitorder="little")
    low = pack_numbers(gaps & ((1 << parameter) - 1), parameter)
    return [bytes([parameter]), varint(packed.size), low, packed.data]


def _parameter(gaps: NDArray[np.int64]) -> int:
    """The one that takes the fewest bits: from above, down for as long as they get fewer."""
    best = min(_MAX_PARAMETER, int(gaps.mean()).bit_length())
    fewest = gaps.size * (best + 1) + int((gaps >> best).sum())
    while best and (bits := gaps.size * best + int((gaps >> best - 1).sum())) <= fewest:
        best, fewest = best - 1, bits
    return best


def read_indices(reader: Reader, count: int, size: int) -> NDArray[np.int64]:
    """`count` strictly rising indices below `size`, int64, shape (count,).

    Raises PayloadError where there are fewer or more, or one is out of range, before memory is taken for them.
    """
    parameter = reader.byte("the parameter of the indices")
    length = reader.varint("the length of the indices")
    if parameter > _MAX_PARAMETER:
        raise PayloadError(f"the indices have the parameter {parameter}; it is {_MAX_PARAMETER} at most")
    if length > reader.left or 8 * length < count or 8 * length >= count + (size >> parameter) + 8:
        raise PayloadError(f"{count} indices below {size} with parameter {parameter} do not take {length} bytes")
    low = reader.take(packed_bytes(count, parameter), "the low bits of the indices")
    data = np.frombuffer(reader.take(length, "the indices"), np.uint8)
    ends = np.flatnonzero(np.unpackbits(data, bitorder="little").view(np.bool_))  # of which numpy counts faster
    if ends.size != count or 8 * length - (int(ends[-1]) + 1 if count else 0) >= 8:
        raise PayloadError(f"the frame holds {ends.size} indices in {length} bytes, where {count} are to be")
    gaps: NDArray[Any] = np.diff(ends, prepend=-1) - 1 << parameter
    gaps |= unpack_numbers(low, count, parameter)
    gaps += 1
    indices: NDArray[np.int64] = np.cumsum(gaps) - 1
    if count and indices[-1] >= size:
        raise PayloadError(f"the index {indices[-1]} is out of range: the vector has {size} numbers")
    return indices
