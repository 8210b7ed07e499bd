"""Digits learned by a network of 50,826 parameters; what devices send back goes through the codec of the run config.

The split over devices is FEDPACE_BENCHMARK_SEED's, an environment variable, since declared training knows no run config.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import ClassVar, Literal

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from fedpace.clients.mods import compress, replica
from fedpace.clients.training import SGD, FederatedData, LocalTraining, dirichlet
from fedpace.strategies import FedAvg

DEVICES = 8
SEED = int(os.environ.get("FEDPACE_BENCHMARK_SEED", "0"))

Next = Callable[[Message, Context], Message]
Mod = Callable[[Message, Context, Next], Message]


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))


def make_data() -> FederatedData:
    """scikit-learn's 1,797 images: 1,437 to train on, shared out by Dirichlet(0.3) label skew, and 360 to test on."""
    images, labels = load_digits(return_X_y=True)
    inputs, targets = (images / 16.0).astype(np.float32), labels.astype(np.int64)
    parts = train_test_split(inputs, targets, test_size=0.2, stratify=targets, random_state=42)
    inputs, test_inputs, targets, test_targets = parts
    return FederatedData(inputs, targets, dirichlet(targets, DEVICES, alpha=0.3, seed=SEED), test_inputs, test_targets)


@cache
def compression(codec: str, feedback: str, momentum: float) -> Mod:
    kinds: dict[str, bool | Literal["ef21"]] = {"ef": True, "ef21": "ef21", "none": False}
    return compress(codec, error_feedback=kinds[feedback], momentum=momentum)


class AsTheRunSays:
    """`compress` with the run config's settings, and `replica` where the server sends steps."""

    after_training: ClassVar[bool] = True

    def __call__(self, message: Message, context: Context, call_next: Next) -> Message:
        config = context.run_config
        if codec := str(config["codec"]):
            mod, inner = compression(codec, str(config["feedback"]), float(config["momentum"])), call_next

            def call_next(message: Message, context: Context) -> Message:
                return mod(message, context, inner)

        return replica(message, context, call_next) if config["downlink"] else call_next(message, context)


training = LocalTraining(model=make_model, data=make_data, optimizer=SGD(lr=0.1), epochs=1, batch_size=16)
client = training.client_app(mods=[AsTheRunSays()])
server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    config, data = context.run_config, training.federation
    inputs, targets = torch.from_numpy(data.test_inputs), torch.from_numpy(data.test_targets)
    torch.manual_seed(SEED)
    network = make_model()
    initial = ArrayRecord(network.state_dict())

    def evaluate(version: int, arrays: ArrayRecord) -> MetricRecord:
        network.load_state_dict(arrays.to_torch_state_dict())
        with torch.inference_mode():
            right = (network(inputs).argmax(dim=1) == targets).float().mean().item()
        return MetricRecord({"accuracy": right})

    strategy = FedAvg(fraction_evaluate=0.0, downlink=str(config["downlink"]) or None)
    strategy.start(
        grid=grid,
        initial_arrays=initial,
        num_rounds=int(config["rounds"]),
        train_config=ConfigRecord({"lr": float(config["learning-rate"])}),
        evaluate_fn=evaluate,
    )
