"""Why there is no reply: Flower's error codes, for the rooms that do not load Flower, and the result that carries one."""

from __future__ import annotations

from enum import IntEnum

from fedpace.protocol import fleet_pb2 as pb


class Code(IntEnum):
    """The codes of Flower's `ErrorCode` that fedpace itself sends; a test compares them."""

    MESSAGE_UNAVAILABLE = 3
    REPLY_MESSAGE_UNAVAILABLE = 4
    NODE_UNAVAILABLE = 5
    CLIENT_APP_CRASHED = 8


def failed_result(task_id: int, code: int, reason: str, compute_seconds: float = 0.0) -> pb.Result:
    """A result that is a failure; `code` may be any of Flower's."""
    failure = pb.Failure(code=code, reason=reason)
    return pb.Result(task_id=task_id, failure=failure, compute_seconds=compute_seconds)
