"""What the server does: combine the devices' models by a preset of fedpace, and test every few versions."""

from __future__ import annotations

import json

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from fedpace.strategies import PRESETS
from large_fleet.client_app import model, training

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the strategy that the run config names."""
    config = context.run_config
    every = int(config["evaluate-every"])
    network = model()
    inputs = torch.from_numpy(training.federation.test_inputs)
    targets = torch.from_numpy(training.federation.test_targets)

    def evaluate(version: int, arrays: ArrayRecord) -> MetricRecord | None:
        if version % every:
            return None
        network.load_state_dict(arrays.to_torch_state_dict())
        with torch.inference_mode():
            outputs = network(inputs)
        loss = torch.nn.functional.cross_entropy(outputs, targets).item()
        accuracy = (outputs.argmax(dim=1) == targets).float().mean().item()
        return MetricRecord({"loss": loss, "accuracy": accuracy})

    strategy = PRESETS[str(config["strategy"])](
        train_nodes=int(config["train-nodes"]), fraction_evaluate=0.0, **json.loads(str(config["settings"]))
    )
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(network.state_dict()),
        num_rounds=int(config["num-rounds"]),
        evaluate_fn=evaluate,
    )
