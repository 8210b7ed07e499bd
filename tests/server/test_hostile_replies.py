"""Replies that are broken, forged, late or doubled: the sender hears why, the ServerApp gets an error in their place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.blobs import digest, inline_blob
from fedpace.protocol.records import encode
from tests.conftest import StartFleet
from tests.fleets import PuppetFleet
from tests.raw_device import encode_inline, good_reply
from tests.server.conftest import MAX_REPLY_BYTES, SETTINGS


def reply_with(array: NDArray[np.generic], name: str = "w") -> pb.Payload:
    return encode_inline(RecordDict({"model": ArrayRecord({name: Array(array)})}))


def truncated() -> pb.Payload:
    payload = good_reply()
    payload.blobs[0].data = payload.blobs[0].data[:-1]
    return payload


def altered() -> pb.Payload:
    payload = good_reply()
    payload.blobs[0].data = payload.blobs[0].data[:-1] + b"\1"
    return payload


def with_metric(value: float | list[float]) -> pb.Payload:
    return encode_inline(RecordDict({"metrics": MetricRecord({"num-examples": value})}))


def another_head(head: bytes) -> pb.Payload:
    payload = good_reply()
    payload.head = head
    return payload


def lying(blob: int = 0, **entry: Any) -> pb.Payload:
    """A good reply whose head says something else of its array."""
    payload = good_reply()
    head = pb.Records.FromString(payload.head)
    arrays = head.record[0].arrays
    arrays.blob = blob
    arrays.array[0].MergeFrom(pb.ArrayEntry(**entry))
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
UNSTORED = pb.Payload(head=good_reply().head, blobs=[pb.Blob(name=bytes(32), size=192)])
ENORMOUS = pb.Payload(head=good_reply().head, blobs=[pb.Blob(name=bytes(32), size=1 << 60)])
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
    "nan in a metric": (with_metric(float("nan")), "metric 'num-examples' of record 'metrics' is NaN or infinite"),
    "infinite in a list": (with_metric([1.0, float("inf")]), "is NaN or infinite"),
    "lies about its dtype": (lying(name="v", dtype="int32"), "says int32[3] but holds float32[3]"),
    "lies about its size": (lying(size=1 << 40), "the arrays take"),
    "a blob that is not there": (lying(blob=7), "points at blob 7 of 1"),
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
    """Over a megabyte the check runs in a thread; what was stored for it goes with it."""
    payload, data = stored_reply(np.append(np.ones(499_999, np.float32), np.float32(np.nan)))
    with fleet.raw("spoiler") as raw:
        raw.connect()
        message = fleet.push("spoiler", size=500_000)
        offer = raw.read("offer")
        assert raw.store(offer.task_id, payload.blobs[0].name, len(data), data)[-1].complete
        receipt = raw.answer(offer, payload)
        assert receipt.verdict == pb.REJECTED and "NaN" in receipt.reason
    assert fleet.pull(message)["code"] == 4
    folder = fleet.directory / "state" / "server" / "runs"
    assert not list(folder.glob(f"*/updates/{offer.task_id}")), "its bytes are still on disk"


def stored_reply(array: NDArray[np.generic]) -> tuple[pb.Payload, bytes]:
    """A reply whose blob is to be stored, and that blob's bytes."""
    kept: list[bytes] = []

    def put(buffers: Sequence[bytes | memoryview]) -> pb.Blob:
        kept.append(b"".join(buffers))
        return pb.Blob(name=digest(kept[:1]), size=len(kept[0]))

    payload = encode(RecordDict({"model": ArrayRecord({"w": Array(array)})}), put)
    return payload, kept[0]


def test_a_large_reply_sent_twice_at_once(fleet: PuppetFleet) -> None:
    """The second comes while the first is being checked."""
    payload, data = stored_reply(np.full(500_000, 2, np.float32))
    with fleet.raw("hasty") as raw:
        raw.connect()
        message = fleet.push("hasty", size=500_000)
        offer = raw.read("offer")
        raw.store(offer.task_id, payload.blobs[0].name, len(data), data)
        raw.say(result=pb.Result(task_id=offer.task_id, payload=payload))
        raw.say(result=pb.Result(task_id=offer.task_id, payload=payload))
        assert {raw.read("receipt").verdict for _ in range(2)} == {pb.ACCEPTED, pb.DUPLICATE}
        assert fleet.pull(message)["sums"] == {"model/w": 1_000_000}


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


def test_the_result_counts_them(start_fleet: StartFleet) -> None:
    """FedAvg over an honest device and one that answers twice and once badly."""
    fleet = start_fleet(server=SETTINGS)
    fleet.join("honest")
    with fleet.raw("double") as raw:
        raw.connect()
        fleet.wait_node("double")
        fleet.send_order("fedavg", rounds=2, clients=2, size=3)
        offer = raw.read("offer")
        assert raw.answer(offer, update(3.0)).verdict == pb.ACCEPTED
        assert raw.answer(offer, update(99.0)).verdict == pb.DUPLICATE
        offer = raw.read("offer")
        assert raw.answer(offer, update(float("nan"))).verdict == pb.REJECTED
        # Round 1: the mean of 0 + 1 and 3; round 2: that plus 1 from the honest one alone.
        assert fleet.read_answer() == {"sum": 9.0}
    result = fleet.end()
    assert result["updates"] == {"received": 3, "folded": 3, "discarded": 0, "rejected": 1, "duplicate": 1}
    assert result["lost"] == []


def update(value: float) -> pb.Payload:
    """A reply as FedAvg expects it from this app's devices."""
    arrays = ArrayRecord({"w": Array(np.full(3, value, np.float32))})
    metrics = MetricRecord({"num-examples": 1, "calls": 1, "pid": 1})
    return encode_inline(RecordDict({"arrays": arrays, "metrics": metrics}))
