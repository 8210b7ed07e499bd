"""A Flower app that sends a 100 MB model to every node and takes one of the same size back from each."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

ARRAYS = 10
VALUES = 2_500_000  # float32 in each array: 10 MB
FLOAT = struct.Struct("<f")

server = ServerApp()
client = ClientApp()


@client.train()
def mark(message: Message, context: Context) -> Message:
    """Return the model with the last value of its last array replaced by one of this node's own.

    So what comes back has never been seen before. The value is written into the .npy bytes, whose data come last: one
    copy, where decoding and encoding would make several.
    """
    arrays = message.content.array_records["arrays"]
    name = list(arrays)[-1]
    last = arrays[name]
    data = b"".join((memoryview(last.data)[: -FLOAT.size], FLOAT.pack(mark_of(context.node_id))))
    arrays[name] = Array(dtype=last.dtype, shape=last.shape, stype=last.stype, data=data)
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
    return Message(content=content, reply_to=message)


def mark_of(node_id: int) -> float:
    """A value that no model of this app holds (they lie in [0, 1)): at least 2, from 2**22 the float32 can tell apart."""
    return float(2 + node_id % 2**22)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Write `{"seconds": [...]}`, one a repetition, to the path in run-config `timings`.

    Each is the time of one `send_and_receive` of a model that no node has seen, to all nodes. RuntimeError when the
    nodes do not come within two minutes, when a reply is missing, or when one is not what its node was sent.
    """
    nodes, repetitions = int(context.run_config["nodes"]), int(context.run_config["repetitions"])
    node_ids = wait_for_nodes(grid, nodes, seconds=120)
    rng = np.random.default_rng(0)
    seconds = []
    for repetition in range(repetitions):
        model = [rng.random(VALUES, dtype=np.float32) for _ in range(ARRAYS)]
        content = RecordDict({"arrays": ArrayRecord(model)})
        messages = [Message(content=content, message_type="train", dst_node_id=node) for node in node_ids]
        start = time.perf_counter()
        replies = list(grid.send_and_receive(messages, timeout=300))
        seconds.append(time.perf_counter() - start)
        if len(replies) != nodes:
            raise RuntimeError(f"repetition {repetition}: {len(replies)} replies from {nodes} nodes")
        for reply in replies:
            check(reply, model)
    Path(str(context.run_config["timings"])).write_text(json.dumps({"seconds": seconds}))


def wait_for_nodes(grid: Grid, nodes: int, seconds: float) -> list[int]:
    """Ids of the first `nodes` nodes, as soon as that many are connected."""
    deadline = time.monotonic() + seconds
    while len(node_ids := list(grid.get_node_ids())) < nodes:
        if time.monotonic() > deadline:
            raise RuntimeError(f"only {len(node_ids)} of {nodes} nodes came within {seconds} seconds")
        time.sleep(0.2)
    return node_ids[:nodes]


def check(reply: Message, model: list[np.ndarray]) -> None:
    """RuntimeError unless `reply` holds `model` with its very last value replaced by the node's mark."""
    node = reply.metadata.src_node_id
    if reply.has_error():
        raise RuntimeError(f"node {node} failed: {reply.error.reason}")
    *same, last = reply.content.array_records["arrays"].to_numpy_ndarrays()
    marked = last[-1] == np.float32(mark_of(node)) and np.array_equal(model[-1][:-1], last[:-1])
    if not marked or not all(map(np.array_equal, model[:-1], same)):
        raise RuntimeError(f"node {node} did not return the model it was sent")
