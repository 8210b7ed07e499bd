"""A grid in memory: every message is answered at once, by a ClientApp called in this process."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedpace.hosting.clientapp import AppFailure, run_clientapp
from fedpace.hosting.flower import Run, become, make_context, make_reply, make_request, set_message_id
from fedpace.protocol.records import decode, encode
from tests.generators import keep_inline

RUN_ID = 11


class InlineGrid(Grid):
    """`nodes` devices that run one app, each with a context of its own; `broken` ones answer with an error."""

    def __init__(self, app: ClientApp, nodes: int = 2, broken: Iterable[int] = ()) -> None:
        become(RUN_ID, 1)
        self._app = app
        self._contexts = {
            node: make_context(RUN_ID, node, {"partition-id": index}, {}, RecordDict())
            for index, node in enumerate(range(100, 100 + nodes))
        }
        self._broken = {100 + index for index in broken}
        self._replies: dict[str, Message] = {}
        self.sent: list[Message] = []

    def set_run(self, run: Run) -> None:
        """The run is always the same."""

    @property
    def run(self) -> Run:
        return Run.create_empty(RUN_ID)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl or 3600.0)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            self.sent.append(message)
            message_id = str(len(self.sent))
            set_message_id(message, message_id)
            self._replies[message_id] = self._answer(message)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message) -> Message:
        metadata = message.metadata
        make = functools.partial(make_reply, metadata, f"{metadata.message_id}-reply", time.time())
        if metadata.dst_node_id in self._broken:
            return make(None, Error(2, "broken on purpose"))
        request = make_request(metadata, copied(message.content))
        reply = run_clientapp(self._app, request, self.context(metadata.dst_node_id))
        become(RUN_ID, 1)
        if isinstance(reply, AppFailure):
            return make(None, Error(reply.code, reply.reason))
        return make(copied(reply.content), None)

    def context(self, node_id: int) -> Context:
        return self._contexts[node_id]


def copied(content: RecordDict) -> RecordDict:
    """What arrives on the other side of a wire."""
    return decode(encode(content, keep_inline), lambda blob: memoryview(blob.data))
