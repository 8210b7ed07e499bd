"""What a `Payload` says, read without Flower: its head, its blobs, where each array lies, its metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError

from fedpace.errors import PayloadError
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.values import decode_values

ALIGNMENT = 64
"""Arrays start at multiples of this many bytes in their blob, so that mapped numbers are aligned."""

Get = Callable[[pb.Blob], memoryview]
"""The bytes of a blob; raises PayloadError where they are not to be had."""


def padding(size: int) -> int:
    """Bytes from `size` to the next multiple of `ALIGNMENT`."""
    return -size % ALIGNMENT


def decode_head(payload: pb.Payload, get: Get) -> pb.Records:
    """The head of a payload. Raises PayloadError where it is not one."""
    data = bytes(get(payload.head_blob)) if payload.HasField("head_blob") else payload.head
    try:
        return pb.Records.FromString(data)
    except DecodeError as error:
        raise PayloadError(
            f"the head of the message ({len(data)} bytes) is not a serialised Records: {error}"
        ) from None


def blob_of(payload: pb.Payload, index: pb.ArrayIndex, get: Get) -> tuple[pb.Blob, memoryview]:
    """The blob an index points into, and its bytes. Raises PayloadError where there is none."""
    if index.blob >= len(payload.blobs):
        raise PayloadError(f"an array record points at blob {index.blob} of {len(payload.blobs)}")
    blob = payload.blobs[index.blob]
    return blob, get(blob)


def array_offsets(index: pb.ArrayIndex, size: int) -> list[tuple[pb.ArrayEntry, int]]:
    """Each array with its offset in the blob. Raises PayloadError unless they fill its `size` bytes exactly."""
    offset = 0
    found = []
    for array in index.array:
        found.append((array, offset))
        offset += array.size + padding(array.size)
    if offset != size:
        raise PayloadError(f"the arrays take {offset} bytes, but their blob has {size}")
    return found


def metrics_of(payload: pb.Payload, get: Get) -> dict[str, Any]:
    """All metrics of a payload by name, without touching its arrays; of records that share a name, the last wins."""
    return metrics_in(decode_head(payload, get))


def metrics_in(head: pb.Records) -> dict[str, Any]:
    """The same, of a head."""
    found: dict[str, Any] = {}
    for entry in head.record:
        if entry.WhichOneof("kind") == "metrics":
            found.update(decode_values(entry.metrics))
    return found


def payload_bytes(payload: pb.Payload) -> int:
    """Size of a payload in bytes: its head and all its blobs."""
    return len(payload.head) + sum([blob.size for blob in all_blobs(payload)])


def all_blobs(payload: pb.Payload) -> list[pb.Blob]:
    """Every blob of a payload, that of its head included."""
    blobs = list(payload.blobs)
    return [payload.head_blob, *blobs] if payload.HasField("head_blob") else blobs
