"""A reply's content where the coordinator put it: small blobs in the event itself, large ones in a folder of its own."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flwr.app import RecordDict
from numpy.typing import NDArray

from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.blobs import read_blob
from fedpace.protocol.check import NUMPY, npy_array
from fedpace.protocol.paced import UpdateHandle
from fedpace.protocol.payloads import all_blobs, array_offsets, blob_of, decode_head, payload_bytes
from fedpace.protocol.records import decode


class StoredUpdate(UpdateHandle):
    """Large blobs are mapped, not read; `release` removes their folder, and views that are still held stay readable."""

    def __init__(self, directory: Path, payload: pb.Payload) -> None:
        self._directory = directory
        self._payload = payload

    @property
    def nbytes(self) -> int:
        return payload_bytes(self._payload)

    def read(self, blob: pb.Blob) -> memoryview:
        return read_blob(self._directory, blob)

    def arrays(self, record: str | None = None) -> Mapping[str, NDArray[np.generic]]:
        found: dict[str, NDArray[np.generic]] = {}
        for entry in decode_head(self._payload, self.read).record:
            if not entry.HasField("arrays") or record not in (None, entry.name):
                continue
            blob, view = blob_of(self._payload, entry.arrays, self.read)
            for array, start in array_offsets(entry.arrays, blob.size):
                if array.stype == NUMPY:
                    found[array.name] = npy_array(view[start : start + array.size])
        return found

    def content(self) -> RecordDict:
        return decode(self._payload, self.read)

    def release(self) -> None:
        if any(not blob.HasField("data") for blob in all_blobs(self._payload)):
            shutil.rmtree(self._directory, ignore_errors=True)
