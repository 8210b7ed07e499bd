"""A device made of bare gRPC, which says what it is told to, well formed or not."""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Any, Self

import grpc
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

from fedpace.certs.identity import Identity
from fedpace.hosting.app import AppFolder
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.blobs import inline_blob
from fedpace.protocol.fleet_pb2_grpc import FleetStub
from fedpace.protocol.limits import PROTOCOL_VERSION
from fedpace.protocol.records import encode

SECONDS = 30.0
"""The end of every wait for what takes a second on a machine that is not busy."""


class RawDevice:
    """Bare gRPC with a device's certificate: says what it is told to, well formed or not. Every call has an end."""

    def __init__(self, address: str, identity: Identity, app: AppFolder) -> None:
        self.name = identity.caller.name
        self.node_id = identity.caller.node_id
        self._app = app
        credentials = grpc.ssl_channel_credentials(identity.ca, identity.key, identity.cert)
        self.channel = grpc.secure_channel(
            address, credentials, [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]
        )
        self.stub = FleetStub(self.channel)
        self._kept: list[pb.ServerMessage] = []
        self._out: queue.SimpleQueue[pb.DeviceMessage | None] = queue.SimpleQueue()
        self._in: Any = None

    def hello(self, **changes: Any) -> pb.DeviceMessage:
        app = self._app
        hello = pb.Hello(
            protocol=PROTOCOL_VERSION,
            name=self.name,
            app=pb.App(name=app.name, version=app.version, sha256=app.sha256),
            slots=1,
            instance=b"raw",
        )
        hello.MergeFrom(pb.Hello(**changes))
        return pb.DeviceMessage(hello=hello)

    def connect(self, first: pb.DeviceMessage | None = None) -> pb.ServerMessage:
        """Opens the stream with a first message, a good hello unless told otherwise. Returns the first answer."""
        self._out = queue.SimpleQueue()
        self._out.put(self.hello() if first is None else first)
        self._in = self.stub.Connect(iter(self._out.get, None), timeout=2 * SECONDS)
        return self.next()

    def next(self) -> pb.ServerMessage:
        message: pb.ServerMessage = next(self._in)
        return message

    def read(self, kind: str) -> Any:
        """The first message of a kind that was not read yet; others are kept for later."""
        for message in self._kept:
            if message.WhichOneof("kind") == kind:
                self._kept.remove(message)
                return getattr(message, kind)
        while (message := self.next()).WhichOneof("kind") != kind:
            self._kept.append(message)
        return getattr(message, kind)

    def say(self, **kind: Any) -> None:
        self._out.put(pb.DeviceMessage(**kind))

    def answer(self, offer: pb.Offer, payload: pb.Payload, **more: Any) -> pb.Receipt:
        """Replies to an offer. Returns the receipt."""
        self.say(result=pb.Result(task_id=offer.task_id, payload=payload, **more))
        receipt: pb.Receipt = self.read("receipt")
        return receipt

    def store(self, task_id: int, name: bytes, size: int, *chunks: bytes) -> list[pb.StoreState]:
        """Stores a blob in the chunks given."""
        first = pb.StoreChunk(task_id=task_id, name=name, size=size)
        messages = [first, *(pb.StoreChunk(data=chunk) for chunk in chunks)]
        return list(self.stub.Store(iter(messages), timeout=SECONDS))

    def slow_store(self, task_id: int, name: bytes, size: int) -> SlowStore:
        """Begins to store a blob."""
        return SlowStore(self.stub, pb.StoreChunk(task_id=task_id, name=name, size=size))

    def fetch(self, task_id: int, name: bytes, offset: int = 0) -> bytes:
        request = pb.FetchRequest(task_id=task_id, name=name, offset=offset)
        return b"".join(chunk.data for chunk in self.stub.Fetch(request, timeout=SECONDS))

    def devices(self) -> list[pb.DeviceState]:
        """What operators may ask."""
        return list(self.stub.Devices(pb.DevicesRequest(), timeout=SECONDS).devices)

    def finish(self) -> None:
        """Says nothing more, and waits until the server ends the stream."""
        self._out.put(None)
        for _ in self._in:
            pass

    def hang_up(self) -> None:
        """Ends the stream as a broken connection does."""
        if self._in is not None:
            self._in.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.hang_up()
        self._out.put(None)
        self.channel.close()


class SlowStore:
    """A transfer that waits for what to say next. `offset` is what the server had before."""

    def __init__(self, stub: FleetStub, first: pb.StoreChunk) -> None:
        self._out: queue.SimpleQueue[pb.StoreChunk | None] = queue.SimpleQueue()
        self._out.put(first)
        self._in = stub.Store(iter(self._out.get, None), timeout=SECONDS)
        self.offset = next(self._in).offset

    def send(self, data: bytes) -> None:
        self._out.put(pb.StoreChunk(data=data))

    def end(self) -> list[pb.StoreState]:
        """Says nothing more. Returns the server's last words."""
        self._out.put(None)
        return list(self._in)


def refusal(call: Callable[..., Any], *arguments: Any) -> tuple[grpc.StatusCode, str]:
    """The status with which a gRPC call ends."""
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments)
    return caught.value.code(), caught.value.details() or ""


def encode_inline(content: RecordDict) -> pb.Payload:
    """A payload whose blobs ride along in it."""
    return encode(content, lambda buffers: inline_blob(buffers) or pb.Blob())


def good_reply() -> pb.Payload:
    """What a sound ClientApp replies to a message of `PuppetFleet.push`."""
    arrays = ArrayRecord({"w": Array(np.full(3, 2, np.float32))})
    return encode_inline(RecordDict({"model": arrays, "metrics": MetricRecord({"num-examples": 1})}))
