"""What the server does: combine the devices' models by a strategy of fedpace or Flower, and test every version."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp import strategy as flower_strategies
from flwr.serverapp.strategy import FedAvg, Strategy

from digits.task import Net, evaluate, initial_model, load_split
from fedpace.strategies import PRESETS

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the strategy that the run config names."""
    config = context.run_config
    name, directory = str(config["strategy"]), str(config["log-directory"])
    strategy = strategy_class(name)(
        fraction_train=float(config["fraction-train"]),
        fraction_evaluate=float(config["fraction-evaluate"]),
        min_available_nodes=int(config["min-available-nodes"]),
        **({"directory": Path(directory)} if directory and name in PRESETS else {}),
    )
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(initial_model(int(config["seed"])).state_dict()),
        num_rounds=int(config["num-rounds"]),
        evaluate_fn=evaluate_centrally,
    )


def evaluate_centrally(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Loss and accuracy on all test images."""
    model = Net()
    model.load_state_dict(arrays.to_torch_state_dict())
    _, samples = load_split()
    loss, accuracy = evaluate(model, samples)
    return MetricRecord({"loss": loss, "accuracy": accuracy})


def strategy_class(name: str) -> Callable[..., Strategy]:
    """The strategy of that name: one of fedpace's presets, or, as "flwr:NAME", one of Flower's own.

    Raises ValueError where it is none that runs with its defaults.
    """
    choices: dict[str, Callable[..., Strategy]] = dict(PRESETS)
    for choice in flower_strategies.__all__:
        found = getattr(flower_strategies, choice)
        if (
            inspect.isclass(found)
            and issubclass(found, FedAvg)
            and not choice.startswith("FedXgb")  # those combine trees
            and all(p.default is not p.empty for p in inspect.signature(found).parameters.values())
        ):
            choices[f"flwr:{choice}"] = found
    if name not in choices:
        raise ValueError(f"no strategy {name!r} for this app: choose one of {', '.join(sorted(choices))}")
    return choices[name]
