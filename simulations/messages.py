"""The answer to a task as Flower's message: for apps that pull answers, rather than take events."""

from __future__ import annotations

from flwr.app import Error, Message, RecordDict

from fedpace.errors import PayloadError
from fedpace.hosting.flower import ErrorCode, make_reply, request_metadata
from fedpace.hosting.virtualtime import EPOCH
from fedpace.protocol.decoding import decode_steps, sent_records
from fedpace.protocol.failures import Code
from fedpace.protocol.paced import Event, Failed, Replied
from fedpace.simulations.tasks import Task


def answer_message(run_id: int, task: Task, event: Event, sets_seconds: bool) -> Message:
    """`event` tells of the task's end; an update that it brings is released. With `sets_seconds` a reply that tells its
    own compute time is made to tell the simulated one."""
    request = request_metadata(run_id, task.message_id, task.node_id, task)
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
