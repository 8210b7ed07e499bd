"""A Flower app that computes nothing: stock FedAvg, train and evaluate, over a 100 kB model that comes back as it went.

The rounds are timed here, in the central evaluation that FedAvg.start calls before the first round and after each,
so that any engine that runs this app is timed alike.
"""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

# Five float32 arrays, 25,600 values, 102,400 bytes.
SHAPES = ((64, 128), (128,), (96, 128), (4896,), (96,))

server = ServerApp()
client = ClientApp()


@client.train()
@client.evaluate()
def echo(message: Message, context: Context) -> Message:
    """Return the arrays as they came, with how many messages this node has had.

    With run-config `change` the last value of the last array is raised by one, so that no model is like the one before.
    """
    calls = context.state.metric_records.get("tally", MetricRecord({"calls": 0}))
    calls["calls"] = int(calls["calls"]) + 1  # type: ignore[arg-type]
    context.state["tally"] = calls
    metrics = MetricRecord({"num-examples": 1, "calls": calls["calls"]})
    arrays = message.content.array_records["arrays"]
    if context.run_config["change"]:
        name = list(arrays)[-1]
        arrays[name] = Array(arrays[name].numpy() + np.float32(1.0))
    content = RecordDict({"arrays": arrays, "metrics": metrics})
    return Message(content=content, reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run FedAvg and write `{"round_ms": [...]}`, one duration a round, to the path in run-config `timings`.

    The first duration also holds the wait for the nodes to join. RuntimeError when a round had fewer replies than
    nodes, or when a node's `context.state` was not kept.
    """
    nodes, rounds = int(context.run_config["nodes"]), int(context.run_config["rounds"])
    stamps: list[float] = []

    def stamp(server_round: int, arrays: ArrayRecord) -> None:
        stamps.append(time.perf_counter())

    def count(replies: list[RecordDict], weight: str) -> MetricRecord:
        if len(replies) != nodes:
            raise RuntimeError(f"round {len(stamps)}: {len(replies)} good replies from {nodes} nodes")
        calls = [reply.metric_records["metrics"]["calls"] for reply in replies]
        return MetricRecord({"fewest-calls": min(calls), "most-calls": max(calls)})

    strategy = FedAvg(
        fraction_train=1.0,
        fraction_evaluate=1.0,
        min_train_nodes=nodes,
        min_evaluate_nodes=nodes,
        min_available_nodes=nodes,
        train_metrics_aggr_fn=count,
        evaluate_metrics_aggr_fn=count,
    )
    rng = np.random.default_rng(0)
    model = ArrayRecord([rng.random(shape, dtype=np.float32) for shape in SHAPES])
    result = strategy.start(grid, model, num_rounds=rounds, timeout=300, evaluate_fn=stamp)
    last = result.evaluate_metrics_clientapp[rounds]
    if (last["fewest-calls"], last["most-calls"]) != (2 * rounds, 2 * rounds):
        raise RuntimeError(f"context.state was not kept: after {2 * rounds} messages the nodes count {last}")
    durations = [1e3 * (end - start) for start, end in itertools.pairwise(stamps)]
    Path(str(context.run_config["timings"])).write_text(json.dumps({"round_ms": durations}))
