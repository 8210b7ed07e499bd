"""A reply is checked before anybody uses it: complete, of the shape and kind of number that was sent out, finite.

What was sent decides: where it had an array of floating-point (or complex) numbers, and the reply has one of the same
name in a record of the same name, that one must have its shape and hold such numbers too, of whatever width: Flower's
FedAdam sends float64 to devices that train in float32. Other arrays (masked integers, trees as bytes, arrays that only
go up) are free. Floating-point arrays must be finite in any case. A compressed update must be one of the arrays sent, in
their place, and of a codec that is allowed.
"""

from __future__ import annotations

import ast
import io
import math
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from fedpace.errors import PayloadError
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.downlink import STEPS, STEPS_TYPE, layout_told, steps_kind
from fedpace.protocol.encoded import STEP, STEP_TYPE, StepLayout, read_step, reply_record
from fedpace.protocol.limits import CHUNK_BYTES
from fedpace.protocol.payloads import Get, array_offsets, blob_of, decode_head
from fedpace.protocol.values import decode_values

NUMPY = "numpy.ndarray"
"""Flower's `stype` of an array whose bytes are a .npy file."""

_HEADER_BYTES = 10_000
"""numpy loads no array with a longer header."""

_VERSIONS = {(1, 0): (10, "latin-1"), (2, 0): (12, "latin-1"), (3, 0): (12, "utf-8")}
"""Where the header of a .npy file starts, and how it is encoded, by the version of its format."""

_METRICS = {"integer", "number", "big_integer", "integers", "numbers", "big_integers"}

_WEIGHT = "num-examples"
"""What Flower's strategies weigh by, unless told otherwise: one that is NaN makes the whole model NaN."""

Sent = Mapping[tuple[str, str], tuple[str, tuple[int, ...]]]
"""dtype and shape of each floating-point array that was sent, by the names of its record and itself."""


def sent_arrays(payload: pb.Payload, get: Get) -> dict[tuple[str, str], tuple[str, tuple[int, ...]]]:
    """What a reply to a message with this payload is held against; what the arrays' own bytes say counts.

    Raises PayloadError where the payload cannot be read.
    """
    found: dict[tuple[str, str], tuple[str, tuple[int, ...]]] = {}
    for record in decode_head(payload, get).record:
        if not record.HasField("arrays"):
            continue
        blob, view = blob_of(payload, record.arrays, get)
        reply = reply_record(record.name)
        for entry, start in array_offsets(record.arrays, blob.size):
            if entry.stype == NUMPY:
                array = npy_array(view[start : start + entry.size])
                layout = _layout(entry, array)
                if _family(layout[0]) in ("f", "c") or "float" in layout[0]:
                    found[reply, entry.name] = layout
            elif entry.stype == STEPS_TYPE and entry.name == STEPS:
                found[reply, STEPS] = steps_kind(view[start : start + entry.size]), tuple(entry.shape)
    return found


def _layout(entry: pb.ArrayEntry, array: NDArray[Any]) -> tuple[str, tuple[int, ...]]:
    return entry.dtype or str(array.dtype), array.shape


def _family(dtype: str) -> str:
    """f for floating-point dtypes of any width, c for complex ones; of those numpy has no name for, their own."""
    known = _dtype(dtype)
    return dtype if known is None else known.kind


@lru_cache(maxsize=256)
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
    if version not in _VERSIONS:
        raise ValueError(f"its format is {version[0]}.{version[1]}")
    start, encoding = _VERSIONS[version]
    fields = ast.literal_eval(header[start:].decode(encoding))
    if fields.keys() != {"descr", "fortran_order", "shape"}:
        raise ValueError("its header has the wrong keys")
    dtype, shape, fortran = npy.descr_to_dtype(fields["descr"]), fields["shape"], fields["fortran_order"]
    sizes = isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)
    if not sizes or not isinstance(fortran, bool):  # numpy takes -1 for "what fits", and dies where an item has 0 bytes
        raise ValueError(f"its shape is {shape}, its order {fortran}")
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
        array: NDArray[Any] = np.ndarray(shape, dtype, view, offset, None, order)
    except Exception as error:  # noqa: BLE001 - Python's and numpy's parsers raise nearly everything
        raise PayloadError(f"is not a .npy array: {error}") from None
    if array.shape != shape or offset + array.nbytes != len(view):
        raise PayloadError(f"does not take {len(view)} bytes as {dtype}{list(shape)}")
    return array


