"""Flower records to bytes and back: nothing is lost, nothing is shared, and the same content gives the same bytes."""

from __future__ import annotations

import enum
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedpace.errors import PayloadError
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.blobs import BlobStore, inline_blob, read_blob
from fedpace.protocol.limits import INLINE_BYTES
from fedpace.protocol.payloads import ALIGNMENT, array_offsets, metrics_of, payload_bytes
from fedpace.protocol.records import decode, encode
from fedpace.protocol.values import decode_values, encode_values
from tests.generators import bits, config_values, keep_inline, law, metric_values, ndarrays, records

read = partial(read_blob, Path("nowhere"))


@law
@given(records)
def test_records_come_back_as_they_were(content: RecordDict) -> None:
    payload = pb.Payload.FromString(encode(content, keep_inline).SerializeToString())
    assert bits(decode(payload, read)) == bits(content)


@law
@given(records)
def test_the_same_content_gives_the_same_bytes(content: RecordDict) -> None:
    again = decode(encode(content, keep_inline), read)
    assert encode(again, keep_inline).SerializeToString() == encode(content, keep_inline).SerializeToString()


@law
@given(records)
def test_what_was_decoded_is_nobody_elses(content: RecordDict) -> None:
    payload = encode(content, keep_inline)
    before, serialised = bits(content), payload.SerializeToString()
    mine = decode(payload, read)
    for record in mine.values():
        for name in list(record):
            del record[name]
    mine["another"] = ConfigRecord({"written": True})
    assert payload.SerializeToString() == serialised
    assert bits(content) == before
    assert bits(decode(payload, read)) == before


@law
@given(ndarrays())
def test_any_array_numpy_saves_is_carried(array: np.ndarray[Any, Any]) -> None:
    payload = encode(RecordDict({"arrays": ArrayRecord({"a": Array(array)})}), keep_inline)
    found = decode(payload, read).array_records["arrays"]["a"].numpy()
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert found.tobytes() == array.tobytes()


def test_arrays_are_aligned_in_their_blob() -> None:
    record = ArrayRecord([np.ones(n, np.uint8) for n in (1, 63, 64, 65)])
    payload = encode(RecordDict({"arrays": record}), keep_inline)
    [entry] = pb.Records.FromString(payload.head).record
    assert [start % ALIGNMENT for _, start in array_offsets(entry.arrays, payload.blobs[0].size)] == [0] * 4


def test_blobs_and_a_large_head_lie_in_a_store(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    content = RecordDict(
        {
            "arrays": ArrayRecord([np.arange(100_000)]),
            "config": ConfigRecord({"tree": bytes(INLINE_BYTES + 1), "n": 1}),
            "metrics": MetricRecord({"loss": 0.5, "n": 7}),
        }
    )
    payload = encode(content, store.put)
    assert not payload.head and not payload.head_blob.HasField("data") and not payload.blobs[0].HasField("data")
    assert payload_bytes(payload) == sum(path.stat().st_size for path in tmp_path.iterdir())
    found = decode(payload, store.get)
    assert metrics_of(payload, store.get) == {"loss": 0.5, "n": 7}
    for path in list(tmp_path.iterdir()):
        path.unlink()
    assert bits(found) == bits(content)
    with pytest.raises(PayloadError, match="cannot be read"):
        decode(payload, store.get)


def test_small_blobs_ride_along_and_large_ones_do_not() -> None:
    small = inline_blob([b"ab", b"c"])
    assert small is not None and (small.data, small.size) == (b"abc", 3)
    assert inline_blob([bytes(INLINE_BYTES), b"x"]) is None


@law
@given(st.dictionaries(st.text(max_size=5), config_values, max_size=6))
def test_values_come_back_in_order_with_type_and_bits(values: dict[str, Any]) -> None:
    found = decode_values(pb.Values.FromString(encode_values(values).SerializeToString()))
    assert [(name, bits(value)) for name, value in found.items()] == [(k, bits(v)) for k, v in values.items()]


@law
@given(st.dictionaries(st.text(max_size=5), metric_values, max_size=6))
def test_metrics_are_read_without_flower(values: dict[str, Any]) -> None:
    payload = encode(RecordDict({"m": MetricRecord(values)}), keep_inline)
    assert {k: bits(v) for k, v in metrics_of(payload, read).items()} == {k: bits(v) for k, v in values.items()}


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 1 << 70


def test_subclasses_of_numbers_and_text_are_carried_as_what_they_are_derived_from() -> None:
    """Flower takes them, so they must not be refused; a range would look for an IntEnum number by number, for ever."""
    values: Any = {
        "enum": Level.LOW,
        "large": Level.HIGH,
        "enums": [Level.LOW, Level.LOW],
        "mixed": [3, True],
        "float64": np.float64(0.5),
        "float64s": [1.5, np.float64(0.5)],
        "str": np.str_("s"),
    }
    content = RecordDict({"c": ConfigRecord(values)})
    found = dict(decode(encode(content, keep_inline), read)["c"].items())
    assert found == values
    assert [type(value) for value in found.values()] == [int, int, list, list, float, list, str]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (RecordDict({"bad\ud800": ConfigRecord()}), "cannot be written"),
        (RecordDict({"c": ConfigRecord({"text": "bad\ud800"})}), "record 'c' cannot be written"),
        (RecordDict({"m": MetricRecord({"n": 10**5000})}), "'n' has 16610 bits"),
        (RecordDict({"m": MetricRecord({"n": [1, 10**5000]})}), "'n' has 16610 bits"),
        (RecordDict({"a": ArrayRecord({"x": Array("f", (1 << 64,), "s", b"")})}), "record 'a' cannot be written"),
    ],
)
def test_what_no_payload_can_say_is_a_payload_error(content: RecordDict, message: str) -> None:
    with pytest.raises(PayloadError, match=message):
        encode(content, keep_inline)


@pytest.mark.parametrize("value", [None, {"a": 1}, 1j, object(), [None], [1, "a"], [True, 1.5], [[1]]])
def test_values_no_flower_record_holds_are_refused_by_name(value: Any) -> None:
    with pytest.raises(PayloadError, match="'here'"):
        encode_values({"here": value})


def test_a_list_changed_after_it_was_checked_is_refused() -> None:
    """Flower checks values when they are set, not when they are changed."""
    values: list[Any] = [1]
    content = RecordDict({"m": MetricRecord({"n": values})})
    values.append("x")
    with pytest.raises(PayloadError, match="lists of one type"):
        encode(content, keep_inline)
