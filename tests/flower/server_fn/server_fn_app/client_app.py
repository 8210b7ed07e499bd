"""Least squares on data made from the partition id; the client also gives the initial model."""

from __future__ import annotations

import numpy as np
from flwr.client import Client, ClientApp, NumPyClient
from flwr.common import Context, NDArrays, Scalar

FEATURES, LOCAL_STEPS = 8, 5


class LeastSquares(NumPyClient):
    """A few full-batch gradient steps a round on this partition's data."""

    def __init__(self, partition: int, learning_rate: float) -> None:
        rng = np.random.default_rng(partition)
        truth = np.random.default_rng(1234).normal(size=FEATURES)
        self.inputs = rng.normal(size=(20 + 7 * partition, FEATURES))
        self.targets = self.inputs @ truth + 0.1 * partition
        self.learning_rate = learning_rate

    def get_parameters(self, config: dict[str, Scalar]) -> NDArrays:
        """The initial model, the same on every node."""
        return [np.random.default_rng(0).normal(size=FEATURES).astype(np.float32)]

    def fit(self, parameters: NDArrays, config: dict[str, Scalar]) -> tuple[NDArrays, int, dict[str, Scalar]]:
        """Train."""
        weight = parameters[0].astype(np.float64)
        for _ in range(LOCAL_STEPS):
            weight -= self.learning_rate * self.inputs.T @ (self.inputs @ weight - self.targets) / len(self.inputs)
        return [weight.astype(np.float32)], len(self.inputs), {}

    def evaluate(self, parameters: NDArrays, config: dict[str, Scalar]) -> tuple[float, int, dict[str, Scalar]]:
        """Mean squared error on this partition's data."""
        error = self.inputs @ parameters[0] - self.targets
        return float(np.mean(error**2)), len(self.inputs), {}


def client_fn(context: Context) -> Client:
    """The client of the node that `context` is of."""
    partition = int(context.node_config["partition-id"])
    return LeastSquares(partition, float(context.run_config["learning-rate"])).to_client()


app = ClientApp(client_fn=client_fn)
