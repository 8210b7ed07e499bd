"""The bulk of a blob crosses gRPC without protobuf's copying, which takes 1.2 ms a MiB: fifteen times what is needed.

On the wire a chunk is what the `.proto` says: a message whose only field is its bytes. Written and read by hand, it
is one copy to send and none to receive.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterable, Callable, Sequence
from typing import TYPE_CHECKING, Any

import grpc

from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.fleet_pb2_grpc import FleetServicer, FleetStub, add_FleetServicer_to_server

if TYPE_CHECKING:
    from fedpace.protocol.fleet_pb2_grpc import FleetAsyncStub

_SERVICE = "fedpace.v1.Fleet"
_CHUNK_TAG = bytes([pb.Chunk.DATA_FIELD_NUMBER << 3 | 2])
_STORE_TAG = bytes([pb.StoreChunk.DATA_FIELD_NUMBER << 3 | 2])

WINDOW_OPTIONS = [
    ("grpc.http2.max_frame_size", (1 << 20) + (1 << 10)),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 4 << 20),
]
"""What a peer may send before it is read: 4 MiB a transfer. Left to itself gRPC lets this grow to 16 MiB and more for
each of many devices, all in memory; 4 MiB still fill a line of 40 MB/s whose answers take 100 ms."""

Metadata = Sequence[tuple[str, str]]
Bytes = bytes | memoryview


@functools.lru_cache(maxsize=64)
def _head(tag: bytes, size: int) -> bytes:
    """What comes before a field of `size` bytes: its tag and its size as a varint."""
    out = bytearray(tag)
    while size > 0x7F:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    out.append(size)
    return bytes(out)


@functools.lru_cache(maxsize=64)
def _head_within(tag: bytes, total: int) -> bytes | None:
    """The same where both together have `total` bytes; None where there is no such size."""
    heads = (_head(tag, total - length) for length in range(2, min(total, 11) + 1))
    return next((head for length, head in enumerate(heads, start=2) if len(head) == length), None)


def _pack(tag: bytes, data: Bytes) -> bytes:
    return b"".join((_head(tag, len(data)), data))


def _unpack(tag: bytes, raw: bytes) -> memoryview | None:
    """The bytes of a message that holds nothing but this field, as protobuf writes it; None for any other message."""
    head = _head_within(tag, len(raw))
    return memoryview(raw)[len(head) :] if head is not None and raw.startswith(head) else None


def pack_chunk(data: Bytes) -> bytes:
    """`Chunk(data=data)`, serialised."""
    return _pack(_CHUNK_TAG, data)


def unpack_chunk(raw: bytes) -> Bytes:
    """The data of a serialised Chunk."""
    data = _unpack(_CHUNK_TAG, raw)
    return pb.Chunk.FromString(raw).data if data is None else data


def pack_store_chunk(message: pb.StoreChunk | Bytes) -> bytes:
    """A StoreChunk, or `StoreChunk(data=data)`, serialised."""
    return message.SerializeToString() if isinstance(message, pb.StoreChunk) else _pack(_STORE_TAG, message)


def unpack_store_chunk(raw: bytes) -> pb.StoreChunk | Bytes:
    """A StoreChunk, or its data where there is nothing else in it."""
    data = _unpack(_STORE_TAG, raw)
    return pb.StoreChunk.FromString(raw) if data is None else data


class _HandlerSink:
    """Takes the handlers that generated code registers, so that some of them can be made anew."""

    def __init__(self) -> None:
        self.handlers: dict[str, Any] = {}

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """The generic form of the same handlers; not needed."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        self.handlers.update(handlers)


def add_fleet_service(servicer: FleetServicer, server: grpc.aio.Server) -> None:
    """Registers the service; its Fetch yields bytes, its Store is given a StoreChunk or bytes."""
    sink = _HandlerSink()
    add_FleetServicer_to_server(servicer, sink)  # type: ignore[arg-type]
    handlers = sink.handlers
    handlers["Fetch"] = handlers["Fetch"]._replace(response_serializer=pack_chunk)
    handlers["Store"] = handlers["Store"]._replace(request_deserializer=unpack_store_chunk)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))


class FleetClient:
    """The service as a device calls it: `fetch` gives bytes, `store` takes a StoreChunk, then bytes."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.stub: FleetAsyncStub = FleetStub(channel)
        self.fetch: Callable[..., AsyncIterable[Bytes]] = channel.unary_stream(
            f"/{_SERVICE}/Fetch",
            request_serializer=pb.FetchRequest.SerializeToString,
            response_deserializer=unpack_chunk,
        )
        self.store: Callable[..., grpc.aio.StreamStreamCall[Any, pb.StoreState]] = channel.stream_stream(
            f"/{_SERVICE}/Store",
            request_serializer=pack_store_chunk,
            response_deserializer=pb.StoreState.FromString,
        )
