"""A ClientApp that does what the message's "order" says, however bad."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
@app.evaluate()
def behave(message: Message, context: Context) -> Message:
    """Replies with the arrays received, one added to each element, and how often this node was called in this run."""
    order = message.content.config_records.get("order", ConfigRecord({"do": "well"}))
    calls = int(context.state.metric_records.get("calls", MetricRecord({"n": 0}))["n"]) + 1  # type: ignore[arg-type]
    context.state["calls"] = MetricRecord({"n": calls})
    arrays = dict(message.content.array_records)
    content = RecordDict()
    for name, record in arrays.items():
        content[name] = ArrayRecord({key: Array(array.numpy() + 1) for key, array in record.items()})
    content["metrics"] = MetricRecord({"num-examples": 1, "calls": calls, "pid": os.getpid()})
    changed = CONDUCT[str(order["do"])](message, content, order)
    return Message(content, reply_to=message) if changed is None else changed


def sleep(message: Message, content: RecordDict, order: ConfigRecord) -> None:
    time.sleep(float(order["seconds"]))  # type: ignore[arg-type]


def say(message: Message, content: RecordDict, order: ConfigRecord) -> None:
    for number in range(int(order["lines"])):  # type: ignore[arg-type]
        print("line", number, order["text"])


def fail(message: Message, content: RecordDict, order: ConfigRecord) -> None:
    raise ValueError(str(order["text"]))


def fail_long(message: Message, content: RecordDict, order: ConfigRecord) -> None:
    raise ValueError("z" * int(order["characters"]))  # type: ignore[arg-type]


def leave(message: Message, content: RecordDict, order: ConfigRecord) -> None:
    sys.exit("the app has had enough")


def vanish(message: Message, content: RecordDict, order: ConfigRecord) -> None:
    os._exit(7)


def segfault(message: Message, content: RecordDict, order: ConfigRecord) -> None:
    ctypes.string_at(0)


def vanish_from_children(message: Message, content: RecordDict, order: ConfigRecord) -> None:
    """Its child inherits whatever this process has open, and lives on."""
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(600.0,)).start()
    os._exit(7)


def break_the_wire(message: Message, content: RecordDict, order: ConfigRecord) -> None:
    os.closerange(3, 100)


def reply_with_a_number(message: Message, content: RecordDict, order: ConfigRecord) -> Any:
    return 7


def scribble(message: Message, content: RecordDict, order: ConfigRecord) -> None:
    """Writes into all it received; the reply is what was read before."""
    for record in message.content.array_records.values():
        for key in list(record):
            record[key] = Array(np.full(3, -1.0))
    message.content["order"] = ConfigRecord({"do": "something else"})
    message.content["more"] = MetricRecord({"x": 1})


def spoil(message: Message, content: RecordDict, order: ConfigRecord) -> None:
    """Replies with numbers that no update may hold, or with another array than was sent."""
    good = content.array_records["model"]["w"].numpy()
    bad = {
        "nan": np.where(np.arange(good.size) == good.size - 1, np.nan, good).astype(good.dtype),
        "infinite": good * np.float32(np.inf),
        "dtype": good.astype(np.int64),
        "shape": good[:-1],
    }
    content["model"] = ArrayRecord({"w": Array(bad[str(order["what"])])})


def grow(message: Message, content: RecordDict, order: ConfigRecord) -> None:
    """A reply of so many more records, each of so many bytes."""
    for index in range(int(order["count"])):  # type: ignore[arg-type]
        content[f"more-{index}"] = ArrayRecord({"x": Array(np.full(int(order["bytes"]), index, np.uint8))})  # type: ignore[arg-type]


CONDUCT: dict[str, Callable[[Message, RecordDict, ConfigRecord], Any]] = {
    "well": lambda message, content, order: None,
    "sleep": sleep,
    "say": say,
    "fail": fail,
    "fail long": fail_long,
    "leave": leave,
    "vanish": vanish,
    "segfault": segfault,
    "vanish from children": vanish_from_children,
    "break the wire": break_the_wire,
    "reply with a number": reply_with_a_number,
    "scribble": scribble,
    "spoil": spoil,
    "grow": grow,
}
