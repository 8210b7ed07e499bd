"""The bulk of a blob crosses gRPC without protobuf's copying, which takes 1.2 ms a MiB: fifteen times what is needed.

On the wire a chunk is what the `.proto` says: a message whose only field is its bytes. Written and read by hand, it
is one copy to send and none to receive.
"""

from __future__ import annotations

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
    ("grpc.http2.max_frame_size", 1 << 20),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 4 << 20),
]
"""What a peer may send before it is read: 4 MiB a transfer. Left to itself gRPC lets this grow to 16 MiB and more for
each of many devices, all in memory; 4 MiB still fill a line of 40 MB/s whose answers take 100 ms."""

Metadata = Sequence[tuple[str, str]]
Bytes = bytes | memoryview


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _pack(tag: bytes, data: Bytes) -> bytes:
    return b"".join((tag, _varint(len(data)), data))


def _unpack(tag: bytes, raw: bytes) -> memoryview | None:
    """The bytes of a message that holds nothing but this field; None for any other message."""
    if raw[:1] != tag:
        return None
    size, shift, at = 0, 0, 1
    while at < min(len(raw), 6):
        size |= (raw[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if not raw[at - 1] & 0x80:
            return memoryview(raw)[at:] if len(raw) - at == size else None
    return None


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
