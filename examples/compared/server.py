"""A server that tests what a declared local training has taught, on all data and on what the slowest devices hold."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from numpy.typing import NDArray

from fedpace.clients.training import FederatedData, LocalTraining
from fedpace.errors import ConfigError
from fedpace.strategies import PRESETS

Evaluate = Callable[[int, ArrayRecord], MetricRecord | None]


def server_app(training: LocalTraining) -> ServerApp:
    """A ServerApp that runs the strategy of its run config, whose keys each app's `pyproject.toml` explains."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        config = context.run_config
        name, versions = str(config["strategy"]), int(config["num-rounds"])
        if name not in PRESETS:
            raise ConfigError(f"strategy {name!r}: choose one of {', '.join(sorted(PRESETS))}")
        strategy = PRESETS[name](
            train_nodes=int(config["train-nodes"]), fraction_evaluate=0.0, **json.loads(str(config["settings"]))
        )
        strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(training.model().state_dict()),
            num_rounds=versions,
            evaluate_fn=evaluation(training, grid, float(config["evaluate-seconds"]), versions),
        )

    return app


def evaluation(training: LocalTraining, grid: Grid, every: float, last: int) -> Evaluate:
    """An `evaluate_fn` that gives "loss", "accuracy" and, where it is known who is slow, "slow_accuracy".

    It tests a version where `every` seconds of the grid's time are over since the one it tested before, and version
    `last`. Strategies that make a version an update are so tested no more often than those that make one a round.
    """
    data, model = training.federation, training.model()
    inputs, targets = torch.from_numpy(data.test_inputs), torch.from_numpy(data.test_targets)
    slow = slowest_third(grid)
    weights = None if slow is None else torch.from_numpy(held_by(data, slow))
    now: Callable[[], float] = getattr(grid, "now", time.monotonic)
    due = -math.inf

    def evaluate(version: int, arrays: ArrayRecord) -> MetricRecord | None:
        nonlocal due
        if now() < due and version != last:
            return None
        due = now() + every
        model.load_state_dict(arrays.to_torch_state_dict())
        with torch.inference_mode():
            outputs = model(inputs)
            right = (outputs.argmax(dim=1) == targets).double()
            found = {"loss": torch.nn.functional.cross_entropy(outputs, targets), "accuracy": right.mean()}
            if weights is not None:
                found["slow_accuracy"] = right @ weights
        return MetricRecord({name: value.item() for name, value in found.items()})

    return evaluate


def slowest_third(grid: Grid) -> NDArray[np.int64] | None:
    """The third of a simulated fleet that takes longest a local step, as rows of the fleet, which are partitions too.

    None where all take as long, or where devices are real, and nobody knows yet.
    """
    fleet: Any = getattr(grid, "fleet", None)
    if fleet is None:
        return None
    seconds: NDArray[np.float32] = fleet.devices.step_seconds
    if seconds.min() == seconds.max():
        return None
    return np.argsort(-seconds, kind="stable")[: max(1, round(len(seconds) / 3))]


def held_by(data: FederatedData, devices: NDArray[np.int64]) -> NDArray[np.float64]:
    """How much each test sample counts if the test is to be what these devices hold: float64 of shape (test samples,),
    with the sum 1.

    Those are the devices' own test samples, where they have any; else all, in the devices' mix of labels.
    """
    if data.test_partitions is not None:
        own = np.concatenate([data.test_partitions[device] for device in devices])
        counts = np.bincount(own, minlength=len(data.test_targets)).astype(np.float64)
    else:
        labels = data.targets[np.concatenate([data.partitions[device] for device in devices])]
        classes = int(max(data.targets.max(), data.test_targets.max())) + 1
        held, tested = (np.bincount(each, minlength=classes) for each in (labels, data.test_targets))
        counts = (held / np.maximum(tested, 1))[data.test_targets]
    found: NDArray[np.float64] = counts / counts.sum()
    return found
