"""pfl-research's simulation of FedAvg on PyTorch, in one process.

Tuned: tensors in memory, one thread (its own loops are single operators on small arrays), no evaluation, no callbacks
but the stop-watch.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import nn

from benchmarks.engines.arrays import BATCH_SIZE, DEVICES_A_ROUND, LEARNING_RATE, SEED, load
from benchmarks.engines.meter import Meter, RoundMeter, arguments
from benchmarks.engines.models import first_model, weights_of


class Trained(nn.Module):
    """A network with the two functions that pfl asks for."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.network(images), labels)

    def metrics(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        return {}


class Watch(TrainingProcessCallback):
    def __init__(self, rounds: RoundMeter) -> None:
        self.rounds = rounds

    def after_central_iteration(self, metrics: Any, model: Any, *, central_iteration: int) -> tuple[bool, Any]:
        self.rounds.after(central_iteration + 1)  # pfl counts from 0
        return False, Metrics()


def main() -> None:
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    np.random.seed(SEED)
    work = load(options.work)
    data = [tuple(map(torch.from_numpy, work.device(index))) for index in range(work.devices)]
    network = first_model(work)
    trained = Trained(network)
    model = PyTorchModel(trained, torch.optim.SGD, torch.optim.SGD(trained.parameters(), lr=1.0))
    devices = FederatedDataset(
        lambda index: Dataset(raw_data=data[index], user_id=str(index)), lambda: np.random.randint(work.devices)
    )
    rounds = RoundMeter(meter := Meter(), options.warm_up, options.rounds)
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=rounds.last,
            evaluation_frequency=rounds.last + 1,
            train_cohort_size=DEVICES_A_ROUND,
            val_cohort_size=0,
        ),
        SimulatedBackend(training_data=devices, val_data=devices),
        model,
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=LEARNING_RATE, local_batch_size=BATCH_SIZE),
        callbacks=[Watch(rounds)],
        send_metrics_to_platform=False,
    )
    settings = {"pfl": version("pfl"), "processes": 1}
    meter.report(options.rounds * DEVICES_A_ROUND, weights_of(network), options.model, **settings)


if __name__ == "__main__":
    main()
