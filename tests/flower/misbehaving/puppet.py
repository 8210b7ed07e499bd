"""A ServerApp on strings: it connects to a test and does what that says, one line of JSON an order, one an answer."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    with (
        socket.create_connection(("127.0.0.1", int(context.run_config["port"]))) as strings,
        strings.makefile("rw") as f,
    ):
        for line in f:
            order = json.loads(line)
            if (do := order.pop("do")) == "return":
                return
            f.write(json.dumps(ORDERS[do](grid, **order)) + "\n")
            f.flush()


def nodes(grid: Grid) -> list[int]:
    return list(grid.get_node_ids())


def push(grid: Grid, node: int, kind: str, order: dict[str, Any], size: int, records: int, ttl: float | None) -> str:
    """Sends `records` ArrayRecords, each of one float32 array called "w" of `size` ones; the n-th array begins with n."""
    content = RecordDict({"order": ConfigRecord(order)})
    for index in range(records):
        array = np.ones(size, np.float32)
        array[0] += index
        content[f"model-{index}" if index else "model"] = ArrayRecord({"w": Array(array)})
    (message_id,) = grid.push_messages([Message(content, node, kind, ttl=ttl)])
    return message_id


def pull(grid: Grid, message_id: str, seconds: float) -> dict[str, Any] | None:
    """Looks for one reply for so many seconds."""
    until = time.monotonic() + seconds
    while not (found := list(grid.pull_messages([message_id]))) and time.monotonic() < until:
        time.sleep(0.01)
    return _tell(found[0]) if found else None


def _tell(reply: Message) -> dict[str, Any]:
    if reply.has_error():
        return {"code": reply.error.code, "reason": reply.error.reason, "metrics": {}, "sums": {}}
    records = reply.content.array_records
    sums = {f"{name}/{key}": float(a.numpy().sum()) for name, record in records.items() for key, a in record.items()}
    metrics = {key: value for record in reply.content.metric_records.values() for key, value in record.items()}
    return {"code": None, "reason": "", "metrics": metrics, "sums": sums}


def fedavg(grid: Grid, rounds: int, clients: int, size: int) -> dict[str, Any]:
    """Stock FedAvg over a model of zeros; the sum of the last global model, and the errors seen on the way."""
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients, min_evaluate_nodes=0)
    result = strategy.start(grid, ArrayRecord({"w": Array(np.zeros(size, np.float32))}), num_rounds=rounds)
    return {"sum": float(result.arrays["w"].numpy().sum())}


def die(grid: Grid, how: str) -> None:
    if how == "raise":
        raise RuntimeError("the puppet's strings broke")
    if how == "exit":
        os._exit(3)
    if how == "leave children":
        multiprocessing.get_context("fork").Process(target=time.sleep, args=(600.0,)).start()
        os._exit(3)
    if how == "segfault":
        ctypes.string_at(0)
    time.sleep(3600.0)


ORDERS: dict[str, Callable[..., Any]] = {"nodes": nodes, "push": push, "pull": pull, "fedavg": fedavg, "die": die}
