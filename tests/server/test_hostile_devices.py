"""Devices that are not ours, over real connections: each gets a clear no, and nobody else notices."""

from __future__ import annotations

import hashlib
import queue
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

from fedpace.certs.authority import init_authority, issue_device
from fedpace.certs.identity import load_identity
from fedpace.hosting.app import load_app_folder
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.blobs import inline_blob
from fedpace.protocol.fleet_pb2_grpc import FleetStub
from fedpace.protocol.records import encode
from tests.fleets import SECONDS, PuppetFleet, RawDevice, good_reply, wait_for

MAX_REPLY_BYTES = 6 << 20
SETTINGS = {
    "hello-seconds": 0.5,
    "heartbeat-seconds": 0.5,
    "lost-after-seconds": 8,
    "reconnect-grace-seconds": 0.5,
    "max-reply-bytes": MAX_REPLY_BYTES,
    "log-lines-per-second": 50,
}


@pytest.fixture(scope="module")
def hall(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PuppetFleet]:
    """A fleet with one honest device, in which all of these tests misbehave."""
    with PuppetFleet(tmp_path_factory.mktemp("hall"), server=SETTINGS) as fleet:
        fleet.start().join("honest")
        fleet.ask("honest")
        yield fleet


@pytest.fixture
def fleet(hall: PuppetFleet) -> Iterator[PuppetFleet]:
    """The same; afterwards the honest device works on, by the same process, over the same connection."""
    before = hall.ask("honest")["metrics"]
    yield hall
    after = hall.ask("honest")["metrics"]
    assert (after["pid"], after["calls"]) == (before["pid"], before["calls"] + 1)
    assert hall.log("server").count("honest joined") == 1
    assert "Traceback" not in hall.log("server")


