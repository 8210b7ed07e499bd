"""Hypothesis generators of what Flower's records may hold, and comparisons that see every bit."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fedpace.errors import PayloadError
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.blobs import digest

T = TypeVar("T")

law = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
"""Settings of a law: machines that test are busy, so no example has a deadline."""

names = st.text(max_size=6)
integers = st.integers() | st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(-(1 << 300), 1 << 300)
floats = st.floats(allow_nan=True, allow_infinity=True, width=64)
metric_values = integers | floats | st.lists(integers, max_size=4) | st.lists(floats, max_size=4)
config_values = (
    metric_values
    | st.booleans()
    | st.text(max_size=6)
    | st.binary(max_size=6)
    | st.lists(st.booleans(), max_size=4)
    | st.lists(st.text(max_size=4), max_size=4)
    | st.lists(st.binary(max_size=4), max_size=4)
)

dtypes = (
    npst.scalar_dtypes()
    | npst.byte_string_dtypes(max_len=4)
    | npst.unicode_string_dtypes(max_len=4)
    | npst.array_dtypes(max_size=3)
    | st.sampled_from([np.dtype(np.longdouble), np.dtype(np.clongdouble), np.dtype("V3"), np.dtype("U0")])
)
"""Every kind of dtype that numpy saves without pickle: structures, strings, times and either byte order too."""

shapes = npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)


@st.composite
def ndarrays(draw: st.DrawFn, dtypes: st.SearchStrategy[np.dtype[Any]] = dtypes) -> np.ndarray[Any, Any]:
    """Arrays whose bits are drawn, not their values; in C or Fortran order, or with gaps."""
    dtype, shape = draw(dtypes), draw(shapes)
    size = dtype.itemsize * int(np.prod(shape))
    if dtype.kind in "Ubm" or dtype.names is not None:
        array = np.zeros(shape, dtype)
    else:
        array = np.ndarray(shape, dtype, buffer=draw(st.binary(min_size=size, max_size=size)) if size else None)
    layout = draw(st.sampled_from(["C", "F", "strided"]))
    if layout == "F":
        return np.asfortranarray(array) if array.ndim else array
    return np.repeat(array, 2, axis=-1)[..., ::2] if layout == "strided" and array.ndim else array


opaque_arrays = st.builds(
    Array,
    dtype=names,
    shape=st.lists(st.integers(-(1 << 63), (1 << 63) - 1), max_size=3).map(tuple),
    stype=names,
    data=st.binary(max_size=200),
)
"""Arrays of a serialisation nobody here knows."""

array_records = st.dictionaries(names, ndarrays().map(Array) | opaque_arrays, max_size=4).map(ArrayRecord)
metric_records = st.dictionaries(names, metric_values, max_size=4).map(MetricRecord)
config_records = st.dictionaries(names, config_values, max_size=4).map(ConfigRecord)
records = st.dictionaries(names, array_records | metric_records | config_records, max_size=4).map(RecordDict)


def bits(value: Any) -> Any:
    """A value as something that compares equal only where type and every bit are equal."""
    if isinstance(value, float):
        return float, struct.pack("<d", value)
    if isinstance(value, list):
        return list, [bits(item) for item in value]
    if isinstance(value, Array):
        return value.dtype, value.shape, value.stype, value.data
    if isinstance(value, ArrayRecord | MetricRecord | ConfigRecord | RecordDict):
        return type(value), [(name, bits(item)) for name, item in value.items()]
    return type(value), value


def keep_inline(buffers: Any) -> pb.Blob:
    """A `Put` that keeps the bytes in the message, however many they are."""
    data = b"".join(buffers)
    return pb.Blob(name=digest([data]), size=len(data), data=data)


def outcome(function: Callable[..., T], *arguments: Any) -> T | str:
    """What a function returns, or the text of its PayloadError. Anything else it raises fails the test."""
    try:
        return function(*arguments)
    except PayloadError as error:
        assert str(error)
        return str(error)


def npy(array: np.ndarray[Any, Any], *, allow_pickle: bool = False) -> bytes:
    """An array as numpy saves it."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return file.getvalue()
