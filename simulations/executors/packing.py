"""Computations as bytes, and their answers from bytes: what a coordinator and an agent would put on the wire."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Mapping
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from fedpace.hosting.clientapp import AppFailure
from fedpace.hosting.flower import SUPERLINK_NODE_ID
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.payloads import Get, decode_head
from fedpace.protocol.records import Buffers, Put, encode
from fedpace.protocol.updates import PayloadUpdate
from fedpace.protocol.values import encode_values
from fedpace.simulations.work import Answer, Computation

_NAME = struct.Struct("<Q")


class Blobs:
    """Bytes kept in this process, under names that no others in it have."""

    _numbers = itertools.count()

    def __init__(self) -> None:
        self._kept: dict[bytes, bytes] = {}

    def __contains__(self, blob: pb.Blob) -> bool:
        return blob.name in self._kept

    def put(self, buffers: Buffers) -> pb.Blob:
        name, data = _NAME.pack(next(self._numbers)), b"".join(buffers)
        self._kept[name] = data
        return pb.Blob(name=name, size=len(data))

    def get(self, blob: pb.Blob) -> memoryview:
        return memoryview(self._kept[blob.name])


class PackedContent:
    """Content as it is sent, but for the config of each task: its arrays are written once, wherever `put` keeps them."""

    def __init__(self, records: RecordDict, put: Put, get: Get) -> None:
        self._payload = encode(records, put)
        self._records = [
            (record.name, pb.Records(record=[record]).SerializeToString())
            for record in decode_head(self._payload, get).record
        ]
        self._configs = {name: dict(record) for name, record in records.items() if isinstance(record, ConfigRecord)}

    def payload(self, config_name: str, config: Mapping[str, Any]) -> pb.Payload:
        """The payload with `config` laid over the record `config_name`, which is made where there is none.

        Raises PayloadError for a value that no record holds.
        """
        if not config:
            return self._with([data for _, data in self._records])
        values = encode_values({**self._configs.get(config_name, {}), **config})
        own = pb.Records(record=[pb.Record(name=config_name, config=values)]).SerializeToString()
        heads = [own if name == config_name else data for name, data in self._records]
        if config_name not in self._configs:
            heads.append(own)
        return self._with(heads)

    def _with(self, heads: list[bytes]) -> pb.Payload:
        """Serialised messages of one repeated field may simply follow each other."""
        return pb.Payload(head=b"".join(heads), blobs=self._payload.blobs)


def make_offer(run_id: int, computation: Computation, payload: pb.Payload) -> pb.Offer:
    """A computation as its device is offered it."""
    return pb.Offer(
        task_id=computation.task,
        run_id=run_id,
        message_id=str(computation.task),
        message_type=computation.message_type,
        group_id=computation.group_id,
        created_at=computation.created_at,
        ttl=computation.ttl,
        src_node_id=SUPERLINK_NODE_ID,
        payload=payload,
    )


def make_answer(result: pb.Result, state: RecordDict | None, get: Get) -> Answer:
    """What came of a computation, from the result of its device. The bytes that `get` finds stay with the update."""
    if result.HasField("failure"):
        return Answer(None, code=result.failure.code, reason=result.failure.reason, state=state)
    update = PayloadUpdate(result.payload, get)
    return Answer(update, metrics=update.metrics, state=state)


def failed_answer(failure: AppFailure) -> Answer:
    return Answer(None, code=failure.code, reason=failure.reason)
