"""A worker reads messages, and makes and checks replies, in less time than Flower's own code, and to the same bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedpace.hosting.clientapp import offered_message
from fedpace.hosting.flower import become
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.mapped import MappedArray
from fedpace.protocol.records import encode
from fedpace.simulations.executors.arrays import from_numpy_ndarray
from fedpace.simulations.executors.messages import Messages
from fedpace.simulations.executors.packing import Blobs
from fedpace.simulations.executors.replies import Replies
from tests.generators import law, records

DTYPES = st.one_of(
    hnp.scalar_dtypes(),
    hnp.byte_string_dtypes(),
    hnp.array_dtypes(st.sampled_from(["<f4", ">i2"]), allow_subarrays=False),
)


@settings(deadline=None)
@given(array=hnp.arrays(DTYPES, hnp.array_shapes(min_dims=0, min_side=0)), turned=st.booleans(), step=st.integers(1, 2))
def test_arrays_are_flowers_to_the_byte(array: Any, turned: bool, step: int) -> None:
    array = (array.T if turned else array)[::step] if array.ndim else array
    mine, flowers = from_numpy_ndarray(array), Array.from_numpy_ndarray(array)
    assert type(mine) is Array
    assert mine.__dict__ == flowers.__dict__


def test_what_numpy_refuses_is_refused() -> None:
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        from_numpy_ndarray(np.array([object()]))


# ---------------------------------------------------------------- messages


def make_offer(content: RecordDict, blobs: Blobs, task: int = 1) -> pb.Offer:
    payload = encode(content, blobs.put)
    return pb.Offer(task_id=task, run_id=7, message_id=str(task), message_type="train", group_id="g", payload=payload)


@pytest.fixture(autouse=True)
def identity() -> None:
    become(7, 5)


@settings(deadline=None)
@given(content=records)
def test_messages_are_those_offered_again_and_again(content: RecordDict) -> None:
    become(7, 5)
    blobs, messages = Blobs(), Messages()
    offer = make_offer(content, blobs)
    expected = offered_message(offer, 5, blobs.get)
    for _ in range(2):
        found = messages.message(offer, 5, blobs.get)
        assert found.metadata.__dict__ == expected.metadata.__dict__
        assert encode(found.content, Blobs().put).head == encode(expected.content, Blobs().put).head
        for name, record in expected.content.array_records.items():
            for key, array in record.items():
                mine = found.content.array_records[name][key]
                assert mine == array
                assert isinstance(mine, MappedArray)


def test_messages_share_nothing_that_can_be_written_into() -> None:
    blobs, messages = Blobs(), Messages()
    sent: dict[str, Any] = {
        "arrays": ArrayRecord([np.arange(3.0), np.ones((2, 2), np.float32)]),
        "config": ConfigRecord({"list": [1, 2], "text": "a"}),
        "metrics": MetricRecord({"list": [1.5]}),
    }
    offer = make_offer(RecordDict(sent), blobs)
    for _ in range(3):
        content: dict[str, Any] = messages.message(offer, 5, blobs.get).content  # type: ignore[assignment]
        assert content == RecordDict(sent)
        arrays = content["arrays"]
        arrays["0"].numpy()[:] = 7
        assert arrays["0"].numpy().tolist() == [0, 1, 2]
        arrays["1"].data = b"spoilt"
        arrays["2"] = Array(np.zeros(1))
        del arrays["0"]
        for record in (content["config"], content["metrics"]):
            record["list"].append(3)
            record["new"] = 1
        content["more"] = ConfigRecord()
        del content["metrics"]


# ---------------------------------------------------------------- replies


REQUEST = RecordDict({"arrays": ArrayRecord([np.zeros((3, 2), np.float32), np.zeros(4)])})


def make_reply(
    first: Any = None, second: Any = None, metrics: dict[str, Any] | None = None, config: dict[str, Any] | None = None
) -> RecordDict:
    arrays = [np.ones((3, 2), np.float32) if first is None else first, np.ones(4) if second is None else second]
    return RecordDict(
        {
            "before": MetricRecord(metrics or {"num-examples": 3, "loss": 0.5}),
            "arrays": ArrayRecord(arrays),
            "status": ConfigRecord(config or {"code": 0, "texts": ["a", "b"]}),
        }
    )


def spoilt() -> RecordDict:
    reply = make_reply()
    reply.array_records["arrays"]["0"].data = reply.array_records["arrays"]["0"].data[:-1]
    return reply


def mistaken(**fields: Any) -> RecordDict:
    reply = make_reply()
    for name, value in fields.items():
        setattr(reply.array_records["arrays"]["1"], name, value)
    return reply


REPLIES = {
    "good": make_reply(),
    "other numbers": make_reply(np.full((3, 2), -2, np.float32), np.arange(4.0), {"num-examples": 9, "loss": 1}),
    "wider": make_reply(np.ones((3, 2), np.float64)),
    "columns": make_reply(np.asfortranarray(np.ones((3, 2), np.float32))),
    "NaN": make_reply(np.array([[1, 2], [3, np.nan], [5, 6]], np.float32)),
    "infinite": make_reply(second=np.array([1, np.inf, 2, 3])),
    "shape": make_reply(np.ones((2, 3), np.float32)),
    "whole numbers": make_reply(second=np.ones(4, np.int64)),
    "NaN loss": make_reply(metrics={"num-examples": 3, "loss": float("nan")}),
    "NaN weight": make_reply(metrics={"num-examples": float("nan"), "loss": 0.5}),
    "lists": make_reply(metrics={"num-examples": 3, "loss": [0.5, 0.25]}),
    "config": make_reply(config={"code": 1, "data": b"x"}),
    "cut": spoilt(),
    "says another shape": mistaken(shape=(2, 2)),
    "says a shape in a list": mistaken(shape=[4]),
    "of another type": mistaken(stype="mine"),
    "no bytes": mistaken(data=b""),
}


@pytest.mark.parametrize("checked", [True, False])
def test_replies_like_one_before_are_written_and_judged_as_if_they_were_the_first(checked: bool) -> None:
    blobs = Blobs()
    request = make_offer(REQUEST, blobs).payload
    practised = Replies(check_updates=checked)
    refused = set()
    for _ in range(3):
        for name, reply in REPLIES.items():
            put = Blobs(), Blobs()
            first, again = (
                replies.write(reply, request, lambda blob, own=own: (own if blob in own else blobs).get(blob), own.put)  # type: ignore[misc]
                for replies, own in zip((Replies(check_updates=checked), practised), put, strict=True)
            )
            assert first[1] == again[1]
            assert first[0].head == again[0].head
            assert [bytes(put[0].get(blob)) for blob in first[0].blobs] == [
                bytes(put[1].get(blob)) for blob in again[0].blobs
            ]
            if first[1]:
                assert first[1].startswith("rejected: ")
                refused.add(name)
    always = {"cut", "says another shape", "no bytes"}
    assert refused == (always | {"NaN", "infinite", "shape", "whole numbers", "NaN weight"} if checked else always)


def test_a_reply_is_held_against_what_its_own_request_sent() -> None:
    blobs, replies = Blobs(), Replies(check_updates=True)
    other = RecordDict({"arrays": ArrayRecord([np.zeros((3, 2), np.float32), np.zeros((2, 2))])})
    requests = [make_offer(content, blobs).payload for content in (REQUEST, other)]
    for _ in range(2):
        assert replies.write(make_reply(), requests[0], blobs.get, blobs.put)[1] is None
        reason = replies.write(make_reply(), requests[1], blobs.get, blobs.put)[1]
        assert reason == "rejected: array '1' of record 'arrays' is float64[4], but float64[2, 2] was sent out"


def unpadded(array: Any) -> Array:
    """An array whose header ends where no number of it would begin, as numpy reads it but never writes it."""
    header = f"{{'descr': {array.dtype.str!r}, 'fortran_order': False, 'shape': {array.shape}, }}\n".encode()
    header += b"\n" * (1 - len(header) % 2)  # 10 bytes come before: now it ends at an odd place
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + array.tobytes()
    return Array(str(array.dtype), array.shape, "numpy.ndarray", data)


@law
@given(
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
    sizes=st.lists(st.integers(0, 5), min_size=1, max_size=3),
    spoilt=st.sampled_from([np.nan, np.inf, -np.inf]),
    pad=st.booleans(),
    data=st.data(),
)
def test_one_number_that_is_not_finite_is_seen_wherever_it_lies(
    dtype: Any, sizes: list[int], spoilt: float, pad: bool, data: st.DataObject
) -> None:
    def record(arrays: list[Any]) -> RecordDict:
        made = [Array(array) if pad else unpadded(array) for array in arrays]
        return RecordDict({"arrays": ArrayRecord({str(index): array for index, array in enumerate(made)})})

    arrays = [np.full(size, np.finfo(dtype).max, dtype) for size in sizes]
    blobs, replies = Blobs(), Replies(check_updates=True)
    request = make_offer(record(arrays), blobs).payload
    for _ in range(2):
        assert replies.write(record(arrays), request, blobs.get, blobs.put)[1] is None
    if not any(sizes):
        return
    place = data.draw(st.sampled_from([(index, at) for index, size in enumerate(sizes) for at in range(size)]))
    arrays[place[0]][place[1]] = spoilt
    reason = replies.write(record(arrays), request, blobs.get, blobs.put)[1]
    assert reason == f"rejected: array '{place[0]}' of record 'arrays' holds NaN or infinite numbers"
