"""Digits learned by eight devices, by one strategy after the other on the same fleet, each version tested.

A device whose node config has "step-seconds" is a board on which a local step takes so much longer than the arithmetic
does here; it waits that out. Simulated devices have no such config: how long they take is the fleet's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from fedpace.clients.training import SGD, FederatedData, LocalTraining, dirichlet
from fedpace.strategies import PRESETS

DEVICES = 8
PAUSE_SECONDS = 3.0
"""After the last version: devices end what they are at. A task that is given up costs a worker process its life."""

Next = Callable[[Message, Context], Message]


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def make_data() -> FederatedData:
    """scikit-learn's 1,797 images: 1,437 to train on, shared out by Dirichlet(3) label skew, and 360 to test on."""
    images, labels = load_digits(return_X_y=True)
    inputs, targets = (images / 16.0).astype(np.float32), labels.astype(np.int64)
    parts = train_test_split(inputs, targets, test_size=0.2, stratify=targets, random_state=42)
    inputs, test_inputs, targets, test_targets = parts
    partitions = dirichlet(targets, DEVICES, alpha=3.0, seed=0, at_least=16)
    return FederatedData(inputs, targets, partitions, test_inputs, test_targets)


class Board:
    """Waits for as long as a board's arithmetic takes beyond ours."""

    after_training: ClassVar[bool] = True

    def __call__(self, message: Message, context: Context, call_next: Next) -> Message:
        reply = call_next(message, context)
        if "step-seconds" in context.node_config and reply.has_content():
            steps = reply.content.metric_records["metrics"]["local-steps"]
            time.sleep(float(context.node_config["step-seconds"]) * steps)  # type: ignore[operator]
        return reply


training = LocalTraining(model=make_model, data=make_data, optimizer=SGD(lr=0.04), steps=10, batch_size=16)
client = training.client_app(mods=[Board()])
server = ServerApp()
torch.optim.SGD(make_model().parameters())  # the first one imports much: not while a task's time is taken


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Runs what the config's `runs` name. The metrics of every version's test are "accuracy", "run" (its place in `runs`), and
    "at" (seconds of the grid's time); version 0 is tested as a run begins."""
    for number, (name, versions, settings) in enumerate(json.loads(str(context.run_config["runs"]))):
        warm_up(grid)
        torch.manual_seed(0)
        strategy = PRESETS[name](fraction_evaluate=0.0, min_available_nodes=DEVICES, **settings)
        strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(make_model().state_dict()),
            num_rounds=versions,
            evaluate_fn=tested(grid, number, versions),
        )


def warm_up(grid: Grid) -> None:
    """A step on every device: what is first done, and what the strategy before left undone, is nobody's time then."""
    arrays = ArrayRecord(make_model().state_dict())
    config = ConfigRecord({"local-steps": 1})
    messages = [
        Message(RecordDict({"arrays": arrays, "config": config}), dst_node_id=node, message_type="train")
        for node in grid.get_node_ids()
    ]
    for reply in grid.send_and_receive(messages, timeout=300):
        if not reply.has_content():
            raise RuntimeError(f"device {reply.metadata.src_node_id} is not ready: {reply.error.reason}")


def tested(grid: Grid, run: int, last: int) -> Callable[[int, ArrayRecord], MetricRecord]:
    data, model = training.federation, make_model()
    inputs, targets = torch.from_numpy(data.test_inputs), torch.from_numpy(data.test_targets)

    def evaluate(version: int, arrays: ArrayRecord) -> MetricRecord:
        at = grid.now()  # type: ignore[attr-defined]
        model.load_state_dict(arrays.to_torch_state_dict())
        with torch.inference_mode():
            accuracy = (model(inputs).argmax(dim=1) == targets).float().mean().item()
        if version == last:
            time.sleep(PAUSE_SECONDS)
        return MetricRecord({"accuracy": accuracy, "run": run, "at": at})

    return evaluate
