"""Fetch and Store, abused: a device reads its own tasks' models and writes its own replies, within the limit."""

from __future__ import annotations

import queue
from collections.abc import Iterator

import grpc
import pytest

from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.blobs import digest
from tests.fleets import PuppetFleet
from tests.raw_device import SECONDS, RawDevice, refusal
from tests.server.conftest import MAX_REPLY_BYTES


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
    data = raw.fetch(offer.task_id, blob.name)
    assert digest([data]) == blob.name
    assert raw.fetch(offer.task_id, blob.name, blob.size - 10) == data[-10:]
    assert raw.fetch(offer.task_id, blob.name, blob.size) == b""
    missing = grpc.StatusCode.NOT_FOUND
    for beyond in (blob.size + 1, 1 << 63):
        assert refusal(raw.fetch, offer.task_id, blob.name, beyond)[0] == missing
    assert refusal(raw.fetch, 1 << 50, blob.name)[0] == missing
    code, reason = refusal(raw.fetch, offer.task_id, bytes(32))
    assert code == missing and f"task {offer.task_id} has no blob" in reason
    with fleet.raw("thief") as thief:
        code, reason = refusal(thief.fetch, offer.task_id, blob.name)
        assert code == missing and f"thief holds no task {offer.task_id}" in reason
        code, reason = refusal(thief.store, offer.task_id, bytes(32), 1, b"x")
        assert code == missing


def test_a_queued_task_is_not_held(fleet: PuppetFleet, held: tuple[RawDevice, pb.Offer]) -> None:
    raw, offer = held
    waiting = int(fleet.push("porter", size=100_000))
    assert refusal(raw.fetch, waiting, offer.payload.blobs[0].name)[0] == grpc.StatusCode.NOT_FOUND
    assert refusal(raw.store, waiting, bytes(32), 1, b"x")[0] == grpc.StatusCode.NOT_FOUND


def test_store_cut_short_goes_on_where_it_stopped(held: tuple[RawDevice, pb.Offer]) -> None:
    raw, offer = held
    data = bytes(range(256)) * 8192
    name = digest([data])
    code, reason = refusal(raw.store, offer.task_id, name, len(data), data[:1_000_000])
    assert code == grpc.StatusCode.DATA_LOSS and f"1000000 of {len(data)} bytes arrived" in reason
    states = raw.store(offer.task_id, name, len(data), data[1_000_000:])
    assert [(state.offset, state.complete) for state in states] == [(1_000_000, False), (len(data), True)]
    assert raw.store(offer.task_id, name, len(data))[-1].complete


def test_store_of_other_bytes(held: tuple[RawDevice, pb.Offer]) -> None:
    raw, offer = held
    lost = grpc.StatusCode.DATA_LOSS
    code, reason = refusal(raw.store, offer.task_id, bytes(32), 5, b"12345")
    assert code == lost and "are not those announced" in reason
    code, reason = refusal(raw.store, offer.task_id, bytes(32), 5, b"123456")
    assert code == lost and "more than the 5 bytes announced" in reason
    for name in (b"", b"short", bytes(33)):
        code, reason = refusal(raw.store, offer.task_id, name, 5, b"12345")
        assert code == lost and "named by 32 bytes" in reason


def test_store_of_too_much(fleet: PuppetFleet, held: tuple[RawDevice, pb.Offer]) -> None:
    raw, offer = held
    code, reason = refusal(raw.store, offer.task_id, bytes(32), 1 << 60)
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert f"a blob of {1 << 60} bytes is refused: a reply may have at most {MAX_REPLY_BYTES}" in reason
    half = MAX_REPLY_BYTES // 2 + 1
    for index in (1, 2):  # each is small enough, both are not; neither is complete
        code, _ = refusal(raw.store, offer.task_id, bytes([index]) * 32, half, bytes(half - 1))
    assert code == grpc.StatusCode.RESOURCE_EXHAUSTED
    stored = (fleet.directory / "state" / "server" / "runs").glob(f"*/updates/{offer.task_id}/*")
    assert sum(path.stat().st_size for path in stored) <= MAX_REPLY_BYTES


def test_a_newer_transfer_replaces_an_older(held: tuple[RawDevice, pb.Offer]) -> None:
    """A device that lost its connection sends again while the server still waits on the line that is dead."""
    raw, offer = held
    data = bytes(range(256)) * 4096
    name = digest([data])
    older = raw.slow_store(offer.task_id, name, len(data))
    older.send(data[:1000])
    newer = raw.slow_store(offer.task_id, name, len(data))
    newer.send(data[newer.offset :])
    assert newer.end()[-1].complete
    older.send(data[1000:2000])
    assert refusal(older.end)[0] in (grpc.StatusCode.ABORTED, grpc.StatusCode.DATA_LOSS)
    assert raw.answer(offer, pb.Payload(blobs=[pb.Blob(name=name, size=len(data))])).verdict == pb.ACCEPTED


def test_a_transfer_ends_with_its_task(fleet: PuppetFleet) -> None:
    with fleet.raw("late") as raw:
        raw.connect()
        message = fleet.push("late", ttl=0.5)
        offer = raw.read("offer")
        transfer = raw.slow_store(offer.task_id, bytes(32), 1000)
        assert fleet.pull(message)["code"] == 3
        transfer.send(b"x")
        code, reason = refusal(transfer.end)
        assert code == grpc.StatusCode.NOT_FOUND and "it may be over" in reason
    assert not list((fleet.directory / "state" / "server" / "runs").glob(f"*/updates/{offer.task_id}"))


def test_store_that_says_nothing(fleet: PuppetFleet) -> None:
    with fleet.raw("mute") as raw:
        silent = raw.stub.Store(iter(queue.SimpleQueue[pb.StoreChunk]().get, None), timeout=SECONDS)
        assert refusal(next, silent)[0] == grpc.StatusCode.DEADLINE_EXCEEDED
