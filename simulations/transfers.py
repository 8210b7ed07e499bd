"""How many bytes a task moves."""

from __future__ import annotations

from fedpace.errors import ConfigError
from fedpace.protocol.codecs import typical_bytes
from fedpace.protocol.encoded import CODEC
from fedpace.simulations.tasks import Task

REPLY_BYTES = 1_000
"""Bytes of a message without a model."""


def transfer_bytes(task: Task, codec: str | None) -> tuple[int, int]:
    """Bytes to the device, and back: from training a model as large as the one that was sent, or as few as its codec
    makes of that. `codec` is that of the app, where the task's config names none."""
    content = task.content
    down = content.nbytes + REPLY_BYTES
    if task.message_type != "train" and not task.message_type.startswith("train."):
        return down, REPLY_BYTES
    if task.config:
        codec = task.config.get(CODEC, codec)
    if codec is None:
        return down, content.model_bytes + REPLY_BYTES
    return down, _encoded_bytes(codec, content.model_bytes) + REPLY_BYTES


def _encoded_bytes(codec: str, model_bytes: int) -> int:
    """Of what is no codec, or of one whose frames depend on the model's shapes, as many as of the model itself."""
    try:
        return typical_bytes(codec, max(1, model_bytes // 4))
    except ConfigError:
        return model_bytes
