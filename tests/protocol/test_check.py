"""What a reply must be to be used: as it says it is, as what was sent out, finite; anything else is a clear error."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fedpace.errors import PayloadError
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.blobs import digest, read_blob
from fedpace.protocol.check import Sent, check_reply, sent_arrays
from fedpace.protocol.limits import CHUNK_BYTES
from fedpace.protocol.records import decode, encode
from fedpace.protocol.values import decode_values
from tests.generators import keep_inline, law, npy, records

read = partial(read_blob, Path("nowhere"))
check = partial(check_reply, get=read)


def reply(**arrays: np.ndarray[Any, Any] | Array) -> pb.Payload:
    """The payload of a reply with one record of arrays, named "arrays", and metrics."""
    held = {name: array if isinstance(array, Array) else Array(array) for name, array in arrays.items()}
    content = RecordDict({"arrays": ArrayRecord(held), "metrics": MetricRecord({"loss": 0.5, "num-examples": 8})})
    return encode(content, keep_inline)


def head_of(payload: pb.Payload) -> pb.Records:
    return pb.Records.FromString(payload.head)


def sent_of(payload: pb.Payload) -> Sent:
    return sent_arrays(payload, read)


def edited(payload: pb.Payload, edit: Callable[[pb.Records], object]) -> pb.Payload:
    """The same payload with another head."""
    head = head_of(payload)
    edit(head)
    return pb.Payload(head=head.SerializeToString(), blobs=payload.blobs)


def with_data(payload: pb.Payload, data: bytes) -> pb.Payload:
    """The same head with other bytes in the first blob, as long as they say they are."""
    blobs = [pb.Blob(name=digest([data]), size=len(data), data=data), *payload.blobs[1:]]
    return pb.Payload(head=payload.head, blobs=blobs)


# ---------------------------------------------------------------- what is accepted


@law
@given(records)
def test_what_encode_makes_passes(content: RecordDict) -> None:
    payload = encode(content, keep_inline)
    sent = sent_of(payload)
    check(payload, sent=sent, finite=False)


def test_arrays_of_other_kinds_are_free() -> None:
    sent = sent_of(reply(mask=np.zeros(3, np.int64), flag=np.array(True), tree=np.zeros(2, np.uint8)))
    assert sent == {}
    other = reply(mask=np.zeros((5, 5), np.uint32), flag=np.zeros(1), tree=np.zeros(9, "S3"), more=np.arange(3))
    check(other, sent=sent)


def test_only_records_and_arrays_of_the_same_names_are_held_against_what_was_sent() -> None:
    sent = sent_of(reply(w=np.zeros((2, 2), np.float32)))
    check(reply(gradient=np.zeros(7)), sent=sent)
    check(encode(RecordDict({"own": ArrayRecord([np.zeros(9)])}), keep_inline), sent=sent)
    check(reply(w=np.ones((2, 2), np.float32)), sent=sent)


def test_dtypes_numpy_has_no_name_for_pass_as_the_bytes_they_are_saved_as() -> None:
    """numpy saves bfloat16 and aligned structures as plain bytes of that size, under another name than they had."""
    aligned = np.zeros(2, np.dtype([("a", "u1"), ("b", "f4")], align=True))
    brain = Array("bfloat16", (2, 3), "numpy.ndarray", npy(np.zeros((2, 3), "V2")))
    payload = reply(brain=brain, aligned=aligned)
    assert sent_of(payload) == {("arrays", "brain"): ("bfloat16", (2, 3))}
    check(payload, sent=sent_of(payload))
    with pytest.raises(PayloadError, match="says float32"):
        check(reply(w=Array("float32", (3,), "numpy.ndarray", npy(np.zeros(3, "V4")))), sent={})


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "longdouble", "complex64", ">f4", "<f8"])
def test_every_floating_point_dtype_sent_is_held(dtype: str) -> None:
    sent = sent_of(reply(w=np.zeros(3, dtype)))
    check(reply(w=np.ones(3, dtype)), sent=sent)
    with pytest.raises(PayloadError, match="was sent out"):
        check(reply(w=np.ones(4, dtype)), sent=sent)


@pytest.mark.parametrize(("out", "back"), [("float64", "float32"), ("float32", "float16"), ("<f4", ">f4")])
def test_the_width_of_numbers_is_free(out: str, back: str) -> None:
    check(reply(w=np.ones(3, back)), sent=sent_of(reply(w=np.zeros(3, out))))


def test_a_legacy_reply_is_held_against_the_record_that_went_out_under_another_name() -> None:
    """Flower's legacy API leaves an array's dtype and shape empty: what its bytes say counts."""

    def legacy(name: str, array: np.ndarray[Any, Any]) -> pb.Payload:
        held = ArrayRecord({"0": Array("", (), "numpy.ndarray", npy(array))})
        return encode(RecordDict({name: held}), keep_inline)

    sent = sent_of(legacy("fitins.parameters", np.zeros((2, 3), np.float32)))
    check(legacy("fitres.parameters", np.ones((2, 3), np.float32)), sent=sent)
    check(legacy("fitres.parameters", np.ones((2, 3))), sent=sent)
    for wrong in (np.zeros((3, 2), np.float32), np.zeros((2, 3), np.int64)):
        with pytest.raises(PayloadError, match=r"but float32\[2, 3\] was sent out"):
            check(legacy("fitres.parameters", wrong), sent=sent)
    with pytest.raises(PayloadError, match="NaN"):
        check(legacy("fitres.parameters", np.full((2, 3), np.nan, np.float32)), sent=sent)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (np.zeros((3, 2), np.float32), r"float32\[3, 2\], but float32\[2, 3\] was sent out"),
        (np.zeros(6, np.float32), r"float32\[6\], but"),
        (np.zeros((2, 3), np.complex64), r"complex64\[2, 3\], but float32\[2, 3\]"),
        (np.zeros((2, 3), np.int32), r"int32\[2, 3\], but"),
        (np.zeros((2, 3), np.bool_), r"bool\[2, 3\], but"),
    ],
)
def test_shape_and_dtype_are_those_sent(found: np.ndarray[Any, Any], message: str) -> None:
    sent = sent_of(reply(w=np.zeros((2, 3), np.float32)))
    with pytest.raises(PayloadError, match=rf"array 'w' of record 'arrays' is {message}"):
        check(reply(w=found), sent=sent)
    check(reply(w=found), sent={})


def test_floating_point_numbers_may_come_back_in_another_width() -> None:
    """Flower's FedAdam sends float64 to devices that train in float32."""
    for out, back in (("float64", "float32"), ("float32", "float16"), ("float32", ">f8"), ("complex64", "complex128")):
        check(reply(w=np.ones((2, 3), back)), sent=sent_of(reply(w=np.zeros((2, 3), out))))


