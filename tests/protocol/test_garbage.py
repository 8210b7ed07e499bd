"""Garbage in, `PayloadError` out: and what a check lets through, everybody after it can read."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.blobs import read_blob
from fedpace.protocol.check import check_reply
from fedpace.protocol.payloads import metrics_of
from fedpace.protocol.records import decode, encode
from tests.generators import bits, keep_inline, law, outcome, records

read = partial(read_blob, Path("nowhere"))
check = partial(check_reply, get=read)


@st.composite
def broken(draw: st.DrawFn) -> pb.Payload:
    """A payload that was sound, then cut, changed or filled with noise in one or two places."""
    payload = encode(draw(records), keep_inline)
    for _ in range(draw(st.integers(1, 2))):
        blobs = [bytes(blob.data) for blob in payload.blobs]
        target = draw(st.integers(-1, len(blobs) - 1))
        data = bytearray(payload.head if target < 0 else blobs[target])
        where = draw(st.integers(0, len(data)))
        what = draw(st.sampled_from(["cut", "change", "insert", "noise"]))
        if what == "cut":
            del data[where:]
        elif what == "noise":
            data = bytearray(draw(st.binary(max_size=80)))
        elif what == "change" and where < len(data):
            data[where] = draw(st.integers(0, 255))
        else:
            data[where:where] = draw(st.binary(max_size=4))
        if target < 0:
            payload.head = bytes(data)
        else:
            payload = _replaced(payload, target, bytes(data), honest=draw(st.booleans()))
    return payload


def _replaced(payload: pb.Payload, target: int, data: bytes, *, honest: bool) -> pb.Payload:
    found = pb.Payload()
    found.CopyFrom(payload)
    found.blobs[target].data = data
    if honest:
        found.blobs[target].size = len(data)
    return found


@law
@given(broken(), st.booleans())
def test_garbage_is_a_payload_error_and_what_passes_can_be_read(payload: pb.Payload, finite: bool) -> None:
    outcome(decode, payload, read)
    outcome(metrics_of, payload, read)
    if isinstance(outcome(partial(check, sent={}, finite=finite), payload), str):
        return
    content = decode(payload, read)
    metrics_of(payload, read)
    for record in content.array_records.values():
        for array in record.values():
            if array.stype == "numpy.ndarray":
                assert array.numpy().shape == array.shape
    assert bits(decode(encode(content, keep_inline), read)) == bits(content)


@law
@given(st.binary(max_size=200))
def test_noise_for_a_head_is_a_payload_error(head: bytes) -> None:
    payload = pb.Payload(head=head, blobs=[pb.Blob(name=bytes(32), size=3, data=b"abc")])
    outcome(decode, payload, read)
    outcome(partial(check, sent={}), payload)
