"""A reply's content where the coordinator put it: small blobs in the event itself, large ones in a folder of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.blobs import read_blob
from fedpace.protocol.payloads import all_blobs
from fedpace.protocol.updates import PayloadUpdate


class StoredUpdate(PayloadUpdate):
    """Large blobs are mapped, not read; `release` removes their folder."""

    def __init__(self, directory: Path, payload: pb.Payload) -> None:
        super().__init__(payload, self.read)
        self._directory = directory

    def read(self, blob: pb.Blob) -> memoryview:
        return read_blob(self._directory, blob)

    def release(self) -> None:
        if any(not blob.HasField("data") for blob in all_blobs(self._payload)):
            shutil.rmtree(self._directory, ignore_errors=True)
