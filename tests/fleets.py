"""What tests of whole fleets stand on: a server whose ServerApp is on strings, a device made of bare gRPC, a bad line."""

from __future__ import annotations

import contextlib
import json
import queue
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO, TypeVar

import grpc
import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

from fedpace.certs.identity import Identity, load_identity, node_id
from fedpace.hosting.app import AppFolder, load_app_folder
from fedpace.localfleet import LocalFleet
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.blobs import inline_blob
from fedpace.protocol.fleet_pb2_grpc import FleetStub
from fedpace.protocol.limits import PROTOCOL_VERSION
from fedpace.protocol.records import encode

SECONDS = 30.0
"""The end of every wait for what takes a second on a machine that is not busy."""

T = TypeVar("T")
Settings = Mapping[str, float | bool]


def wait_for(look: Callable[[], T | None], what: str, seconds: float = SECONDS) -> T:
    """What `look` finds, as soon as it finds something that is neither None nor false."""
    until = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < until, f"{what}: not within {seconds:g} s"
        time.sleep(0.02)
    return found


def copy_app(
    target: Path, *, server: Settings | None = None, device: Settings | None = None, change: tuple[str, str, str] | None = None
) -> Path:
    """The misbehaving app with settings of its own; `change` replaces a text in one of its files (name, old, new)."""
    source = Path(__file__).with_name("flower") / "misbehaving"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    with (target / "pyproject.toml").open("a") as file:
        for table, settings in (("server", server), ("device", device)):
            file.write(f"\n[tool.fedpace.{table}]\n")
            file.writelines(f"{key} = {json.dumps(value)}\n" for key, value in (settings or {}).items())
    if change is not None:
        name, old, new = change
        text = (target / name).read_text()
        assert old in text
        (target / name).write_text(text.replace(old, new))
    return target


class PuppetFleet(LocalFleet):
    """A fleet whose ServerApp does what the test says: see tests/flower/misbehaving."""

    def __init__(self, directory: Path, *, server: Settings | None = None, device: Settings | None = None) -> None:
        super().__init__(directory, copy_app(directory / "app", server=server, device=device))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(SECONDS)
        self._strings: TextIO | None = None

    @property
    def authority(self) -> Path:
        return self.directory / "certs"

    def start(self, *options: str, address: str = "127.0.0.1:0") -> Self:
        """Starts the server, whose ServerApp waits for no device."""
        config = f"port={self._listener.getsockname()[1]}"
        self.start_server("--min-nodes", "0", "--run-config", config, *options, address=address)
        self._strings = None
        return self

    def order(self, do: str, **what: Any) -> Any:
        """Has the ServerApp do something. Returns its answer."""
        self.send_order(do, **what)
        return self.read_answer()

    def send_order(self, do: str, **what: Any) -> None:
        if self._strings is None:
            connection, _ = self._listener.accept()
            connection.settimeout(2 * SECONDS)
            self._strings = connection.makefile("rw")
            connection.close()
        self._strings.write(json.dumps({"do": do, **what}) + "\n")
        self._strings.flush()

    def read_answer(self) -> Any:
        assert self._strings is not None
        return json.loads(self._strings.readline() or "null")

    def join(self, name: str, *options: str, app: Path | None = None) -> None:
        """Starts a device and waits until the ServerApp sees it."""
        self.start_device(name, *options, app=app)
        self.wait_node(name)

    def wait_node(self, name: str, *, there: bool = True) -> None:
        """Waits until the ServerApp sees a device, or sees it no more."""
        wait_for(lambda: (node_id(name) in self.order("nodes")) is there, f"{name} there: {there}\n{self.log('server')}")

    def push(
        self, name: str, do: str = "well", *, kind: str = "train", size: int = 3, records: int = 1,
        ttl: float | None = None, **order: Any,
    ) -> str:
        """Sends a device a message: `records` models of `size` ones, and an order for its ClientApp."""
        order = {"do": do, **order}
        sent: str = self.order("push", node=node_id(name), kind=kind, order=order, size=size, records=records, ttl=ttl)
        return sent

    def pull(self, message_id: str, seconds: float = SECONDS) -> dict[str, Any]:
        """The answer to a message, as the ServerApp sees it."""
        found: dict[str, Any] | None = self.order("pull", message_id=message_id, seconds=seconds)
        assert found is not None, f"no answer to message {message_id} within {seconds} s:\n{self.log('server')}"
        return found

    def ask(self, name: str, do: str = "well", **order: Any) -> dict[str, Any]:
        """Sends a device a message and waits for the answer."""
        return self.pull(self.push(name, do, **order))

    def wait_log(self, name: str, text: str, *, count: int = 1, seconds: float = SECONDS) -> str:
        """Waits until a process has logged a text so many times. Returns its log."""
        with contextlib.suppress(AssertionError):
            wait_for(lambda: self.log(name).count(text) >= count, text, seconds)
        log = self.log(name)
        assert log.count(text) >= count, f"{name} did not log {text!r} {count} times within {seconds:g} s:\n{log[-3000:]}"
        return log

    def result(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / "result.json").read_text())
        return found

    def end(self) -> dict[str, Any]:
        """Lets the ServerApp return. Returns the run's result."""
        self.send_order("return")
        assert self.wait(SECONDS) == 0, self.log("server")
        return self.result()

    def identity(self, name: str) -> Identity:
        """A device's identity; its certificate is made where it has none."""
        from fedpace.certs.authority import issue_device

        if not (self.authority / "devices" / name).exists():
            issue_device(self.authority, name)
        return load_identity(self.authority, expect_role="device", name=name)

    @contextlib.contextmanager
    def raw(self, name: str) -> Iterator[RawDevice]:
        """A device of this fleet that is not ours."""
        with RawDevice(self.address, self.identity(name), load_app_folder(self.app)) as device:
            yield device

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._strings is not None:
            self._strings.close()  # the ServerApp returns, and its server has nothing to wait for
        super().__exit__(kind, error, trace)
        self._listener.close()


