"""Compressed updates as the arrays they stand for, for whoever takes replies as Flower messages.

fedpace's own grids decode by themselves. Any other one does behind `decoded(grid)`:

    FedAvg().start(grid=decoded(grid), initial_arrays=arrays)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

from fedpace.errors import PayloadError
from fedpace.protocol.check import NUMPY
from fedpace.protocol.encoded import STEP, STEP_TYPE, Step, StepLayout, read_step, reply_record
from fedpace.protocol.failures import Code
from fedpace.protocol.mapped import array_of, buffer_of
from fedpace.protocol.paced import PacedGrid
from fedpace.protocol.received import numbers_of

Arrays = Mapping[str, Array]
SentRecords = Mapping[str, Arrays]
"""The arrays of a message by record and name."""


def sent_records(content: RecordDict) -> SentRecords:
    """What a reply to this content is decoded by, as it is now."""
    return {name: dict(record.items()) for name, record in content.array_records.items()}


def decode_steps(content: RecordDict, sent: SentRecords, allowed: Collection[str] | None = None) -> None:
    """Puts plain arrays into a reply where it has compressed ones: what was `sent`, and the decoded step on top.

    Arrays come in the order and the dtypes in which they were sent. `allowed` are codecs, as `read_step` takes them.
    Raises PayloadError, and changes nothing, for a step that does not fit what was sent.
    """
    found = {}
    for name, record in content.array_records.items():
        if STEP in record and record[STEP].stype == STEP_TYPE:
            try:
                found[name] = _decoded(record, _sent_as(name, sent), allowed)
            except PayloadError as error:
                raise PayloadError(f"array {STEP!r} of record {name!r} {error}") from None
    content.update(found)


def _sent_as(name: str, sent: SentRecords) -> Arrays:
    for record, arrays in sent.items():
        if reply_record(record) == name:
            return arrays
    raise PayloadError("is a step from nowhere: no arrays were sent in a record of that name")


def _decoded(record: ArrayRecord, sent: Arrays, allowed: Collection[str] | None) -> ArrayRecord:
    base = {name: numbers_of(array) for name, array in sent.items() if array.stype == NUMPY}
    layout = StepLayout.of((name, sent[name].dtype or str(array.dtype), array.shape) for name, array in base.items())
    step = read_step(buffer_of(record[STEP]), layout, allowed)
    _refuse_differences(step)
    flat, arrays = step.frame.dense(), {}
    for name, array in sent.items():
        if name in layout.places:
            before = base[name]
            wide = np.float64 if before.itemsize > 4 else np.float32
            with np.errstate(over="ignore"):
                moved = np.add(before, flat[layout.places[name]].reshape(before.shape), dtype=wide).astype(before.dtype)
            if not np.isfinite(moved).all():
                raise PayloadError(f"makes the numbers of {name!r} too large for {moved.dtype}")
            arrays[name] = _named_as(array, array_of(moved))
        elif name in record:
            arrays[name] = record[name]
    others = {name: array for name, array in record.items() if name not in sent and name != STEP}
    return ArrayRecord({**arrays, **others})


def _named_as(sent: Array, array: Array) -> Array:
    """An array under the dtype and shape it was sent with; Flower's legacy API says neither."""
    if sent.dtype:
        return array
    return Array(sent.dtype, tuple(sent.shape), NUMPY, array.data)


def _refuse_differences(step: Step) -> None:
    if step.base is not None:
        raise PayloadError("is a difference by EF21, which only fedpace's strategies keep a copy for")


def decoded(grid: Grid) -> Grid:
    """The grid, with compressed updates decoded in the replies that it hands out; one of fedpace's is as it was."""
    return grid if isinstance(grid, PacedGrid | DecodedGrid) else DecodedGrid(grid)


class DecodedGrid(Grid):
    """Remembers what was sent until it is answered or past its time to live. A reply with a step that cannot be decoded
    becomes an error, which says why. `allowed` are the codecs that devices may use; None allows all.
    """

    def __init__(self, grid: Grid, allowed: Collection[str] | None = None) -> None:
        self._grid = grid
        self._allowed = allowed
        self._sent: dict[str, tuple[Message, SentRecords]] = {}

    def set_run(self, run: Any) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        return self._grid.get_node_ids()

    def get_nodes(self) -> Iterable[Any]:
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        batch = [(message, sent_records(message.content)) for message in messages]
        ids = list(self._grid.push_messages([message for message, _ in batch]))
        if batch:
            now = max(message.metadata.created_at for message, _ in batch)
            self._sent = {key: kept for key, kept in self._sent.items() if _ends(kept[0]) > now}
        self._sent |= {message.metadata.message_id: (message, sent) for message, sent in batch}
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.plain(reply) for reply in self._grid.pull_messages(message_ids)]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        batch = [(message, sent_records(message.content)) for message in messages]
        replies = list(self._grid.send_and_receive([message for message, _ in batch], timeout=timeout))
        self._sent |= {message.metadata.message_id: (message, records) for message, records in batch}
        found = [self.plain(reply) for reply in replies]
        for message, _ in batch:
            self.forget(message.metadata.message_id)
        return found

    def plain(self, reply: Message) -> Message:
        """A reply decoded, or the error that it cannot be."""
        request, sent = self._sent.pop(reply.metadata.reply_to_message_id, (None, {}))
        if not reply.has_error():
            try:
                decode_steps(reply.content, sent, self._allowed)
            except PayloadError as error:
                if request is None:
                    raise
                return Message(Error(Code.REPLY_MESSAGE_UNAVAILABLE, f"reply rejected: {error}"), reply_to=request)
        return reply

    def forget(self, message_id: str) -> None:
        """Nobody will pull the answer to a message."""
        self._sent.pop(message_id, None)


def _ends(message: Message) -> float:
    """When nobody waits for an answer any more, in Unix seconds."""
    return message.metadata.created_at + message.metadata.ttl
