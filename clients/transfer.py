"""Blobs between a device and the coordinator: fetched from where an earlier try broke off, stored likewise."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

from fedpace.errors import PayloadError
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.blobs import BlobStore
from fedpace.protocol.chunks import FleetClient, Metadata
from fedpace.protocol.limits import CHUNK_BYTES


async def fetch(client: FleetClient, metadata: Metadata, task_id: int, blob: pb.Blob, store: BlobStore) -> float:
    """Brings a blob into the store. Returns bytes a second.

    Raises grpc.aio.AioRpcError where the transfer breaks off (what arrived stays), PayloadError where the bytes are
    not those announced.
    """
    incoming = store.incoming(blob.sha256, blob.size)
    first = incoming.offset
    started = time.monotonic()
    try:
        request = pb.FetchRequest(task_id=task_id, sha256=blob.sha256, offset=first)
        async for data in client.fetch(request, metadata=metadata):
            incoming.write(data)
    finally:
        incoming.close()
    incoming.finish()
    return (blob.size - first) / max(1e-6, time.monotonic() - started)


async def store(client: FleetClient, metadata: Metadata, task_id: int, blob: pb.Blob, folder: Path) -> float:
    """Hands a blob to the coordinator, from the message that carries it or from its file in `folder`.

    Returns bytes a second. Raises grpc.aio.AioRpcError where the transfer breaks off or is refused.
    """
    started = time.monotonic()
    call = client.store(metadata=metadata)
    await call.write(pb.StoreChunk(task_id=task_id, sha256=blob.sha256, size=blob.size))
    first = True
    async for state in call:
        if state.complete:
            break
        if first:
            first = False
            async for data in _chunks(blob, folder, state.offset):
                await call.write(data)
            await call.done_writing()
    else:
        raise PayloadError("the server ended the transfer without a word")
    return blob.size / max(1e-6, time.monotonic() - started)


async def _chunks(blob: pb.Blob, folder: Path, offset: int) -> AsyncIterator[bytes]:
    if blob.HasField("data"):
        for start in range(offset, blob.size, CHUNK_BYTES):
            yield blob.data[start : start + CHUNK_BYTES]
        return
    with (folder / blob.sha256.hex()).open("rb", buffering=0) as file:
        while data := os.pread(file.fileno(), CHUNK_BYTES, offset):
            yield data
            offset += len(data)
