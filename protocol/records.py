"""Flower records as bytes and back, through Flower's public API only.

A `RecordDict` becomes a `Payload`: a head that names every record, value and array in order, and one blob for each
`ArrayRecord` with the bytes of its arrays exactly as Flower holds them. Nothing is interpreted: any dtype, any `stype`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedpace.errors import PayloadError
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.limits import INLINE_BYTES
from fedpace.protocol.mapped import buffers_of, make_array
from fedpace.protocol.payloads import ALIGNMENT, Get, array_offsets, blob_of, decode_head, padding
from fedpace.protocol.values import decode_values, encode_values

Buffers = Sequence[bytes | memoryview]
Put = Callable[[Buffers], pb.Blob]
"""Keeps the concatenation of some buffers and says under which name."""


_GAPS = [bytes(size) for size in range(ALIGNMENT)]


def encode(records: RecordDict, put: Put) -> pb.Payload:
    """Turns `records` into a `Payload`, handing the bytes of each ArrayRecord to `put`.

    Raises PayloadError for a value that is none of Flower's types, and for text that is no Unicode.
    """
    head = pb.Records()
    payload = pb.Payload()
    for name, record in records.items():
        try:
            buffers = _encode_record(head.record.add(name=name), record)
        except (TypeError, ValueError) as error:
            raise PayloadError(f"record {name!r} cannot be written: {error}") from None
        if buffers is not None:
            head.record[-1].arrays.blob = len(payload.blobs)
            payload.blobs.append(put(buffers))
    data = head.SerializeToString()
    if len(data) <= INLINE_BYTES:
        payload.head = data
    else:
        payload.head_blob.CopyFrom(put([data]))
    return payload


def _encode_record(
    entry: pb.Record, record: ArrayRecord | MetricRecord | ConfigRecord
) -> list[bytes | memoryview] | None:
    """Fills in the entry of a record; returns the bytes of its arrays where it is one of arrays."""
    if isinstance(record, ArrayRecord):
        entry.arrays.SetInParent()  # an empty record is one too
        return _index_arrays(record, entry.arrays)
    values = entry.metrics if isinstance(record, MetricRecord) else entry.config
    values.SetInParent()
    encode_values(record, values)
    return None


def _index_arrays(record: ArrayRecord, index: pb.ArrayIndex) -> list[bytes | memoryview]:
    buffers: list[bytes | memoryview] = []
    for name, array in record.items():
        parts = buffers_of(array)
        size = sum(map(len, parts))
        index.array.add(name=name, dtype=array.dtype, shape=list(array.shape), stype=array.stype, size=size)
        buffers.extend(parts)
        if gap := padding(size):
            buffers.append(_GAPS[gap])
    return buffers


def decode(payload: pb.Payload, get: Get) -> RecordDict:
    """Turns a `Payload` back into records; writing into them disturbs nobody: arrays are copies, or views that
    cannot be written to.

    Raises PayloadError where the payload does not say what it should.
    """
    records = RecordDict()
    for entry in decode_head(payload, get).record:
        if entry.name in records:
            raise PayloadError(f"record {entry.name!r} is there twice")
        kind = entry.WhichOneof("kind")
        if kind == "arrays":
            records[entry.name] = _decode_arrays(payload, entry, get)
        elif kind == "metrics":
            try:
                records[entry.name] = MetricRecord(cast(Any, decode_values(entry.metrics)))
            except TypeError:
                raise PayloadError(f"record {entry.name!r} of metrics holds what is no number") from None
        elif kind == "config":
            records[entry.name] = ConfigRecord(cast(Any, decode_values(entry.config)))
        else:
            raise PayloadError(f"record {entry.name!r} is of no kind this version knows")
    return records


def _decode_arrays(payload: pb.Payload, entry: pb.Record, get: Get) -> ArrayRecord:
    blob, view = blob_of(payload, entry.arrays, get)
    arrays = ArrayRecord()
    for array, start in array_offsets(entry.arrays, blob.size):
        if array.name in arrays:
            raise PayloadError(f"array {array.name!r} of record {entry.name!r} is there twice")
        data = view[start : start + array.size]
        arrays[array.name] = make_array(array.dtype, tuple(array.shape), array.stype, data)
    return arrays
