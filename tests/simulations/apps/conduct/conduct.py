"""A ClientApp that does what the config of its task says."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedpace.clients.mods import measure

app = ClientApp()
server = None


def reply(message: Message, records: dict[str, Any] | None = None, **metrics: Any) -> Message:
    return Message(RecordDict({**(records or {}), "metrics": MetricRecord(metrics)}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    return _CONDUCTS[str(message.content["config"]["do"])](message, context)


@app.train("measured", mods=[measure])
def measured(message: Message, context: Context) -> Message:
    time.sleep(0.01)
    return reply(message)


@app.query("echo")
def echo(message: Message, context: Context) -> Message:
    return Message(message.content, reply_to=message)


def tell(message: Message, context: Context) -> Message:
    """All that an app can know of its task."""
    data = message.metadata
    told: dict[str, Any] = {
        "node": context.node_id,
        "run": context.run_id,
        "of-message": [data.run_id, data.src_node_id, data.dst_node_id],
        "texts": [data.message_id, data.group_id, data.message_type, data.reply_to_message_id],
        "times": [data.created_at, data.ttl],
        **{f"node-config.{key}": value for key, value in context.node_config.items()},
        **{f"run-config.{key}": value for key, value in context.run_config.items()},
        **{f"config.{key}": value for key, value in message.content["config"].items()},
        "records": list(message.content),
    }
    return Message(RecordDict({"told": ConfigRecord(told)}), reply_to=message)


def draw(message: Message, context: Context) -> Message:
    return reply(message, draws=[random.random(), float(np.random.random())])


def late(message: Message, context: Context) -> Message:
    import torch

    return reply(message, draws=[float(torch.rand(())), float(torch.get_num_threads())])


def scribble(message: Message, context: Context) -> Message:
    """Writes into everything it was given."""
    found = [float(array.numpy().sum()) for array in message.content["arrays"].values()]
    config = message.content["config"]
    found += config["list"]
    for array in message.content["arrays"].values():
        array.data = Array(np.full(array.shape, 9, np.float32)).data
    config["list"].append(5.0)
    context.node_config["partition-id"] = 10**6
    context.run_config["new"] = 1
    context.state["mine"] = MetricRecord({"n": 1})
    del message.content["arrays"]
    return reply(message, found=found)


def count(message: Message, context: Context) -> Message:
    """Counts its tasks, beside an array of the size that the config says."""
    before = context.state.metric_records.get("tally", MetricRecord({"n": 0}))["n"]
    context.state["tally"] = MetricRecord({"n": before + 1})
    context.state["array"] = ArrayRecord([np.full(int(message.content["config"]["size"]), before + 1, np.float32)])
    return _CONDUCTS[str(message.content["config"]["then"])](message, context)


def add(message: Message, context: Context) -> Message:
    """Every array, plus the number of the device."""
    device = np.float32(context.node_config["partition-id"])
    arrays = {name: Array(array.numpy() + device) for name, array in message.content["arrays"].items()}
    return reply(message, {"arrays": ArrayRecord(arrays)})


def fail(message: Message, context: Context) -> Message:
    raise ValueError("no good")


def leave(message: Message, context: Context) -> Message:
    sys.exit(3)


def interrupt(message: Message, context: Context) -> Message:
    raise KeyboardInterrupt


def refuse(message: Message, context: Context) -> Message:
    return Message(Error(42, "too tired"), reply_to=message)


def text(message: Message, context: Context) -> Any:
    return "text"


def odd(message: Message, context: Context) -> Message:
    """A reply with a value that no record holds."""
    content = RecordDict({"metrics": MetricRecord({"a": 1})})
    content["metrics"].__dict__["_data"]["a"] = object()
    return Message(content, reply_to=message)


def spoil(message: Message, context: Context) -> Message:
    context.__dict__["state"] = 5
    return reply(message)


def infinite(message: Message, context: Context) -> Message:
    arrays = {name: Array(array.numpy() / np.float32(0)) for name, array in message.content["arrays"].items()}
    return reply(message, {"arrays": ArrayRecord(arrays)})


def reshape(message: Message, context: Context) -> Message:
    arrays = {name: Array(array.numpy()[..., None]) for name, array in message.content["arrays"].items()}
    return reply(message, {"arrays": ArrayRecord(arrays)})


def die(message: Message, context: Context) -> Message:
    """Once, if the config names a file: then it is there."""
    mark = message.content["config"].get("mark")
    if mark is None or not Path(str(mark)).exists():
        if mark is not None:
            Path(str(mark)).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return reply(message, pid=os.getpid())


def sleep(message: Message, context: Context) -> Message:
    Path(str(message.content["config"]["mark"])).touch()
    time.sleep(float(message.content["config"]["seconds"]))
    return reply(message)


_CONDUCTS: dict[str, Callable[[Message, Context], Message]] = {
    conduct.__name__: conduct
    for conduct in (
        tell, draw, late, scribble, count, add, fail, leave, interrupt, refuse, text, odd, spoil, infinite, reshape, die, sleep,
    )
}  # fmt: skip