def refusal(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    """The status with which a call ends."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


def reply_with(array: np.ndarray[Any, Any], name: str = "w") -> pb.Payload:
    return encode(RecordDict({"model": ArrayRecord({name: Array(array)})}), lambda b: inline_blob(b) or pb.Blob())


# Hello


def test_another_name_than_the_certificates(fleet: PuppetFleet) -> None:
    with fleet.raw("mallory") as raw:
        hello = raw.hello()
        hello.hello.name = "honest"
        refused = raw.connect(hello).refused
    assert refused.final and "'honest' is not the name in the certificate, which is 'mallory'" in refused.reason
    assert refused.reason in fleet.log("server")


@pytest.mark.parametrize("field", ["name", "version", "sha256"])
def test_another_app(fleet: PuppetFleet, field: str) -> None:
    app = load_app_folder(fleet.app)
    with fleet.raw("mallory") as raw:
        hello = raw.hello()
        setattr(hello.hello.app, field, "0123456789abcdef")
        refused = raw.connect(hello).refused
    theirs = hello.hello.app
    assert refused.final
    assert f"mallory has the app {theirs.name} {theirs.version} ({theirs.sha256[:12]})" in refused.reason
    assert f"this server runs {app.name} {app.version} ({app.sha256[:12]})" in refused.reason
    assert refused.reason in fleet.log("server")


def test_another_protocol(fleet: PuppetFleet) -> None:
    with fleet.raw("mallory") as raw:
        refused = raw.connect(raw.hello(protocol=99)).refused
    assert refused.final and "mallory speaks protocol 99, this server 1; install the same fedpace" in refused.reason


def test_a_stream_that_says_nothing(fleet: PuppetFleet) -> None:
    with fleet.raw("mute") as raw:
        started = time.monotonic()
        silent = raw.stub.Connect(iter(queue.SimpleQueue[pb.DeviceMessage]().get, None), timeout=SECONDS)
        assert refusal(lambda: next(silent)) == (grpc.StatusCode.DEADLINE_EXCEEDED, "mute opened a stream and said nothing for 0.5 s")
        assert time.monotonic() - started < 5
    assert "mute opened a stream and said nothing for 0.5 s" in fleet.log("server")


def test_a_stream_that_ends_at_once(fleet: PuppetFleet) -> None:
    with fleet.raw("mute") as raw:
        code, reason = refusal(lambda: next(raw.stub.Connect(iter(()), timeout=SECONDS)))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert reason == "mute opened a stream and closed it before it said anything" and reason in fleet.log("server")


def test_a_first_message_that_is_no_hello(fleet: PuppetFleet) -> None:
    with fleet.raw("rude") as raw:
        code, reason = refusal(lambda: raw.connect(pb.DeviceMessage(heartbeat=pb.Heartbeat(load=1))))
    assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "the first message on a stream is a hello")
    assert "rude" in fleet.log("server")


@pytest.mark.parametrize("after_hello", [False, True])
def test_messages_that_cannot_be_parsed(fleet: PuppetFleet, after_hello: bool) -> None:
    with fleet.raw("garbler") as raw:
        first = [raw.hello().SerializeToString()] if after_hello else []
        connect: grpc.StreamStreamMultiCallable[bytes, bytes] = raw.channel.stream_stream("/fedpace.v1.Fleet/Connect")
        answers = connect(iter([*first, b"\xff\xff garbage \xff"]), timeout=SECONDS)
        if after_hello:
            assert pb.ServerMessage.FromString(next(answers)).HasField("welcome")
            refused = pb.ServerMessage.FromString(next(answers)).refused
            assert not refused.final and "it sent what cannot be read" in refused.reason
            fleet.wait_log("server", "garbler left: it sent what cannot be read")
        else:
            code, reason = refusal(lambda: next(answers))
            assert code == grpc.StatusCode.INVALID_ARGUMENT and "began with what cannot be read" in reason
            assert reason in fleet.log("server")


def test_a_message_over_the_limit(fleet: PuppetFleet) -> None:
    """gRPC refuses it before it takes the memory; the device may come back."""
    with fleet.raw("loud") as raw:
        raw.connect()
        raw.say(log=pb.Log(lines=["x" * (5 << 20)]))
        code, _ = refusal(lambda: raw.read("receipt"))
        assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
        fleet.wait_log("server", "loud left: ")
        assert raw.connect().HasField("welcome")


def test_the_newer_of_two_connections_stays(fleet: PuppetFleet) -> None:
    with fleet.raw("twice") as older, fleet.raw("twice") as newer:
        older.connect()
        message = fleet.push("twice")
        first = older.read("offer")
        assert newer.connect(newer.hello(instance=b"another")).HasField("welcome")
        refused = older.read("refused")
        assert refused.final and "another connection with this device's identity" in refused.reason
        offer = newer.read("offer")
        assert offer.task_id == first.task_id and newer.answer(offer, good_reply()).verdict == pb.ACCEPTED
    assert fleet.pull(message)["sums"] == {"model/w": 6}
    assert "twice connected from elsewhere too" in fleet.log("server")


# Roles and certificates


def test_an_operator_is_no_device(fleet: PuppetFleet) -> None:
    operator = fleet.operator()
    assert operator is not None
    with RawDevice(fleet.address, operator, load_app_folder(fleet.app)) as raw:
        denied = grpc.StatusCode.PERMISSION_DENIED
        assert refusal(raw.connect) == (denied, "Connect is for device, not for operator")
        assert refusal(lambda: raw.fetch(1, bytes(32))) == (denied, "Fetch is for device, not for operator")
        assert refusal(lambda: raw.store(1, bytes(32), 1)) == (denied, "Store is for device, not for operator")


def test_a_device_is_no_operator(fleet: PuppetFleet) -> None:
    with fleet.raw("curious") as raw:
        code, reason = refusal(lambda: raw.stub.Devices(pb.DevicesRequest(), timeout=SECONDS))
    assert (code, reason) == (grpc.StatusCode.PERMISSION_DENIED, "Devices is for admin or operator, not for device")


def test_a_name_in_the_metadata_counts_for_nothing(fleet: PuppetFleet) -> None:
    with fleet.raw("mallory") as raw:
        stream = raw.stub.Connect(iter([raw.hello()]), metadata=[("fedpace-name", "honest")], timeout=SECONDS)
        assert next(stream).welcome.node_id == raw.node_id


def test_certificates_of_nobody_and_of_strangers(fleet: PuppetFleet, tmp_path: Any) -> None:
    init_authority(tmp_path)
    issue_device(tmp_path, "honest")
    ours, stranger = fleet.identity("honest"), load_identity(tmp_path, expect_role="device", name="honest")
    for credentials in (
        grpc.ssl_channel_credentials(ours.ca),
        grpc.ssl_channel_credentials(ours.ca, stranger.key, stranger.cert),
        grpc.ssl_channel_credentials(stranger.ca, stranger.key, stranger.cert),
    ):
        with grpc.secure_channel(fleet.address, credentials) as channel:
            code, _ = refusal(lambda stub=FleetStub(channel): stub.Devices(pb.DevicesRequest(), timeout=SECONDS))
            assert code == grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("garbage", [b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", bytes(range(256)) * 64], ids=["silence", "http", "noise"])
def test_garbage_on_the_port(fleet: PuppetFleet, garbage: bytes) -> None:
    host, _, port = fleet.address.rpartition(":")
    with socket.create_connection((host, int(port)), SECONDS) as connection:
        connection.sendall(garbage)
        time.sleep(0.1)


def test_garbage_inside_tls(fleet: PuppetFleet) -> None:
    fleet.identity("garbler")
    folder = fleet.authority / "devices" / "garbler"
    context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    context.set_alpn_protocols(["h2"])
    host, _, port = fleet.address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), SECONDS) as connection,
        context.wrap_socket(connection, server_hostname=host) as channel,
    ):
        channel.sendall(b"this is not HTTP/2 " * 100)
        while channel.recv(1 << 16):
            pass


# Replies


def truncated() -> pb.Payload:
    payload = good_reply()
    payload.blobs[0].data = payload.blobs[0].data[:-1]
    return payload


def altered() -> pb.Payload:
    payload = good_reply()
    payload.blobs[0].data = payload.blobs[0].data[:-1] + b"\1"
    return payload


def another_head(head: bytes) -> pb.Payload:
    payload = good_reply()
    payload.head = head
    return payload


def indexed(change: Callable[[pb.ArrayEntry], Any], index: Callable[[pb.ArrayIndex], Any] = lambda index: None) -> pb.Payload:
    """A good reply whose head says something else of its array."""
    payload = good_reply()
    head = pb.Records.FromString(payload.head)
    change(head.record[0].arrays.array[0])
    index(head.record[0].arrays)
    payload.head = head.SerializeToString()
    return payload


def header(text: bytes) -> pb.Payload:
    """An array whose .npy header is what it is told to be."""
    body = b"\x93NUMPY\1\0" + len(text).to_bytes(2, "little") + text
    body += bytes(-len(body) % 64)
    blob = inline_blob([body]) or pb.Blob()
    entry = pb.ArrayEntry(name="x", dtype="float32", shape=[3], stype="numpy.ndarray", size=len(body))
    head = pb.Records(record=[pb.Record(name="model", arrays=pb.ArrayIndex(array=[entry]))])
    return pb.Payload(head=head.SerializeToString(), blobs=[blob])


NAN, INFINITE = np.array([1, np.nan, 1], np.float32), np.array([1, 1, -np.inf], np.float32)
UNSTORED = pb.Payload(head=good_reply().head, blobs=[pb.Blob(sha256=bytes(32), size=192)])
ENORMOUS = pb.Payload(head=good_reply().head, blobs=[pb.Blob(sha256=bytes(32), size=1 << 60)])
SPOILT: dict[str, tuple[pb.Payload, str]] = {
    "truncated": (truncated(), "truncated or altered"),
    "altered": (altered(), "truncated or altered"),
    "never stored": (UNSTORED, "never stored here"),
    "announced too large": (ENORMOUS, f"at most {MAX_REPLY_BYTES} are taken"),
    "garbage head": (another_head(b"\xff\xfe\xfd"), "is not a serialised Records"),
    "shape": (reply_with(np.ones(4, np.float32)), "is float32[4], but float32[3] was sent out"),
    "dtype": (reply_with(np.ones(3, np.int32)), "is int32[3], but float32[3] was sent out"),
    "nan": (reply_with(NAN), "array 'w' of record 'model' holds NaN or infinite numbers"),
    "infinite": (reply_with(INFINITE), "holds NaN or infinite numbers"),
    "nan in another array": (reply_with(NAN, "v"), "array 'v' of record 'model' holds NaN or infinite numbers"),
    "lies about its dtype": (indexed(lambda entry: setattr(entry, "name", "v") or setattr(entry, "dtype", "int32")), "says int32[3] but holds float32[3]"),
    "lies about its size": (indexed(lambda entry: setattr(entry, "size", 1 << 40)), "the arrays take"),
    "blob out of range": (indexed(lambda entry: None, lambda index: setattr(index, "blob", 7)), "points at blob 7 of 1"),
    "no .npy": (header(b"rubbish"), "not a .npy array"),
    "a header that recurses": (header(b"-" * 9000 + b"1"), "not a .npy array"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_reply(fleet: PuppetFleet, case: str) -> None:
    """The sender hears why, the ServerApp gets an error in its place, and the next task goes on."""
    payload, reason = SPOILT[case]
    with fleet.raw("spoiler") as raw:
        raw.connect()
        message, following = fleet.push("spoiler"), fleet.push("spoiler")
        receipt = raw.answer(raw.read("offer"), payload)
        assert receipt.verdict == pb.REJECTED and reason in receipt.reason
        answer = fleet.pull(message)
        assert answer["code"] == 4 and reason in answer["reason"]
        assert raw.answer(raw.read("offer"), good_reply()).verdict == pb.ACCEPTED
        assert fleet.pull(following)["code"] is None
    assert "spoiler: the reply to task" in fleet.log("server") and reason in fleet.log("server")


def test_a_result_that_says_nothing(fleet: PuppetFleet) -> None:
    with fleet.raw("spoiler") as raw:
        raw.connect()
        message = fleet.push("spoiler")
        raw.say(result=pb.Result(task_id=raw.read("offer").task_id))
        assert raw.read("receipt").verdict == pb.REJECTED
    assert "neither" in fleet.pull(message)["reason"]


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0])
def test_an_impossible_compute_time(fleet: PuppetFleet, seconds: float) -> None:
    """Deadlines are set by it."""
    with fleet.raw("spoiler") as raw:
        raw.connect()
        message = fleet.push("spoiler")
        receipt = raw.answer(raw.read("offer"), good_reply(), compute_seconds=seconds)
        assert receipt.verdict == pb.REJECTED and "compute" in receipt.reason
    assert fleet.pull(message)["code"] == 4


def test_a_large_reply_is_checked_too(fleet: PuppetFleet) -> None:
    """Over a megabyte the check runs in a thread."""
    numbers = np.ones(500_000, np.float32)
    numbers[-1] = np.nan
    buffers: list[bytes] = []
    payload = encode(
        RecordDict({"model": ArrayRecord({"w": Array(numbers)})}),
        lambda b: buffers.extend(b) or pb.Blob(sha256=hashlib.sha256(b"".join(b)).digest(), size=sum(map(len, b))),
    )
    data = b"".join(buffers)
    with fleet.raw("spoiler") as raw:
        raw.connect()
        message = fleet.push("spoiler", size=500_000)
        offer = raw.read("offer")
        assert raw.store(offer.task_id, payload.blobs[0].sha256, len(data), data)[-1].complete
        receipt = raw.answer(offer, payload)
        assert receipt.verdict == pb.REJECTED and "NaN" in receipt.reason
    assert fleet.pull(message)["code"] == 4
    folder = fleet.directory / "state" / "server" / "runs"
    assert not list(folder.glob(f"*/updates/{offer.task_id}")), "its bytes are still on disk"


def test_replies_nobody_waits_for(fleet: PuppetFleet) -> None:
    with fleet.raw("eager") as raw, fleet.raw("owner") as owner:
        raw.connect()
        unknown = raw.answer(pb.Offer(task_id=1 << 50), good_reply())
        assert unknown.verdict == pb.UNKNOWN and "there is no task" in unknown.reason

        owner.connect()
        message = fleet.push("owner")
        offer = owner.read("offer")
        others = raw.answer(offer, reply_with(np.full(3, 99, np.float32)))
        assert others.verdict == pb.UNKNOWN
        assert owner.answer(offer, good_reply()).verdict == pb.ACCEPTED
        assert fleet.pull(message)["sums"] == {"model/w": 6}

        again = owner.answer(offer, good_reply())
        assert again.verdict == pb.DUPLICATE and "was answered before" in again.reason


def test_a_reply_after_its_time(fleet: PuppetFleet) -> None:
    with fleet.raw("late") as raw:
        raw.connect()
        message = fleet.push("late", ttl=0.5)
        offer = raw.read("offer")
        answer = fleet.pull(message)
        assert answer["code"] == 3 and "no reply within its time to live of 0.5 s" in answer["reason"]
        assert list(raw.read("cancel").task_ids) == [offer.task_id]
        receipt = raw.answer(offer, good_reply())
        assert receipt.verdict == pb.EXPIRED and "is over" in receipt.reason


def test_hello_claims_tasks_of_others(fleet: PuppetFleet) -> None:
    with fleet.raw("owner") as owner, fleet.raw("thief") as thief:
        run = owner.connect().welcome.run
        message = fleet.push("owner")
        offer = owner.read("offer")
        welcome = thief.connect(thief.hello(tasks=[offer.task_id, 1 << 50], run_id=run.run_id)).welcome
        assert sorted(welcome.forget) == [offer.task_id, 1 << 50]
        assert owner.answer(offer, good_reply()).verdict == pb.ACCEPTED
        assert fleet.pull(message)["code"] is None


# Blobs


@pytest.fixture
def held(fleet: PuppetFleet) -> Iterator[tuple[RawDevice, pb.Offer]]:
    """A device that holds a task whose model is large enough to be fetched."""
    with fleet.raw("porter") as raw:
        raw.connect()
        message = fleet.push("porter", size=100_000)
        yield raw, raw.read("offer")
        fleet.order("pull", message_id=message, seconds=0)


def test_fetch_only_what_is_ones_own(fleet: PuppetFleet, held: tuple[RawDevice, pb.Offer]) -> None:
    raw, offer = held
    (blob,) = offer.payload.blobs
    data = raw.fetch(offer.task_id, blob.sha256)
    assert hashlib.sha256(data).digest() == blob.sha256
    assert raw.fetch(offer.task_id, blob.sha256, blob.size - 10) == data[-10:]
    assert raw.fetch(offer.task_id, blob.sha256, blob.size) == b""
    missing = grpc.StatusCode.NOT_FOUND
    for beyond in (blob.size + 1, 1 << 63):
        assert refusal(lambda beyond=beyond: raw.fetch(offer.task_id, blob.sha256, beyond))[0] == missing
    assert refusal(lambda: raw.fetch(1 << 50, blob.sha256))[0] == missing
    code, reason = refusal(lambda: raw.fetch(offer.task_id, bytes(32)))
    assert code == missing and f"task {offer.task_id} has no blob" in reason
    with fleet.raw("thief") as thief:
        code, reason = refusal(lambda: thief.fetch(offer.task_id, blob.sha256))
        assert code == missing and f"thief holds no task {offer.task_id}" in reason
        code, reason = refusal(lambda: thief.store(offer.task_id, bytes(32), 1, b"x"))
        assert code == missing


def test_a_queued_task_is_not_held(fleet: PuppetFleet, held: tuple[RawDevice, pb.Offer]) -> None:
    raw, offer = held
    waiting = int(fleet.push("porter", size=100_000))
    assert refusal(lambda: raw.fetch(waiting, offer.payload.blobs[0].sha256))[0] == grpc.StatusCode.NOT_FOUND
    assert refusal(lambda: raw.store(waiting, bytes(32), 1, b"x"))[0] == grpc.StatusCode.NOT_FOUND


def test_store_cut_short_goes_on_where_it_stopped(held: tuple[RawDevice, pb.Offer]) -> None:
    raw, offer = held
    data = bytes(range(256)) * 8192
    sha256 = hashlib.sha256(data).digest()
    code, reason = refusal(lambda: raw.store(offer.task_id, sha256, len(data), data[:1_000_000]))
    assert code == grpc.StatusCode.DATA_LOSS and f"1000000 of {len(data)} bytes arrived" in reason
    states = raw.store(offer.task_id, sha256, len(data), data[1_000_000:])
    assert [(state.offset, state.complete) for state in states] == [(1_000_000, False), (len(data), True)]
    assert raw.store(offer.task_id, sha256, len(data))[-1].complete


def test_store_of_other_bytes(held: tuple[RawDevice, pb.Offer]) -> None:
    raw, offer = held
    lost = grpc.StatusCode.DATA_LOSS
    code, reason = refusal(lambda: raw.store(offer.task_id, bytes(32), 5, b"12345"))
    assert code == lost and "are not those announced" in reason
    code, reason = refusal(lambda: raw.store(offer.task_id, bytes(32), 5, b"123456"))
    assert code == lost and "more than the 5 bytes announced" in reason
    for name in (b"", b"short", bytes(33)):
        code, reason = refusal(lambda name=name: raw.store(offer.task_id, name, 5, b"12345"))
        assert code == lost and "named by 32 bytes" in reason


def test_store_of_too_much(fleet: PuppetFleet, held: tuple[RawDevice, pb.Offer]) -> None:
    raw, offer = held
    code, reason = refusal(lambda: raw.store(offer.task_id, bytes(32), 1 << 60))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert f"a blob of {1 << 60} bytes is refused: a reply may have at most {MAX_REPLY_BYTES}" in reason
    half = MAX_REPLY_BYTES // 2 + 1
    for index in (1, 2):  # each is small enough, both are not; neither is complete
        code, _ = refusal(lambda index=index: raw.store(offer.task_id, bytes([index]) * 32, half, *[bytes(half - 1)]))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    stored = (fleet.directory / "state" / "server" / "runs").glob(f"*/updates/{offer.task_id}/*")
    assert sum(path.stat().st_size for path in stored) <= MAX_REPLY_BYTES


def test_a_newer_transfer_replaces_an_older(held: tuple[RawDevice, pb.Offer]) -> None:
    """A device that lost its connection sends again while the server still waits on the line that is dead."""
    raw, offer = held
    data = bytes(range(256)) * 4096
    sha256 = hashlib.sha256(data).digest()
    slow: queue.SimpleQueue[pb.StoreChunk | None] = queue.SimpleQueue()
    slow.put(pb.StoreChunk(task_id=offer.task_id, sha256=sha256, size=len(data)))
    older = raw.stub.Store(iter(slow.get, None), timeout=SECONDS)
    assert next(older).offset == 0
    slow.put(pb.StoreChunk(data=data[:1000]))
    states = wait_for(lambda: resumed(raw, offer, sha256, data), "the newer transfer")
    assert states[-1].complete
    slow.put(pb.StoreChunk(data=data[1000:2000]))
    slow.put(None)
    refusal(lambda: list(older))
    assert raw.answer(offer, pb.Payload(head=b"", blobs=[pb.Blob(sha256=sha256, size=len(data))])).verdict == pb.ACCEPTED


def resumed(raw: RawDevice, offer: pb.Offer, sha256: bytes, data: bytes) -> list[pb.StoreState]:
    with pytest.MonkeyPatch.context():
        out: queue.SimpleQueue[pb.StoreChunk | None] = queue.SimpleQueue()
        out.put(pb.StoreChunk(task_id=offer.task_id, sha256=sha256, size=len(data)))
        call = raw.stub.Store(iter(out.get, None), timeout=SECONDS)
        first = next(call)
        out.put(pb.StoreChunk(data=data[first.offset :]))
        out.put(None)
        return [first, *call]


def test_a_transfer_ends_with_its_task(fleet: PuppetFleet) -> None:
    with fleet.raw("late") as raw:
        raw.connect()
        message = fleet.push("late", ttl=0.5)
        offer = raw.read("offer")
        slow: queue.SimpleQueue[pb.StoreChunk | None] = queue.SimpleQueue()
        slow.put(pb.StoreChunk(task_id=offer.task_id, sha256=bytes(32), size=1000))
        call = raw.stub.Store(iter(slow.get, None), timeout=SECONDS)
        next(call)
        assert fleet.pull(message)["code"] == 3
        slow.put(pb.StoreChunk(data=b"x"))
        code, reason = refusal(lambda: list(call))
        assert code == grpc.StatusCode.NOT_FOUND and "it may be over" in reason
        slow.put(None)
    assert not list((fleet.directory / "state" / "server" / "runs").glob(f"*/updates/{offer.task_id}"))


def test_store_that_says_nothing(fleet: PuppetFleet) -> None:
    with fleet.raw("mute") as raw:
        silent = raw.stub.Store(iter(queue.SimpleQueue[pb.StoreChunk]().get, None), timeout=SECONDS)
        assert refusal(lambda: next(silent))[0] == grpc.StatusCode.DEADLINE_EXCEEDED


# What a device says besides


def test_what_a_device_says_is_one_line_each(fleet: PuppetFleet) -> None:
    forged = "12:00:00 honest left: forged"
    with fleet.raw("forger") as raw:
        raw.connect()
        raw.say(log=pb.Log(lines=[f"one\n{forged}", "\x1b[2Jtwo", "x" * 100_000]))
        message = fleet.push("forger")
        failure = pb.Failure(code=2, reason=f"because\n{forged}" + "y" * 100_000)
        raw.say(result=pb.Result(task_id=raw.read("offer").task_id, failure=failure))
        assert fleet.pull(message)["code"] == 2
        raw.say(goodbye=pb.Goodbye(reason=f"bye\n{forged}"))
        raw.finish()
    log = fleet.wait_log("server", "forger left: bye")
    lines = log.splitlines()
    assert not [line for line in lines if line.startswith(forged)]
    assert "\x1b" not in log and max(map(len, lines)) < 5000


def test_a_flood_of_lines_is_counted_and_cut(fleet: PuppetFleet) -> None:
    with fleet.raw("chatty") as raw:
        raw.connect()
        for _ in range(20):
            raw.say(log=pb.Log(lines=["blah"] * 1000, dropped=5))
        message = fleet.push("chatty")
        raw.answer(raw.read("offer"), good_reply())
        fleet.pull(message)
    log = fleet.log("server")
    assert 400 <= log.count("chatty | blah") <= 600
    left_out = [int(line.partition("(")[2].split()[0]) for line in log.splitlines() if "chatty | (" in line]
    assert sum(left_out) + log.count("chatty | blah") == 20 * 1005


def test_a_device_that_does_not_read(fleet: PuppetFleet) -> None:
    """It asks and asks, and what it is told piles up: it is let go before it fills the server's memory."""
    with fleet.raw("deaf") as raw:
        raw.connect()
        for _ in range(300_000):
            raw.say(result=pb.Result(task_id=1 << 50, payload=pb.Payload()))
        fleet.wait_log("server", "deaf left: it does not read what it is sent")


# Counts


def test_the_result_counts_them(start_fleet: Callable[..., PuppetFleet]) -> None:
    """FedAvg over an honest device and one that answers twice and once badly."""
    fleet = start_fleet(server=SETTINGS)
    fleet.join("honest")
    with fleet.raw("double") as raw:
        raw.connect()
        fleet.wait_node("double")
        fleet.send_order("fedavg", rounds=2, clients=2, size=3)
        offer = raw.read("offer")
        assert raw.answer(offer, renamed(offer, 3.0)).verdict == pb.ACCEPTED
        assert raw.answer(offer, renamed(offer, 99.0)).verdict == pb.DUPLICATE
        offer = raw.read("offer")
        assert raw.answer(offer, renamed(offer, float("nan"))).verdict == pb.REJECTED
        # Round 1: the mean of 0 + 1 and 3; round 2: that plus 1 from the honest one alone.
        assert fleet.read_answer() == {"sum": 9.0}
    result = fleet.end()
    assert result["updates"] == {"received": 3, "folded": 3, "discarded": 0, "rejected": 1, "duplicate": 1}
    assert result["lost"] == []


def renamed(offer: pb.Offer, value: float) -> pb.Payload:
    """A reply with the record names of FedAvg."""
    arrays = ArrayRecord({"w": Array(np.full(3, value, np.float32))})
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1, "calls": 1, "pid": 1})})
    return encode(content, lambda b: inline_blob(b) or pb.Blob())
