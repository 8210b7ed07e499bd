"""A reply that came as Flower records: checked against what was sent, and behind a handle."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict
from numpy.typing import NDArray

from fedpace.errors import PayloadError
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.check import NUMPY, check_array, check_step, npy_array
from fedpace.protocol.downlink import STEPS, STEPS_TYPE, steps_kind
from fedpace.protocol.encoded import STEP, STEP_TYPE, reply_record
from fedpace.protocol.mapped import buffer_of, size_of
from fedpace.protocol.paced import UpdateHandle

Layout = dict[str, tuple[str, tuple[int, ...]]]
"""dtype and shape of each floating-point array of a record, by its name."""


class RecordsUpdate(UpdateHandle):
    """Holds the records; `release` lets them go, and views that are still held stay readable."""

    def __init__(self, content: RecordDict) -> None:
        self._content = content

    @property
    def nbytes(self) -> int:
        return content_bytes(self._content)

    def arrays(self, record: str | None = None) -> Mapping[str, NDArray[np.generic]]:
        """As the contract says. Raises PayloadError for one whose bytes are not a .npy file."""
        found: dict[str, NDArray[np.generic]] = {}
        for name, arrays in self._content.array_records.items():
            if record in (None, name):
                found |= {key: npy_array(_view(array)) for key, array in arrays.items() if array.stype == NUMPY}
        return found

    def encoded(self, record: str) -> memoryview | None:
        arrays = self._content.array_records
        array = arrays[record].get(STEP) if record in arrays else None
        return None if array is None or array.stype != STEP_TYPE else _view(array)

    def content(self) -> RecordDict:
        return copy.deepcopy(self._content)

    def release(self) -> None:
        self._content = RecordDict()


def numbers_of(array: Array) -> NDArray[np.generic]:
    """An array of Flower's as numpy's, read-only, without a copy: twenty times as fast as `array.numpy()`.

    Raises PayloadError where its bytes are not a .npy file, and TypeError where it is none.
    """
    if array.stype != NUMPY:
        raise TypeError(f"an array of type {array.stype!r} is none of numpy's")
    return npy_array(_view(array))


def _view(array: Array) -> memoryview:
    return memoryview(buffer_of(array)).toreadonly()


def content_bytes(content: RecordDict) -> int:
    """Size of records in bytes, without reading arrays that are not in memory."""
    total = 0
    for record in content.values():
        if isinstance(record, ArrayRecord):
            total += sum(len(name) + size_of(array) for name, array in record.items())
        else:
            total += record.count_bytes()
    return total


def flat_metrics(content: RecordDict) -> dict[str, Any]:
    """All metrics by name; of records that share a name, the last wins."""
    return {name: value for record in content.metric_records.values() for name, value in record.items()}


def reported_seconds(metrics: Mapping[str, Any]) -> float:
    """The compute time that a device reports in seconds, NaN where it reports none that can be."""
    seconds = metrics.get("compute-seconds")
    return float(seconds) if isinstance(seconds, int | float) and 0 <= seconds < math.inf else math.nan


def record_layout(record: ArrayRecord) -> Layout:
    """What the arrays of replies are held against. Raises PayloadError for one that is no .npy file."""
    layout: Layout = {}
    for name, array in record.items():
        if array.stype == NUMPY:
            found = npy_array(_view(array))
            if found.dtype.kind in "fc":
                layout[name] = (str(found.dtype), found.shape)
        elif array.stype == STEPS_TYPE and name == STEPS:
            layout[name] = (steps_kind(_view(array)), tuple(array.shape))
    return layout


def check_records(content: RecordDict, sent: Mapping[str, Layout], codecs: Collection[str] | None = None) -> None:
    """Raises PayloadError, naming record and array, unless all arrays of a reply are whole and finite, and those that
    were sent (by record and array) of the shape and kind of number sent. `codecs` are those that may be used, if not all.
    """
    layouts = {reply_record(record): layout for record, layout in sent.items()}
    for record, arrays in content.array_records.items():
        expected = layouts.get(record, {})
        for name, array in arrays.items():
            entry = pb.ArrayEntry(dtype=array.dtype, shape=array.shape)
            try:
                if array.stype == NUMPY:
                    check_array(entry, _view(array), expected.get(name), finite=True)
                elif name == STEP and array.stype == STEP_TYPE:
                    check_step(entry, _view(array), expected, arrays, codecs)
            except PayloadError as error:
                raise PayloadError(f"array {name!r} of record {record!r} {error}") from None
