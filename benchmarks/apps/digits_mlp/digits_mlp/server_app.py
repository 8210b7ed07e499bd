"""What the server does: the strategy that the run config names, every version tested on the images that no device has."""

from __future__ import annotations

import json
from collections.abc import Callable

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp import strategy as flower_strategies
from flwr.serverapp.strategy import Strategy

from digits_mlp.task import evaluate, first_model, make_model

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the strategy. It evaluates here alone, not on devices."""
    config = context.run_config
    count = int(config["devices-a-round"])
    strategy = make_strategy(str(config["strategy"]), count, len(list(grid.get_node_ids())))
    strategy(**json.loads(str(config["settings"]))).start(
        grid=grid,
        initial_arrays=ArrayRecord(first_model().state_dict()),
        num_rounds=int(config["num-rounds"]),
        evaluate_fn=evaluate_centrally,
    )


def make_strategy(name: str, count: int, nodes: int) -> Callable[..., Strategy]:
    """The strategy of that name, to train on `count` of so many nodes at a time, as a function of further arguments."""
    if name.startswith("flwr:"):
        found: Callable[..., Strategy] = getattr(flower_strategies, name.removeprefix("flwr:"))
        sizes = {"fraction_train": count / max(count, nodes), "min_train_nodes": count}
    else:
        from fedpace.strategies import PRESETS

        found, sizes = PRESETS[name], {"train_nodes": count}
    common = {**sizes, "fraction_evaluate": 0.0, "min_available_nodes": count}
    return lambda **settings: found(**{**common, **settings})


def evaluate_centrally(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Loss and accuracy on all test images."""
    model = make_model()
    model.load_state_dict(arrays.to_torch_state_dict())
    loss, accuracy = evaluate(model)
    return MetricRecord({"loss": loss, "accuracy": accuracy})