def check_array(
    array: pb.ArrayEntry, view: memoryview, expected: tuple[str, tuple[int, ...]] | None, finite: bool
) -> None:
    """Raises PayloadError unless the bytes of a numpy array are what its entry says (Flower's legacy API says nothing),
    of the dtype and shape expected and, if asked for, finite."""
    found = npy_array(view)
    if array.dtype and (not _named(found.dtype, array.dtype) or found.shape != tuple(array.shape)):
        raise PayloadError(f"says {array.dtype}{list(array.shape)} but holds {found.dtype}{list(found.shape)}")
    dtype, shape = _layout(array, found)
    if expected is not None and (_family(dtype), shape) != (_family(expected[0]), expected[1]):
        raise PayloadError(f"is {dtype}{list(shape)}, but {expected[0]}{list(expected[1])} was sent out")
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


def check_step(
    array: pb.ArrayEntry,
    view: memoryview,
    sent: Mapping[str, tuple[str, tuple[int, ...]]],
    beside: Collection[str],
    codecs: Collection[str] | None,
) -> None:
    """Raises PayloadError unless an array is a compressed update (`fedpace.protocol.encoded`) of what was sent in its
    record: dtypes and shapes by name. `beside` are the names in the reply's record, and `codecs` those allowed."""
    if STEPS in sent:
        layout = layout_told(*sent[STEPS])
    else:
        layout = StepLayout.of((name, dtype, shape) for name, (dtype, shape) in sent.items())
    if (array.dtype, tuple(array.shape)) != ("float32", (layout.size,)):
        raise PayloadError(
            f"says {array.dtype}{list(array.shape)}, and the step of what was sent out is float32[{layout.size}]"
        )
    if both := [name for name in beside if name in layout.shapes]:
        raise PayloadError(f"stands for array {both[0]!r}, which is there too")
    read_step(view, layout, codecs)


def check_arrays(
    name: str,
    arrays: list[tuple[pb.ArrayEntry, int]],
    view: memoryview,
    sent: Sent,
    finite: bool,
    codecs: Collection[str] | None = None,
) -> None:
    """Checks the arrays of one record of a reply. Raises PayloadError that names the array."""
    names: set[str] = set()
    for array, start in arrays:
        if array.name in names:
            raise PayloadError(f"array {array.name!r} of record {name!r} is there twice")
        names.add(array.name)
        found = view[start : start + array.size]
        try:
            if array.stype == NUMPY:
                check_array(array, found, sent.get((name, array.name)), finite)
            elif array.name == STEP and array.stype == STEP_TYPE and finite:
                own = {key: layout for (record, key), layout in sent.items() if record == name}
                check_step(array, found, own, [other.name for other, _ in arrays], codecs)
        except PayloadError as error:
            raise PayloadError(f"array {array.name!r} of record {name!r} {error}") from None


def check_reply(
    payload: pb.Payload, get: Get, sent: Sent, *, finite: bool = True, codecs: Collection[str] | None = None
) -> None:
    """Raises PayloadError, naming the record and array, unless a reply's payload is sound.

    `finite` asks for finite floating-point numbers, and for compressed updates of what was sent by one of `codecs` (None:
    by any); an empty `sent` leaves shapes and dtypes free.
    """
    names: set[str] = set()
    for entry in decode_head(payload, get).record:
        if entry.name in names:
            raise PayloadError(f"record {entry.name!r} is there twice")
        names.add(entry.name)
        kind = entry.WhichOneof("kind")
        if kind == "arrays":
            blob, view = blob_of(payload, entry.arrays, get)
            check_arrays(entry.name, array_offsets(entry.arrays, blob.size), view, sent, finite, codecs)
        elif kind is None:
            raise PayloadError(f"record {entry.name!r} is of no kind this version knows")
        elif kind == "metrics":
            for value in entry.metrics.entry:
                if value.WhichOneof("kind") not in _METRICS:
                    raise PayloadError(
                        f"metric {value.name!r} of record {entry.name!r} is not a number or list of them"
                    )
                if (
                    finite
                    and value.name == _WEIGHT
                    and not all(map(math.isfinite, (value.number, *value.numbers.value)))
                ):
                    raise PayloadError(f"metric {value.name!r} of record {entry.name!r} is NaN or infinite")
            decode_values(entry.metrics)
        else:
            decode_values(entry.config)