class RawDevice:
    """Bare gRPC with a device's certificate: says what it is told to, well formed or not. Every call has an end."""

    def __init__(self, address: str, identity: Identity, app: AppFolder) -> None:
        self.name = identity.caller.name
        self.node_id = identity.caller.node_id
        self._app = app
        credentials = grpc.ssl_channel_credentials(identity.ca, identity.key, identity.cert)
        self.channel = grpc.secure_channel(address, credentials, [("grpc.use_local_subchannel_pool", 1)])
        self.stub = FleetStub(self.channel)
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
        """The next message of a kind, others passed over."""
        while (message := self.next()).WhichOneof("kind") != kind:
            pass
        return getattr(message, kind)

    def say(self, **kind: Any) -> None:
        self._out.put(pb.DeviceMessage(**kind))

    def answer(self, offer: pb.Offer, payload: pb.Payload, **more: Any) -> pb.Receipt:
        """Replies to an offer. Returns the receipt."""
        self.say(result=pb.Result(task_id=offer.task_id, payload=payload, **more))
        receipt: pb.Receipt = self.read("receipt")
        return receipt

    def store(self, task_id: int, sha256: bytes, size: int, *chunks: bytes) -> list[pb.StoreState]:
        """Stores a blob in the chunks given."""
        first = pb.StoreChunk(task_id=task_id, sha256=sha256, size=size)
        messages = [first, *(pb.StoreChunk(data=chunk) for chunk in chunks)]
        return list(self.stub.Store(iter(messages), timeout=SECONDS))

    def fetch(self, task_id: int, sha256: bytes, offset: int = 0) -> bytes:
        request = pb.FetchRequest(task_id=task_id, sha256=sha256, offset=offset)
        return b"".join(chunk.data for chunk in self.stub.Fetch(request, timeout=SECONDS))

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


def good_reply(size: int = 3) -> pb.Payload:
    """What a sound ClientApp replies to a message of `PuppetFleet.push`."""
    arrays = ArrayRecord({"w": Array(np.full(size, 2, np.float32))})
    payload = encode(RecordDict({"model": arrays, "metrics": MetricRecord({"num-examples": 1})}), lambda b: inline_blob(b) or pb.Blob())
    return payload


class BadLine:
    """A TCP line to an address that can be cut, after some bytes too, or held: then nothing passes from the device."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: set[socket.socket] = set()
        self._flowing = threading.Event()
        self._flowing.set()
        self._left = {"up": float("inf"), "down": float("inf")}
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def hold(self) -> None:
        self._flowing.clear()

    def cut_after(self, **left: int) -> None:
        """Cuts the line once so many bytes more have gone `up` to the server or `down` to the device."""
        self._left |= left

    def cut(self) -> None:
        self.cuts += 1
        self._left = {"up": float("inf"), "down": float("inf")}
        for end in list(self._sockets):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._sockets.clear()
        self._flowing.set()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target, SECONDS)
                far.settimeout(None)
                self._sockets |= {near, far}
                for source, sink, way in ((near, far, "up"), (far, near, "down")):
                    threading.Thread(target=self._pump, args=(source, sink, way), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        with contextlib.suppress(OSError), source:
            while data := source.recv(1 << 16):
                if way == "up":
                    self._flowing.wait(SECONDS)
                self._left[way] -= len(data)
                if self._left[way] < 0:
                    self.cut()
                    return
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.close()
        self.cut()
