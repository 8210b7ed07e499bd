"""Peers that are not what they say, or say what nobody should: each gets a clear no, and nobody else notices."""

from __future__ import annotations

import queue
import socket
import ssl
import time
from pathlib import Path

import grpc
import pytest

from fedpace.certs.authority import init_authority, issue_device
from fedpace.certs.identity import load_identity
from fedpace.hosting.app import load_app_folder
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.fleet_pb2_grpc import FleetStub
from fedpace.protocol.limits import PROTOCOL_VERSION
from tests.fleets import PuppetFleet
from tests.raw_device import SECONDS, RawDevice, good_reply, refusal

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
    said = f"mallory speaks protocol 99, this server {PROTOCOL_VERSION}; install the same fedpace"
    assert refused.final and said in refused.reason


def test_a_stream_that_says_nothing(fleet: PuppetFleet) -> None:
    with fleet.raw("mute") as raw:
        started = time.monotonic()
        silent = raw.stub.Connect(iter(queue.SimpleQueue[pb.DeviceMessage]().get, None), timeout=SECONDS)
        assert refusal(next, silent) == (
            grpc.StatusCode.DEADLINE_EXCEEDED,
            "mute opened a stream and said nothing for 0.5 s",
        )
        assert time.monotonic() - started < 5
    assert "mute opened a stream and said nothing for 0.5 s" in fleet.log("server")


def test_a_stream_that_ends_at_once(fleet: PuppetFleet) -> None:
    with fleet.raw("mute") as raw:
        code, reason = refusal(next, raw.stub.Connect(iter(()), timeout=SECONDS))
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert reason == "mute opened a stream and closed it before it said anything" and reason in fleet.log("server")


def test_a_first_message_that_is_no_hello(fleet: PuppetFleet) -> None:
    with fleet.raw("rude") as raw:
        code, reason = refusal(raw.connect, pb.DeviceMessage(heartbeat=pb.Heartbeat(load=1)))
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
            code, reason = refusal(next, answers)
            assert code == grpc.StatusCode.INVALID_ARGUMENT and "began with what cannot be read" in reason
            assert reason in fleet.log("server")


def test_a_message_over_the_limit(fleet: PuppetFleet) -> None:
    """gRPC refuses it before it takes the memory; the device may come back."""
    with fleet.raw("loud") as raw:
        raw.connect()
        raw.say(log=pb.Log(lines=["x" * (5 << 20)]))
        code, _ = refusal(raw.read, "receipt")
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
        assert refusal(raw.fetch, 1, bytes(32)) == (denied, "Fetch is for device, not for operator")
        assert refusal(raw.store, 1, bytes(32), 1) == (denied, "Store is for device, not for operator")


def test_a_device_is_no_operator(fleet: PuppetFleet) -> None:
    with fleet.raw("curious") as raw:
        code, reason = refusal(raw.devices)
    assert (code, reason) == (grpc.StatusCode.PERMISSION_DENIED, "Devices is for admin or operator, not for device")


def test_a_name_in_the_metadata_counts_for_nothing(fleet: PuppetFleet) -> None:
    with fleet.raw("mallory") as raw:
        stream = raw.stub.Connect(iter([raw.hello()]), metadata=(("fedpace-name", "honest"),), timeout=SECONDS)
        assert next(stream).welcome.node_id == raw.node_id


def test_certificates_of_nobody_and_of_strangers(fleet: PuppetFleet, tmp_path: Path) -> None:
    init_authority(tmp_path)
    issue_device(tmp_path, "honest")
    ours, stranger = fleet.identity("honest"), load_identity(tmp_path, expect_role="device", name="honest")
    for credentials in (
        grpc.ssl_channel_credentials(ours.ca),
        grpc.ssl_channel_credentials(ours.ca, stranger.key, stranger.cert),
        grpc.ssl_channel_credentials(stranger.ca, stranger.key, stranger.cert),
    ):
        with grpc.secure_channel(fleet.address, credentials) as channel:
            code, _ = refusal(FleetStub(channel).Fetch(pb.FetchRequest(), timeout=SECONDS).__next__)
            assert code == grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    "garbage", [b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", bytes(range(256)) * 64], ids=["silence", "http", "noise"]
)
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
        for _ in range(5_000):
            raw.say(result=pb.Result(task_id=1 << 50, payload=pb.Payload()))
        fleet.wait_log("server", "deaf left: it does not read what it is sent")


def test_what_operators_are_shown_is_bounded(fleet: PuppetFleet) -> None:
    operator = fleet.operator()
    assert operator is not None
    with fleet.raw("painter") as raw:
        raw.connect()
        message = fleet.push("painter")
        offer = raw.read("offer")
        for task_id in (offer.task_id, *range(1 << 50, (1 << 50) + 100)):
            raw.say(progress=pb.Progress(task_id=task_id, stage="[/red]\x1b[2J" + "x" * 1000, seconds=1))
        raw.say(heartbeat=pb.Heartbeat(load=float("nan")))
        raw.say(progress=pb.Progress(task_id=offer.task_id, stage="[/red]\x1b[2J" + "x" * 1000, seconds=1))
        assert raw.answer(pb.Offer(task_id=1 << 50), good_reply()).verdict == pb.UNKNOWN  # all that is taken in
        with RawDevice(fleet.address, operator, load_app_folder(fleet.app)) as asking:
            states = {device.name: device for device in asking.devices()}
        assert [task.stage for task in states["painter"].tasks] == ["?"] and states["painter"].load == 0
        raw.answer(offer, good_reply())
        fleet.pull(message)
