"""Blobs between a device and the coordinator: fetched from where an earlier try broke off, stored likewise."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import grpc

from fedpace.errors import RefusedError
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.blobs import BlobStore, read_blob
from fedpace.protocol.chunks import FleetClient, Metadata
from fedpace.protocol.limits import CHUNK_BYTES

_LOST = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED})


@contextlib.contextmanager
def _told_apart() -> Iterator[None]:
    """Tells a connection that broke (ConnectionError) from a server that says no (RefusedError)."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        if error.code() in _LOST:
            raise ConnectionError(error.details()) from None
        raise RefusedError(error.details()) from None
    except asyncio.CancelledError:  # gRPC cancels its calls when their channel closes
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise ConnectionError("the connection closed") from None


async def fetch(client: FleetClient, metadata: Metadata, task_id: int, blob: pb.Blob, store: BlobStore) -> float:
    """Brings a blob into the store. Returns bytes a second.

    Raises ConnectionError where the transfer breaks off (what arrived stays), RefusedError where the server says no,
    PayloadError where the bytes are not those announced.
    """
    incoming = store.incoming(blob.name, blob.size)
    first, begun = incoming.offset, 0
    started = time.monotonic()
    try:
        request = pb.FetchRequest(task_id=task_id, name=blob.name, offset=first)
        with _told_apart():
            async for data in client.fetch(request, metadata=metadata):
                incoming.write(data)
                if not begun and len(data) < blob.size - first:  # until here the transfer may have waited for its turn
                    begun, started = len(data), time.monotonic()
        incoming.finish()
    finally:
        incoming.close()
    return (blob.size - first - begun) / max(1e-6, time.monotonic() - started)


async def store(client: FleetClient, metadata: Metadata, task_id: int, blob: pb.Blob, folder: Path) -> float:
    """Hands a blob to the coordinator, from the message that carries it or from its file in `folder`.

    Returns bytes a second. Raises ConnectionError where the transfer breaks off, RefusedError where the server says no,
    PayloadError where the file cannot be read.
    """
    started = time.monotonic()
    with _told_apart():
        call = client.store(metadata=metadata)
        await call.write(pb.StoreChunk(task_id=task_id, name=blob.name, size=blob.size))
        first = True
        async for state in call:
            if state.complete:
                break
            if first:
                first, started = False, time.monotonic()  # until here it may have waited for its turn
                with contextlib.suppress(asyncio.InvalidStateError):  # the server has said no: the next read tells
                    for data in _chunks(blob, folder, state.offset):
                        await call.write(data)
                    await call.done_writing()
        else:
            raise RefusedError("the server ended the transfer without a word")
    return blob.size / max(1e-6, time.monotonic() - started)


def _chunks(blob: pb.Blob, folder: Path, offset: int) -> Iterator[memoryview]:
    data = read_blob(folder, blob)
    return (data[start : start + CHUNK_BYTES] for start in range(offset, blob.size, CHUNK_BYTES))
