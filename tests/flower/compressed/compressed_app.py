"""Devices that compress what they learn, and a ServerApp that looks whether anything was lost.

A device moves the model a fifth of the way to a point of its own. All that it ever computed is summed up beside it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp import strategy as flowers
from numpy.typing import NDArray

from fedpace.clients.mods import compress
from fedpace.protocol.codecs import Quantise, TopK, open_frame
from fedpace.protocol.decoding import decoded
from fedpace.protocol.encoded import Step, StepLayout, read_step
from fedpace.strategies import FedAvg, FedBuff
from fedpace.strategies.ledger import Ledger

SHAPE = (20, 5)
LAYOUT = StepLayout({"w": SHAPE})
client = ClientApp(mods=[compress(TopK(0.25) >> Quantise(bits=8), error_feedback=True)])
server = ServerApp()

Folded = dict[int, dict[str, NDArray[np.float64]]]


def point(number: int) -> NDArray[np.float64]:
    """Where a device would like the model to be."""
    return np.random.default_rng(number).normal(size=SHAPE)


@client.train()
def train(message: Message, context: Context) -> Message:
    """A fifth of the way, and one more in the counter."""
    time.sleep(float(context.run_config.get("pause", 0.0)))
    arrays = message.content.array_records["arrays"]
    before = arrays["w"].numpy()
    after = (before + 0.2 * (point(context.node_id % 1000) - before)).astype(before.dtype)
    computed = after.astype(np.float64) - before.astype(np.float64)
    if "computed" in context.state.array_records:
        computed += context.state.array_records["computed"]["w"].numpy()
    context.state["computed"] = ArrayRecord({"w": Array(computed)})
    trained = ArrayRecord({"w": Array(after), "count": Array(np.asarray(arrays["count"].numpy() + 1))})
    metrics = MetricRecord({"num-examples": 1, "torch": int("torch" in sys.modules)})
    return Message(RecordDict({"arrays": trained, "metrics": metrics}), reply_to=message)


@client.query()
def query(message: Message, context: Context) -> Message:
    """What this device keeps: all of its state."""
    return Message(RecordDict(dict(context.state.items())), reply_to=message)


def watch_folds() -> Folded:
    """What is folded from now on: decoded updates, before weights, by stream and task."""
    folded: Folded = {}
    received: dict[int, Step] = {}
    receive: Callable[..., Any] = Ledger.receive
    fold: Callable[..., None] = Ledger.fold

    def watched_receive(ledger: Any, task: int, version: int, handle: Any, **more: Any) -> Any:
        found = receive(ledger, task, version, handle, **more)
        received[task] = read_step(bytes(handle.encoded("arrays")), LAYOUT)
        return found

    def watched_fold(ledger: Any, effect: Any) -> None:
        fold(ledger, effect)
        for task in effect.tasks:
            step = received[task]
            of_stream = folded.setdefault(step.stream, {})
            assert str(task) not in of_stream, "an update is folded once"
            of_stream[str(task)] = step.frame.dense().astype(np.float64)

    setattr(Ledger, "receive", watched_receive)  # noqa: B010
    setattr(Ledger, "fold", watched_fold)  # noqa: B010
    return folded


def lost(state: RecordDict, folded: Folded) -> float:
    """By how much computed = folded + residual + unsettled is missed, at most."""
    facts: dict[str, Any] = dict(state.config_records["fedpace.feedback.facts"])
    arrays = state.array_records["fedpace.feedback"]
    known = folded.get(facts["stream"], {})
    found = arrays["kept"].numpy().astype(np.float64) + sum(known.values())
    for name in facts.get("ids", []):
        if name not in known:
            found += open_frame(arrays[f"sent {name}"].data, size=LAYOUT.size).dense()
    return float(np.abs(found - state.array_records["computed"]["w"].numpy().reshape(-1)).max())


def distance(model: NDArray[Any], nodes: list[int]) -> float:
    """How far a model is from the middle of all devices' points, over how far that is from where it began."""
    middle = np.mean([point(node % 1000) for node in nodes], axis=0)
    return float(np.linalg.norm(model - middle) / np.linalg.norm(middle))


def everybody(grid: Grid, count: int) -> list[int]:
    """The devices that are there, once there are so many, or after ten seconds."""
    for _ in range(100):
        if len(nodes := sorted(grid.get_node_ids())) >= count:
            break
        time.sleep(0.1)
    return nodes


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Train, ask, and write what was found as JSON."""
    config = context.run_config
    name, rounds = str(config["strategy"]), int(config["rounds"])
    folded = watch_folds()
    model = ArrayRecord({"w": Array(np.zeros(SHAPE, np.float32)), "count": Array(np.zeros((), np.int64))})
    if name == "stock":
        strategy: Any = flowers.FedAvg(fraction_evaluate=0.0, min_available_nodes=2)
        grid = decoded(grid)
    elif name == "fedavg":
        strategy = FedAvg(fraction_evaluate=0.0)
    else:
        strategy = FedBuff(2, fraction_evaluate=0.0)
    result = strategy.start(grid=grid, initial_arrays=model, num_rounds=rounds)
    nodes = everybody(grid, int(config["devices"]))
    asked = [Message(RecordDict(), node, "query") for node in nodes]
    replies = list(grid.send_and_receive(asked, timeout=60))
    states = {reply.metadata.src_node_id: reply.content for reply in replies if reply.has_content()}
    found = {
        "nodes": nodes,
        "lost": {n: lost(state, folded) for n, state in states.items() if "computed" in state and name != "stock"},
        "streams": {stream: len(updates) for stream, updates in folded.items()},
        "count": round(float(result.arrays["count"].numpy())),
        "distance": distance(result.arrays["w"].numpy(), nodes),
        "train": {r: dict(metrics) for r, metrics in result.train_metrics_clientapp.items()},
    }
    if config["output"]:
        Path(str(config["output"])).write_text(json.dumps(found))
