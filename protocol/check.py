"""A reply is checked before anybody uses it: complete, of the shape and dtype that was sent out, finite.

What was sent decides: where the reply has an array of the same name in a record of the same name, and that array holds
floating-point numbers, shape and dtype must be those sent. Other arrays (masked integers, trees as bytes, arrays that
only go up) are free. Floating-point arrays must be finite in any case.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.lib import format as npy

from fedpace.errors import PayloadError
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.limits import CHUNK_BYTES
from fedpace.protocol.payloads import Get, array_offsets, blob_of, decode_head
from fedpace.protocol.values import decode_values

NUMPY = "numpy.ndarray"
"""Flower's `stype` of an array whose bytes are a .npy file."""

_METRICS = {"integer", "number", "big_integer", "integers", "numbers", "big_integers"}

Sent = Mapping[tuple[str, str], tuple[str, tuple[int, ...]]]
"""dtype and shape of each floating-point array that was sent, by the names of its record and itself."""


def sent_arrays(head: pb.Records) -> dict[tuple[str, str], tuple[str, tuple[int, ...]]]:
    """What a reply to a message with this head is held against."""
    return {
        (record.name, array.name): (array.dtype, tuple(array.shape))
        for record in head.record
        for array in record.arrays.array
        if array.stype == NUMPY and "float" in array.dtype
    }


@lru_cache(maxsize=4096)
def _read_header(header: bytes) -> tuple[np.dtype[Any], tuple[int, ...], Literal["C", "F"], int]:
    file = io.BytesIO(header)
    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(file)
    return dtype, shape, "F" if fortran else "C", file.tell()


def npy_layout(view: memoryview) -> tuple[np.dtype[Any], tuple[int, ...], Literal["C", "F"], int]:
    """dtype, shape, order and offset of the first element of a .npy file. Raises PayloadError where it is none."""
    try:
        length = (
            int.from_bytes(view[8:10], "little") + 10 if view[6] == 1 else int.from_bytes(view[8:12], "little") + 12
        )
        dtype, shape, order, offset = _read_header(bytes(view[:length]))
    except (ValueError, IndexError, TypeError, SyntaxError, EOFError) as error:
        raise PayloadError(f"not a .npy array: {error}") from None
    if dtype.hasobject:
        raise PayloadError("an array of Python objects, which nobody here unpickles")
    if offset + dtype.itemsize * int(np.prod(shape, dtype=object)) != len(view):
        raise PayloadError(f"a {dtype} array of shape {shape} does not take {len(view)} bytes")
    return dtype, shape, order, offset


def check_array(array: pb.ArrayEntry, view: memoryview, finite: bool) -> None:
    """Raises PayloadError unless the bytes of a numpy array are what its entry says and, if asked for, finite."""
    dtype, shape, _, offset = npy_layout(view)
    if str(dtype) != array.dtype or shape != tuple(array.shape):
        raise PayloadError(f"says {array.dtype}{list(array.shape)} but holds {dtype}{list(shape)}")
    if not finite or dtype.kind not in "fc":
        return
    numbers = np.frombuffer(view, dtype, offset=offset)
    block = max(1, CHUNK_BYTES // dtype.itemsize)
    for start in range(0, numbers.size, block):
        if not np.isfinite(numbers[start : start + block]).all():
            raise PayloadError("holds NaN or infinite numbers")


def check_arrays(
    name: str, arrays: list[tuple[pb.ArrayEntry, int]], view: memoryview, sent: Sent, finite: bool
) -> None:
    """Checks the arrays of one record of a reply. Raises PayloadError that names the array."""
    for array, start in arrays:
        where = f"array {array.name!r} of record {name!r}"
        if (expected := sent.get((name, array.name))) is not None:
            found = (array.dtype, tuple(array.shape))
            if found != expected:
                raise PayloadError(
                    f"{where} is {found[0]}{list(found[1])}, but {expected[0]}{list(expected[1])} was sent out"
                )
        if array.stype == NUMPY:
            try:
                check_array(array, view[start : start + array.size], finite)
            except PayloadError as error:
                raise PayloadError(f"{where} {error}") from None


def check_reply(payload: pb.Payload, get: Get, sent: Sent, *, finite: bool = True) -> None:
    """Raises PayloadError, naming the record and array, unless a reply's payload is sound.

    `finite` asks for finite floating-point numbers; an empty `sent` leaves shapes and dtypes free.
    """
    names: set[str] = set()
    for entry in decode_head(payload, get).record:
        if entry.name in names:
            raise PayloadError(f"record {entry.name!r} is there twice")
        names.add(entry.name)
        kind = entry.WhichOneof("kind")
        if kind == "arrays":
            blob, view = blob_of(payload, entry.arrays, get)
            check_arrays(entry.name, array_offsets(entry.arrays, blob.size), view, sent, finite)
        elif kind is None:
            raise PayloadError(f"record {entry.name!r} is of no kind this version knows")
        elif kind == "metrics":
            for value in entry.metrics.entry:
                if value.WhichOneof("kind") not in _METRICS:
                    raise PayloadError(
                        f"metric {value.name!r} of record {entry.name!r} is not a number or list of them"
                    )
            decode_values(entry.metrics)
        else:
            decode_values(entry.config)
