"""A declared local training on generated points, under the strategy that the run's config names."""

from __future__ import annotations

from time import monotonic, sleep
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from torch import nn

from fedpace.clients.training import SGD, FederatedData, LocalTraining, Partitions
from fedpace.strategies import FedAvg, FedBuff

PARTITIONS, POINTS = 100, 24


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))


def data() -> FederatedData:
    """Points around three centres; partitions are of different sizes."""
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 3, PARTITIONS * POINTS)
    points = (rng.standard_normal((len(labels), 8)) + 2 * np.eye(3, 8)[labels]).astype(np.float32)
    sizes = rng.integers(4, POINTS, PARTITIONS)
    offsets = np.cumsum([0, *sizes], dtype=np.int64)
    return FederatedData(
        points, labels, Partitions(rng.permutation(len(labels))[: offsets[-1]], offsets), points, labels
    )


client = LocalTraining(model=model, data=data, optimizer=SGD(lr=0.1), epochs=2, batch_size=8).client_app()
server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    torch.manual_seed(1)
    initial = ArrayRecord(model().state_dict())

    def evaluate(done: int, arrays: ArrayRecord) -> MetricRecord:
        if done and done == config["fail-after"]:
            raise ValueError("the app has had enough")
        net, federation = model(), data()
        net.load_state_dict(arrays.to_torch_state_dict())
        found = net(torch.from_numpy(federation.test_inputs)).argmax(1).numpy() == federation.test_targets
        return MetricRecord({"accuracy": float(found.mean()), "seconds": monotonic()})

    while len(list(grid.get_node_ids())) < 10:
        sleep(3)
    strategies: dict[str, Any] = {
        "FedAvg": lambda: FedAvg(train_nodes=20),
        "FedBuff": lambda: FedBuff(k=8, train_nodes=30),
        "flwr": lambda: FlowerFedAvg(fraction_train=0.4, fraction_evaluate=0.2),
    }
    strategy = strategies[str(config["strategy"])]()
    strategy.start(grid, initial, num_rounds=int(config["rounds"]), evaluate_fn=evaluate)
