"""Each strategy that the run config names, in turn, from the same initial model: Flower's, or as "fedpace:NAME" ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp import strategy as flower_strategies
from flwr.serverapp.strategy import Strategy

FEATURES, CLASSES = 8, 3

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the strategies; write the weights and losses each ends with, as "FedAvg/weight" and so on."""
    config = context.run_config
    nodes, rounds = int(config["nodes"]), int(config["num-rounds"])
    ends: dict[str, Any] = {}
    for name in str(config["strategies"]).split(","):
        strategy = strategy_class(name)(
            min_train_nodes=nodes,
            min_evaluate_nodes=nodes,
            min_available_nodes=nodes,
            **({"proximal_mu": 0.5} if name.endswith("FedProx") else {}),
        )
        result = strategy.start(
            grid=grid,
            initial_arrays=initial_arrays(),
            num_rounds=rounds,
            train_config=ConfigRecord({"learning-rate": float(config["learning-rate"])}),
        )
        trained, evaluated = result.train_metrics_clientapp, result.evaluate_metrics_clientapp
        if not len(trained) == len(evaluated) == rounds:
            raise RuntimeError(f"{name}: {len(trained)} rounds of {rounds} trained and {len(evaluated)} evaluated")
        ends |= {f"{name}/{key}": array.numpy() for key, array in result.arrays.items()}
        ends[f"{name}/train-loss"] = np.array([trained[i + 1]["loss"] for i in range(rounds)])
        ends[f"{name}/evaluate-loss"] = np.array([evaluated[i + 1]["loss"] for i in range(rounds)])
    if config["output"]:
        np.savez(str(config["output"]), **ends)


def strategy_class(name: str) -> Callable[..., Strategy]:
    """The class of that name."""
    if name.startswith("fedpace:"):
        from fedpace.strategies import PRESETS  # Flower's own runs of this app do without fedpace

        return PRESETS[name.removeprefix("fedpace:")]
    found: Callable[..., Strategy] = getattr(flower_strategies, name)
    return found


def initial_arrays() -> ArrayRecord:
    """The same small random model every time."""
    weight = np.random.default_rng(0).normal(scale=0.1, size=(FEATURES, CLASSES)).astype(np.float32)
    return ArrayRecord({"weight": Array(weight), "bias": Array(np.zeros(CLASSES, np.float32))})
