"""`measure`: what a task cost, in its reply's metrics."""

from __future__ import annotations

import math
from collections.abc import Callable

from flwr.app import Context, Message, MessageType

from fedpace.clients.mods._replies import metric_record
from fedpace.clients.mods._steps import StepWatcher, torch_loaded, watch_steps
from fedpace.clients.mods.clock import task_clock
from fedpace.protocol.received import content_bytes


def measure(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """Adds what the app does not report itself to its reply:

    - "compute-seconds": of the task's clock, of all mods inside this one and the app;
    - "bytes-in", "bytes-out": size of the message's content and of the reply's, before these metrics;
    - "local-steps": steps of torch's optimisers, in replies to train messages of apps that use torch; NaN where torch
      was only imported meanwhile, and nobody knows.

    They go into the reply's MetricRecord (its first, if there are several), or into a new one, "metrics".
    """
    clock, watcher, counted = task_clock(), StepWatcher(), torch_loaded()
    metrics: dict[str, int | float] = {"bytes-in": content_bytes(message.content)}
    began = clock()
    with watch_steps(watcher):
        reply = call_next(message, context)
    metrics["compute-seconds"] = float(clock() - began)
    if reply.has_error():
        return reply
    metrics["bytes-out"] = content_bytes(reply.content)
    if torch_loaded() and message.metadata.message_type.partition(".")[0] == MessageType.TRAIN:
        metrics["local-steps"] = watcher.steps if counted else math.nan
    reported = {name for record in reply.content.metric_records.values() for name in record}
    metric_record(reply.content).update({name: value for name, value in metrics.items() if name not in reported})
    return reply
