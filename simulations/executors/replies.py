"""Replies as bytes, held against what was sent; of one that is laid out like another, only the numbers are looked at."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedpace.errors import PayloadError
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.check import NUMPY, Sent, check_reply, npy_array, sent_arrays
from fedpace.protocol.limits import CHUNK_BYTES, INLINE_BYTES
from fedpace.protocol.payloads import Get, decode_head, padding
from fedpace.protocol.records import Put, encode
from fedpace.protocol.values import encode_values

_KEPT = 64

_WIDE = frozenset(map(np.dtype, ("<f4", "<f8")))
"""Floats that no text is NaN or infinite as, read as such: their highest bits would have to be above those of ASCII."""

_Layout = tuple[tuple[Any, ...], ...]
"""All of a reply's arrays but the numbers: names of records; names, dtypes, shapes, headers and sizes of arrays."""


@dataclass(frozen=True)
class _Sound:
    """What is known of a layout that was found sound: the entries of its array records in a payload's head, by name;
    where, in the bytes of each array, numbers begin that must be finite, and of which dtype they are; and that dtype
    where all of a record's bytes may be read as such, for the headers in between are finite numbers too."""

    heads: dict[str, bytes]
    numbers: dict[tuple[str, str], tuple[np.dtype[Any], int]]
    alike: dict[str, np.dtype[Any]]


@dataclass
class _Held:
    """What replies to one content are held against (None: not looked at yet), and the layouts that were found sound."""

    sent: Sent | None = None
    sound: dict[_Layout, _Sound] = field(default_factory=dict)


class Replies:
    """Writes and checks replies as a device and its server do. Without `check_updates` their arrays may be of any shape,
    and not finite."""

    def __init__(self, *, check_updates: bool) -> None:
        self._check_updates = check_updates
        self._requests: OrderedDict[tuple[tuple[bytes, int], ...], _Held] = OrderedDict()

    def write(self, content: RecordDict, request: pb.Payload, get: Get, put: Put) -> tuple[pb.Payload, str | None]:
        """A reply's payload, and why the server rejects it, if it does. `get` finds the blobs of the request, and those
        that `put` took.

        Raises PayloadError where the reply cannot be written, and whatever records do that an app has spoilt.
        """
        held = self._held(request)
        layout = _layout(content)
        if layout is not None and (sound := held.sound.get(layout)) is not None:
            written = self._like_before(content, sound)
            if written is not None:
                head, records = written
                return pb.Payload(head=head, blobs=[put([buffer]) for buffer in records]), None
        payload = encode(content, put)
        try:
            if held.sent is None:
                held.sent = sent_arrays(request, get) if self._check_updates else {}
            check_reply(payload, get, held.sent, finite=self._check_updates)
        except PayloadError as error:
            return payload, f"rejected: {error}"
        except Exception as error:  # noqa: BLE001 - whatever made the check itself fail came with the reply
            return payload, f"rejected: the reply cannot be checked: {error!r}"
        if layout is not None:
            if len(held.sound) >= _KEPT:
                held.sound.clear()
            held.sound[layout] = _sound(content, payload, get)
        return payload, None

    def _held(self, request: pb.Payload) -> _Held:
        """Looked at once, however many devices a content goes to."""
        key = tuple([(blob.name, blob.size) for blob in request.blobs])
        if key not in self._requests:
            while len(self._requests) >= _KEPT:
                self._requests.popitem(last=False)
            self._requests[key] = _Held()
        return self._requests[key]

    def _like_before(self, content: RecordDict, sound: _Sound) -> tuple[bytes, list[bytes]] | None:
        """The head and the records' bytes of a reply whose layout is sound; None where anything else may not be."""
        heads: list[bytes] = []
        records: list[bytes] = []
        try:
            for name, record in content.items():
                if isinstance(record, ArrayRecord):
                    data = b"".join([part for array in record.values() for part in (array.data, _gap(array))])
                    if not self._finite(name, record, data, sound):
                        return None
                    heads.append(sound.heads[name])
                    records.append(data)
                elif isinstance(record, ConfigRecord) or all(map(_is_number, record.values())):
                    heads.append(_head_of_values(name, record))
                else:
                    return None
        except Exception:  # noqa: BLE001 - the whole check will say what it is
            return None
        head = b"".join(heads)
        return (head, records) if len(head) <= INLINE_BYTES else None

    def _finite(self, name: str, record: ArrayRecord, data: bytes, sound: _Sound) -> bool:
        """`data` are all bytes of the record."""
        if not self._check_updates:
            return True
        if (alike := sound.alike.get(name)) is not None and _all_finite(np.frombuffer(data, alike)):
            return True
        for key, array in record.items():
            if place := sound.numbers.get((name, key)):
                dtype, start = place
                if not _all_finite(np.frombuffer(array.data, dtype, offset=start)):
                    return False
        return True


def _all_finite(numbers: NDArray[Any]) -> bool:
    """Of few numbers: `all()` takes several times as long to begin."""
    return b"\0" not in np.isfinite(numbers).tobytes()


def _sound(content: RecordDict, payload: pb.Payload, get: Get) -> _Sound:
    entries = decode_head(payload, get).record
    heads = {entry.name: pb.Records(record=[entry]).SerializeToString() for entry in entries}
    numbers, alike = {}, {}
    for name, record in content.array_records.items():
        dtypes, aligned = set(), True
        for key, array in record.items():
            found = npy_array(memoryview(array.data))
            start = len(array.data) - found.nbytes
            dtypes.add(found.dtype)
            aligned = aligned and start % found.itemsize == 0
            if found.size and found.dtype.kind in "fc":
                numbers[name, key] = found.dtype, start
        if len(dtypes) == 1 and dtypes <= _WIDE and aligned:
            alike[name] = dtypes.pop()
    return _Sound(heads, numbers, alike)


def _layout(content: RecordDict) -> _Layout | None:
    """None where there is anything in the reply but plain records, and arrays that numpy wrote, none of them large."""
    found: list[tuple[Any, ...]] = []
    try:
        for name, record in content.items():
            if not isinstance(record, ArrayRecord):
                continue
            found.append((name,))
            for key, array in record.items():
                data = array.data
                if type(array) is not Array or type(data) is not bytes or array.stype != NUMPY or data[6] != 1:
                    return None
                if len(data) > CHUNK_BYTES:  # looking at it takes its time in any case
                    return None
                start = 10 + int.from_bytes(data[8:10], "little")
                found.append((key, array.dtype, array.shape, data[:start], len(data)))
        layout = tuple(found)
        hash(layout)
    except Exception:  # noqa: BLE001 - the app may have left anything there
        return None
    return layout


def _head_of_values(name: str, record: MetricRecord | ConfigRecord) -> bytes:
    head = pb.Records()
    entry = head.record.add(name=name)
    values = entry.metrics if isinstance(record, MetricRecord) else entry.config
    values.SetInParent()
    encode_values(record, values)
    return head.SerializeToString()


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _gap(array: Array) -> bytes:
    return bytes(padding(len(array.data)))
