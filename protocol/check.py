"""A reply is checked before anybody uses it: complete, of the shape and dtype that was sent out, finite.

What was sent decides: where the reply has an array of the same name in a record of the same name, and that array holds
floating-point numbers, shape and dtype must be those sent. Other arrays (masked integers, trees as bytes, arrays that
only go up) are free. Floating-point arrays must be finite in any case.
"""

from __future__ import annotations

import ast
import io
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from fedpace.errors import PayloadError
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.limits import CHUNK_BYTES
from fedpace.protocol.payloads import Get, array_offsets, blob_of, decode_head
from fedpace.protocol.values import decode_values

NUMPY = "numpy.ndarray"
"""Flower's `stype` of an array whose bytes are a .npy file."""

_HEADER_BYTES = 10_000
"""numpy loads no array with a longer header."""

_METRICS = {"integer", "number", "big_integer", "integers", "numbers", "big_integers"}

Sent = Mapping[tuple[str, str], tuple[str, tuple[int, ...]]]
"""dtype and shape of each floating-point array that was sent, by the names of its record and itself."""


def sent_arrays(head: pb.Records) -> dict[tuple[str, str], tuple[str, tuple[int, ...]]]:
    """What a reply to a message with this head is held against."""
    return {
        (record.name, array.name): (array.dtype, tuple(array.shape))
        for record in head.record
        for array in record.arrays.array
        if array.stype == NUMPY and _floating(array.dtype)
    }


def _floating(dtype: str) -> bool:
    known = _dtype(dtype)
    return "float" in dtype if known is None else known.kind in "fc"


def _dtype(name: str) -> np.dtype[Any] | None:
    """numpy's dtype of that name; None where it has none (those other libraries add, and structures)."""
    try:
        return np.dtype(name)
    except Exception:  # noqa: BLE001 - a name may be anything, and numpy parses it with what Python has
        return None


@lru_cache(maxsize=4096)
def _read_header(header: bytes) -> tuple[np.dtype[Any], tuple[int, ...], Literal["C", "F"]]:
    """dtype, shape and order from the header of a .npy file, of any version, read as numpy reads it."""
    version = npy.read_magic(io.BytesIO(header))
    text = header[10:] if version == (1, 0) else header[12:]
    fields = ast.literal_eval(text.decode("utf-8" if version == (3, 0) else "latin-1"))
    if fields.keys() != {"descr", "fortran_order", "shape"}:
        raise ValueError("its header has the wrong keys")
    dtype, shape, fortran = npy.descr_to_dtype(fields["descr"]), fields["shape"], fields["fortran_order"]
    if not isinstance(shape, tuple) or not all(type(size) is int for size in shape) or not isinstance(fortran, bool):
        raise ValueError("its header has values of the wrong types")
    return dtype, shape, "F" if fortran else "C"


def npy_array(view: memoryview) -> NDArray[Any]:
    """The array of a .npy file, where it lies. Raises PayloadError where it is none that numpy would load."""
    try:
        first = 10 if view[6] == 1 else 12
        offset = first + int.from_bytes(view[8:first], "little")
        if offset > min(len(view), _HEADER_BYTES):
            raise ValueError(f"its header takes {offset} bytes")
        dtype, shape, order = _read_header(bytes(view[:offset]))
        if dtype.hasobject:
            raise ValueError("it holds Python objects, which nobody here unpickles")
        array: NDArray[Any] = np.ndarray(shape, dtype, buffer=view, offset=offset, order=order)
    except Exception as error:  # noqa: BLE001 - Python's and numpy's parsers raise nearly everything
        raise PayloadError(f"is not a .npy array: {error}") from None
    if array.shape != shape or offset + array.nbytes != len(view):
        raise PayloadError(f"does not take {len(view)} bytes as {dtype}{list(shape)}")
    return array


def check_array(array: pb.ArrayEntry, view: memoryview, finite: bool) -> None:
    """Raises PayloadError unless the bytes of a numpy array are what its entry says and, if asked for, finite."""
    found = npy_array(view)
    if not _named(found.dtype, array.dtype) or found.shape != tuple(array.shape):
        raise PayloadError(f"says {array.dtype}{list(array.shape)} but holds {found.dtype}{list(found.shape)}")
    if not finite or found.dtype.kind not in "fc":
        return
    numbers = found.ravel(order="K")
    block = max(1, CHUNK_BYTES // found.itemsize)
    for start in range(0, numbers.size, block):
        if not np.isfinite(numbers[start : start + block]).all():
            raise PayloadError("holds NaN or infinite numbers")


def _named(dtype: np.dtype[Any], name: str) -> bool:
    """Whether an array that says it is of dtype `name` may have been written as `dtype`.

    numpy writes what it has no name for (bfloat16, aligned structures) as plain bytes of that size.
    """
    return str(dtype) == name or (dtype.kind == "V" and _dtype(name) is None)


def check_arrays(
    name: str, arrays: list[tuple[pb.ArrayEntry, int]], view: memoryview, sent: Sent, finite: bool
) -> None:
    """Checks the arrays of one record of a reply. Raises PayloadError that names the array."""
    names: set[str] = set()
    for array, start in arrays:
        if array.name in names:
            raise PayloadError(f"array {array.name!r} of record {name!r} is there twice")
        names.add(array.name)
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
