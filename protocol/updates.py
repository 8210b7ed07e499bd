"""A reply's content as a payload, behind a handle: arrays are found where their bytes lie."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flwr.app import RecordDict
from numpy.typing import NDArray

from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.check import NUMPY, npy_array
from fedpace.protocol.encoded import STEP, STEP_TYPE
from fedpace.protocol.paced import UpdateHandle
from fedpace.protocol.payloads import Get, array_offsets, blob_of, decode_head, metrics_in, payload_bytes
from fedpace.protocol.records import decode


class PayloadUpdate(UpdateHandle):
    """`get` finds the payload's blobs. `release` lets them go; views that are still held stay readable."""

    def __init__(self, payload: pb.Payload, get: Get) -> None:
        self._payload = payload
        self._get: Get | None = get
        self._head: pb.Records | None = None

    @property
    def nbytes(self) -> int:
        return payload_bytes(self._payload)

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics of the reply, by name."""
        return {} if self._get is None else metrics_in(self._records(self._get))

    def _records(self, get: Get) -> pb.Records:
        """The head, read once."""
        if self._head is None:
            self._head = decode_head(self._payload, get)
        return self._head

    def _arrays(self, record: str | None) -> Iterator[tuple[pb.ArrayEntry, memoryview]]:
        """The arrays of a record, or of all, with their bytes."""
        if self._get is None:
            return
        for entry in self._records(self._get).record:
            if entry.HasField("arrays") and record in (None, entry.name):
                blob, view = blob_of(self._payload, entry.arrays, self._get)
                for array, start in array_offsets(entry.arrays, blob.size):
                    yield array, view[start : start + array.size]

    def arrays(self, record: str | None = None) -> Mapping[str, NDArray[np.generic]]:
        return {array.name: npy_array(view) for array, view in self._arrays(record) if array.stype == NUMPY}

    def encoded(self, record: str) -> memoryview | None:
        for array, view in self._arrays(record):
            if array.name == STEP and array.stype == STEP_TYPE:
                return view
        return None

    def content(self) -> RecordDict:
        return RecordDict() if self._get is None else decode(self._payload, self._get)

    def release(self) -> None:
        self._get = self._head = None
