"""The messages that devices are offered; what many of them are sent alike is read once."""

from __future__ import annotations

from collections import OrderedDict

from flwr.app import Message, RecordDict

from fedpace.hosting.clientapp import offered_message, offered_metadata
from fedpace.hosting.flower import make_request, unchecked
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.mapped import MappedArray
from fedpace.protocol.payloads import Get, payload_bytes
from fedpace.protocol.records import decode

_KEPT_BYTES = 1 << 20
"""Contents up to this size are kept; of larger ones, to read them is the least."""
_KEPT = 16


class Messages:
    """Makes messages. Each has records of its own, which its app may write into."""

    def __init__(self) -> None:
        self._contents: OrderedDict[bytes, RecordDict] = OrderedDict()

    def message(self, offer: pb.Offer, node_id: int, get: Get) -> Message:
        """What `offered_message` makes, and raises what that does."""
        payload = offer.payload
        if payload.HasField("head_blob") or payload_bytes(payload) > _KEPT_BYTES:
            return offered_message(offer, node_id, get)
        key = payload.SerializeToString()
        content = self._contents.get(key)
        if content is None:
            content = _mapped(decode(payload, get))
            while len(self._contents) >= _KEPT:
                self._contents.popitem(last=False)
            self._contents[key] = content
        return make_request(offered_metadata(offer, node_id), _own(content))


def _mapped(content: RecordDict) -> RecordDict:
    """With arrays whose `numpy()` takes a tenth of the time."""
    for record in content.array_records.values():
        for key, array in record.items():
            record[key] = MappedArray.of(array)
    return content


def _own(content: RecordDict) -> RecordDict:
    """A copy that shares with the other what nobody can write into: numbers, text, and the bytes of arrays."""
    copied = content.copy()
    records = unchecked(copied)
    for name, record in content.items():
        records[name] = own = record.copy()
        values = unchecked(own)
        for key, value in values.items():
            if isinstance(value, MappedArray):
                values[key] = value.twin()
            elif isinstance(value, list):
                values[key] = list(value)
    return copied
