"""The envelope of a compressed update, and what is checked of it before anybody uses it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedpace.errors import PayloadError
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.check import check_reply, sent_arrays
from fedpace.protocol.codecs import Codec, Quantise, TopK, encode
from fedpace.protocol.decoding import decode_steps, sent_records
from fedpace.protocol.encoded import STEP, STEP_TYPE, StepLayout, copy_name, pack_step, read_step
from fedpace.protocol.received import RecordsUpdate, check_records, record_layout
from fedpace.protocol.records import encode as encode_records
from tests.generators import keep_inline, law

MODEL: dict[str, Any] = {
    "w": np.arange(12, dtype=np.float32).reshape(3, 4),
    "n": np.arange(2),
    "b": np.ones(3, np.float16),
}
LAYOUT = StepLayout.of((name, str(array.dtype), array.shape) for name, array in MODEL.items())
STEP_VECTOR = np.arange(15, dtype=np.float32) - 7
CODEC = TopK(0.2) >> Quantise(bits=8)


def record(arrays: dict[str, Any]) -> ArrayRecord:
    return ArrayRecord({name: a if isinstance(a, Array) else Array(np.asarray(a)) for name, a in arrays.items()})


SENT = RecordDict({"arrays": record(MODEL)})


def frame(codec: Codec = CODEC, vector: Any = STEP_VECTOR) -> bytes:
    return encode(codec, vector, seed=1)


def step(**more: Any) -> Array:
    return pack_step(frame(), LAYOUT, **{"stream": 5, "wants_fate": True, **more})


def check(content: RecordDict, codecs: Any = None) -> None:
    """At two doors: the coordinator's, and that of a grid of Flower's. They say the same."""
    sent = sent_arrays(encode_records(SENT, keep_inline), read)
    layouts = {name: record_layout(found) for name, found in SENT.array_records.items()}
    refused = None
    try:
        check_reply(encode_records(content, keep_inline), read, sent, codecs=codecs)
    except PayloadError as error:
        refused = str(error)
    try:
        check_records(content, layouts, codecs)
    except PayloadError as error:
        assert str(error) == refused
        raise
    assert refused is None


def read(blob: pb.Blob) -> memoryview:
    return memoryview(blob.data)


def test_a_layout_is_the_floating_point_arrays_in_order() -> None:
    assert LAYOUT.size == 15
    assert dict(LAYOUT.places) == {"w": slice(0, 12), "b": slice(12, 15)}
    others: list[dict[str, tuple[int, ...]]] = [
        {"w": (3, 4), "c": (3,)},
        {"w": (4, 3), "b": (3,)},
        {"b": (3,), "w": (3, 4)},
        {"w": (3, 4), "b": (3, 1)},
        {"w": (12,), "b": (3,)},
        {"w": (3, 4)},
        {},
    ]
    assert LAYOUT.digest not in {StepLayout(shapes).digest for shapes in others}
    strange = StepLayout.of([("a", "bfloat16", (2,)), ("b", "complex64", (2,)), ("c", "(", (2,)), ("d", ">f8", (2,))])
    assert dict(strange.shapes) == {"d": (2,)}


@law
@given(stream=st.integers(1, (1 << 32) - 1), wants=st.booleans(), base=st.none() | st.integers(0, (1 << 32) - 1))
def test_what_is_packed_is_read(stream: int, wants: bool, base: int | None) -> None:
    packed = step(stream=stream, wants_fate=wants, base=base)
    assert (packed.dtype, packed.shape, packed.stype) == ("float32", (15,), STEP_TYPE)
    assert len(packed.data) == len(frame()) + (10 if base is None else 14)
    found = read_step(packed.data, LAYOUT)
    assert (found.stream, found.wants_fate, found.base) == (stream, wants, base)
    assert found.after == (None if base is None else copy_name(base, frame()))
    np.testing.assert_array_equal(found.frame.dense(), read_step(step().data, LAYOUT).frame.dense())


def test_names_of_copies_say_all_that_was_added() -> None:
    one, two = frame(), frame(vector=STEP_VECTOR * 2)
    assert copy_name(copy_name(0, one), two) != copy_name(copy_name(0, two), one) != 0
    assert copy_name(copy_name(0, one), two) == copy_name(0, one + two)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is no step: it has 0 bytes"),
        (b"\x02" + step().data[1:], "is a step of version 2"),
        (b"\x01\x0c" + step().data[2:], "with flags 0xc"),
        (b"\x01\x00abcd" + step().data[6:], "between models with other arrays"),
        (step().data[:6] + bytes(4) + step().data[10:], "of stream 0"),
        (step(base=0).data[:12], "ends after 12 bytes"),
        (step().data[:10], "the frame ends"),
        (step().data[:-1], "the frame"),
        (step().data + b"\x00", "the frame has 1 bytes too many"),
        (step().data[:10] + frame(vector=np.ones(16, np.float32)), "of a vector of 16 numbers; the model has 15"),
    ],
)
def test_bytes_that_are_no_step_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(PayloadError, match=message):
        read_step(data, LAYOUT)
    content = RecordDict({"arrays": record({STEP: Array("float32", (15,), STEP_TYPE, data), "n": MODEL["n"]})})
    with pytest.raises(PayloadError, match=f"array 'fedpace.step' of record 'arrays' .*{message}"):
        check(content)
    with pytest.raises(PayloadError, match=f"array 'fedpace.step' of record 'arrays' .*{message}"):
        decode_steps(content, sent_records(SENT))
    assert STEP in content.array_records["arrays"]


@law
@given(data=st.data())
def test_garbage_is_refused_or_stays_what_it_is(data: Any) -> None:
    whole = bytearray(step(base=data.draw(st.sampled_from([None, 0, 7]))).data)
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        found = read_step(cut, LAYOUT)
    except PayloadError:
        return
    assert np.isfinite(found.frame.dense()).all()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({STEP: step()}, ""),
        ({STEP: step(), "n": MODEL["n"], "more": np.ones(2)}, ""),
        ({STEP: step(), "w": MODEL["w"]}, "stands for array 'w', which is there too"),
        ({STEP: Array("float32", (16,), STEP_TYPE, step().data)}, r"says float32\[16\], and .* is float32\[15\]"),
        ({STEP: Array("float64", (15,), STEP_TYPE, step().data)}, r"says float64\[15\]"),
        ({STEP: step(), "more": np.array([np.nan])}, "array 'more' of record 'arrays' holds NaN"),
    ],
)
def test_what_comes_beside_a_step(arrays: dict[str, Any], message: str) -> None:
    content = RecordDict({"arrays": record(arrays)})
    if not message:
        check(content)
        return
    with pytest.raises(PayloadError, match=message):
        check(content)


def test_a_step_from_nowhere() -> None:
    for check_it in (check, lambda content: decode_steps(content, sent_records(SENT))):
        with pytest.raises(PayloadError, match=r"array 'fedpace\.step' of record 'other'"):
            check_it(RecordDict({"other": record({STEP: step()})}))


def test_a_server_may_allow_some_codecs_only() -> None:
    content = RecordDict({"arrays": record({STEP: step()})})
    for allowed in (None, {"topk", "quantise"}, {"topk(0.2) >> quantise(8)"}):
        check(content, allowed)
    for allowed in ({"topk"}, {"topk(0.1) >> quantise(8)"}):
        with pytest.raises(PayloadError, match=r"the codec topk\(0.2\) >> quantise\(8\) is not allowed here"):
            check(content, allowed)


def test_numbers_too_large_for_the_model_are_refused() -> None:
    vector = np.zeros(15, np.float32)
    vector[14] = 1e6  # of 16 bits in the model
    large = pack_step(frame(vector=vector), LAYOUT, stream=1)
    content = RecordDict({"arrays": record({STEP: large})})
    with pytest.raises(PayloadError, match="makes the numbers of 'b' too large for float16"):
        decode_steps(content, sent_records(SENT))


def test_a_handle_says_where_a_step_lies() -> None:
    content = RecordDict({"arrays": record({STEP: step(), "n": MODEL["n"]}), "plain": record(MODEL)})
    handle = RecordsUpdate(content)
    assert bytes(handle.encoded("arrays") or b"") == step().data
    assert handle.encoded("plain") is None and handle.encoded("none") is None
    assert list(handle.arrays("arrays")) == ["n"]
