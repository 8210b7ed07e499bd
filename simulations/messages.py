"""The answer to a task as Flower's message: for apps that pull answers, rather than take events."""

from __future__ import annotations

from flwr.app import Error, Message, Metadata, RecordDict

from fedpace.errors import PayloadError
from fedpace.hosting.flower import SUPERLINK_NODE_ID, ErrorCode, make_reply
from fedpace.hosting.virtualtime import EPOCH
from fedpace.protocol.decoding import decode_steps, sent_records
from fedpace.protocol.failures import Code
from fedpace.protocol.paced import Event, Failed, Replied
from fedpace.simulations.tasks import Task


def answer_message(run_id: int, task: Task, event: Event, sets_seconds: bool) -> Message:
    """`event` tells of the task's end; an update that it brings is released. With `sets_seconds` a reply that tells its
    own compute time is made to tell the simulated one."""
    request = Metadata(
        run_id=run_id,
        message_id=task.message_id,
        src_node_id=SUPERLINK_NODE_ID,
        dst_node_id=task.node_id,
        reply_to_message_id="",
        group_id=task.group_id,
        created_at=task.created_at,
        ttl=task.ttl,
        message_type=task.message_type,
    )
    at, reply_id = EPOCH + event.at, f"{task.task}-reply"
    if isinstance(event, Replied):
        content = event.update.content()
        if sets_seconds:
            _set_seconds(content, event.compute_seconds)
        event.update.release()
        try:
            decode_steps(content, sent_records(task.content.records))
        except PayloadError as error:
            reason = f"the reply cannot be used: {error}"
            return make_reply(request, reply_id, at, None, Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, reason))
        return make_reply(request, reply_id, at, content, None)
    code = event.code if isinstance(event, Failed) else int(Code.MESSAGE_UNAVAILABLE)
    return make_reply(request, reply_id, at, None, Error(code, getattr(event, "reason", "")))


def _set_seconds(content: RecordDict, seconds: float) -> None:
    """Where a reply's app measured its own compute time: by the device's clock, not by this machine's."""
    for record in content.metric_records.values():
        if "compute-seconds" in record:
            record["compute-seconds"] = seconds
