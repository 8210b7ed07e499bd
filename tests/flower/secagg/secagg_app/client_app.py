"""Logistic regression on data made from the partition id."""

from __future__ import annotations

import numpy as np
from flwr.client import Client, ClientApp, NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.common import Context, NDArrays, Scalar

LOCAL_STEPS = 5


class LogisticRegression(NumPyClient):
    """A few full-batch gradient steps a round on this partition's data."""

    def __init__(self, partition: int, learning_rate: float) -> None:
        self.partition = partition
        self.learning_rate = learning_rate

    def fit(self, parameters: NDArrays, config: dict[str, Scalar]) -> tuple[NDArrays, int, dict[str, Scalar]]:
        """Train with steps of a length that falls with the round."""
        weight, bias = (array.astype(np.float64) for array in parameters)
        inputs, targets = self.samples(len(weight))
        step = self.learning_rate / int(config["server-round"])
        for _ in range(LOCAL_STEPS):
            error = (predict(inputs, weight, bias) - targets) / len(inputs)
            weight -= step * (inputs.T @ error)
            bias -= step * error.sum(keepdims=True)
        return [weight.astype(np.float32), bias.astype(np.float32)], len(inputs), {}

    def evaluate(self, parameters: NDArrays, config: dict[str, Scalar]) -> tuple[float, int, dict[str, Scalar]]:
        """Cross-entropy on this partition's data."""
        weight, bias = parameters
        inputs, targets = self.samples(len(weight))
        chances = np.where(targets, predict(inputs, weight, bias), 1 - predict(inputs, weight, bias))
        return float(-np.log(chances).mean()), len(inputs), {}

    def samples(self, features: int) -> NDArrays:
        """Inputs, (n, features), and targets, (n,), of this partition: each has its own n and skew."""
        rng = np.random.default_rng(self.partition)
        truth = np.random.default_rng(1234).normal(size=features)
        inputs = rng.normal(loc=0.2 * self.partition, size=(20 + 7 * self.partition, features))
        return [inputs, (inputs @ truth > 0).astype(np.float64)]


def predict(inputs: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    chances: np.ndarray = 1 / (1 + np.exp(-(inputs @ weight + bias)))
    return chances


def client_fn(context: Context) -> Client:
    """The client of the node that `context` is of."""
    partition = int(context.node_config["partition-id"])
    return LogisticRegression(partition, float(context.run_config["learning-rate"])).to_client()


app = ClientApp(client_fn=client_fn, mods=[secaggplus_mod])