def test_bytes_under_a_name_numpy_does_not_know_stand_for_nothing_else() -> None:
    """No strategy can fold them with the numbers of others."""
    brain = Array("bfloat16", (2, 3), "numpy.ndarray", npy(np.zeros((2, 3), "V2")))
    check(reply(w=brain), sent=sent_of(reply(w=brain)))
    for one, other in ((np.zeros((2, 3), np.float32), brain), (brain, np.zeros((2, 3), np.float32))):
        with pytest.raises(PayloadError, match="was sent out"):
            check(reply(w=other), sent=sent_of(reply(w=one)))


@law
@given(st.data(), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_a_number_that_is_not_finite_is_found_wherever_it_is(data: st.DataObject, bad: float) -> None:
    dtype = data.draw(npst.floating_dtypes(endianness="?") | npst.complex_number_dtypes(endianness="?"))
    shape = data.draw(npst.array_shapes(min_dims=0, max_dims=3))
    array: np.ndarray[Any, Any] = np.zeros(shape, dtype, order="F" if data.draw(st.booleans()) else "C")
    array.flat[data.draw(st.integers(0, array.size - 1))] = bad
    with pytest.raises(PayloadError, match="holds NaN or infinite numbers"):
        check(reply(w=array), sent={})
    check(reply(w=array), sent={}, finite=False)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.complex128])
def test_the_last_number_of_a_large_array_is_looked_at(dtype: type) -> None:
    array: np.ndarray[Any, Any] = np.zeros(2 * CHUNK_BYTES // np.dtype(dtype).itemsize + 3, dtype)
    check(reply(w=array), sent={})
    array[-1] = np.nan
    with pytest.raises(PayloadError, match="NaN"):
        check(reply(w=array), sent={})


def test_an_imaginary_nan_counts() -> None:
    with pytest.raises(PayloadError, match="NaN"):
        check(reply(w=np.array([complex(0, np.nan)])), sent={})


class Bomb:
    """Pickled, it makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("dtype", ["O", [("a", "f4"), ("b", "O")]])
def test_objects_are_never_unpickled(tmp_path: Path, dtype: Any) -> None:
    bomb = np.zeros(1, dtype)
    bomb[0] = Bomb(tmp_path / "unpickled") if dtype == "O" else (1.0, Bomb(tmp_path / "unpickled"))
    data = npy(bomb, allow_pickle=True)
    for said in (str(bomb.dtype), "float32"):
        with pytest.raises(PayloadError, match="Python objects"):
            check(reply(w=Array(said, (1,), "numpy.ndarray", data)), sent={})
    assert not (tmp_path / "unpickled").exists()
    np.load(io.BytesIO(data), allow_pickle=True)
    assert (tmp_path / "unpickled").exists()


def test_a_header_that_lies_is_refused() -> None:
    honest = np.zeros((2, 3), np.float32)
    for dtype, shape in (("float32", (3, 2)), ("float64", (2, 3)), ("float32", (6,)), ("int32", (2, 3))):
        lie = Array(dtype, shape, "numpy.ndarray", npy(honest))
        with pytest.raises(PayloadError, match=r"array 'w' of record 'arrays' says .* but holds float32\[2, 3\]"):
            check(reply(w=lie), sent={})
    for data in (npy(honest)[:-1], npy(honest) + b"\0"):
        with pytest.raises(PayloadError, match="array 'w' of record 'arrays'"):
            check(reply(w=Array("float32", (2, 3), "numpy.ndarray", data)), sent={})


def test_arrays_that_do_not_fill_their_blob_are_refused() -> None:
    payload = reply(v=np.zeros(3), w=np.zeros(5))
    data = payload.blobs[0].data
    for changed in (data[:-1], data + b"\0", data + bytes(64), data[: len(data) // 2], b""):
        with pytest.raises(PayloadError, match=rf"take {len(data)} bytes, but their blob has {len(changed)}"):
            check(with_data(payload, changed), sent={})
    wrong = pb.Blob(name=bytes(32), size=5, data=b"four")
    with pytest.raises(PayloadError, match="has 4 bytes, not 5"):
        check(pb.Payload(head=payload.head, blobs=[wrong]), sent={})
    with pytest.raises(PayloadError, match="points at blob 0 of 0"):
        check(pb.Payload(head=payload.head), sent={})
    with pytest.raises(PayloadError, match="cannot be read"):
        check(pb.Payload(head=payload.head, blobs=[pb.Blob(name=bytes(32), size=len(data))]), sent={})


def twice(name: str) -> Callable[[pb.Records], object]:
    def edit(head: pb.Records) -> None:
        if name == "record":
            head.record.append(head.record[1])
        elif name == "array":
            head.record[0].arrays.array[1].name = head.record[0].arrays.array[0].name
        else:
            head.record[1].metrics.entry.append(head.record[1].metrics.entry[0])

    return edit


@pytest.mark.parametrize("name", ["record", "array", "value"])
def test_names_come_once(name: str) -> None:
    payload = edited(reply(v=np.zeros(2), w=np.zeros(2)), twice(name))
    for use in (partial(check, sent={}), partial(decode, get=read)):
        with pytest.raises(PayloadError, match=f"{name}.*is there twice"):
            use(payload)


@pytest.mark.parametrize(
    "entry",
    [
        pb.Entry(name="loss", text="low"),
        pb.Entry(name="loss", octets=b"1"),
        pb.Entry(name="loss", boolean=True),
        pb.Entry(name="loss", texts=pb.Texts(value=["x"])),
        pb.Entry(name="loss"),
    ],
)
def test_metrics_are_numbers(entry: pb.Entry) -> None:
    payload = edited(reply(), lambda head: head.record[1].metrics.entry[0].CopyFrom(entry))
    with pytest.raises(PayloadError, match="'loss' of record 'metrics' is not a number"):
        check(payload, sent={})
    with pytest.raises(PayloadError):
        decode(payload, read)


def test_a_record_of_no_known_kind_is_refused() -> None:
    payload = edited(reply(), lambda head: head.record.add(name="new"))
    for use in (partial(check, sent={}), partial(decode, get=read)):
        with pytest.raises(PayloadError, match="'new' is of no kind"):
            use(payload)


def test_numbers_that_are_not_decimal_are_refused() -> None:
    for entry in (pb.Entry(name="n", big_integer="1e3"), pb.Entry(name="n", big_integers=pb.Texts(value=["1", ""]))):
        with pytest.raises(PayloadError, match="'n' is not a decimal integer"):
            decode_values(pb.Values(entry=[entry]))
    with pytest.raises(PayloadError, match="not a decimal"):
        decode_values(pb.Values(entry=[pb.Entry(name="n", big_integer="9" * 5000)]))


def test_a_config_may_hold_anything_a_record_may() -> None:
    content = RecordDict({"c": ConfigRecord({"t": "x", "b": b"y", "f": [True], "n": [1.5], "nan": float("nan")})})
    check(encode(content, keep_inline), sent={})
