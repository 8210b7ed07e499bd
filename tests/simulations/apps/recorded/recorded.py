"""A softmax regression that devices of different pace learn, under strategies whose decisions depend on times."""

from __future__ import annotations

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp import strategy as flower
from numpy.typing import NDArray

from fedpace.clients.mods import measure
from fedpace.strategies import FedAvg, FedBuff, Paced, QScheduler
from fedpace.strategies.gates import Deadline

FEATURES, CLASSES, SAMPLES = 64, 10, 2_000
STRATEGIES = {
    "FedBuff": lambda: FedBuff(k=3, min_available_nodes=6),
    "FedAvg": lambda: FedAvg(gate=Deadline(seconds=0.1, late="discard", over_selection=1.0), min_available_nodes=6),
    "Paced": lambda: Paced(k=3, min_available_nodes=6),
    "QScheduler": lambda: QScheduler(min_available_nodes=6),
    "flwr:FedAvg": lambda: flower.FedAvg(min_available_nodes=6),
}
server = ServerApp()
client = ClientApp(mods=[measure])


def samples(seed: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Points around ten centres, the same for all, and which centre each belongs to."""
    centres = np.random.default_rng(0).normal(size=(CLASSES, FEATURES))
    rng = np.random.default_rng([1, seed])
    labels = rng.integers(CLASSES, size=SAMPLES)
    return centres[labels] + rng.normal(scale=3.0, size=(SAMPLES, FEATURES)), labels


def probabilities(weights: NDArray[np.float64], points: NDArray[np.float64]) -> NDArray[np.float64]:
    scores = points @ weights
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    found: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return found


@client.train()
def train(message: Message, context: Context) -> Message:
    """Some steps of gradient descent on the device's own points."""
    points, labels = samples(int(context.node_config["partition-id"]))
    [weights] = message.content.array_records["arrays"].to_numpy_ndarrays()
    weights = weights.copy()
    for _ in range(20):
        error = probabilities(weights, points) - np.eye(CLASSES)[labels]
        weights -= 0.1 / SAMPLES * points.T @ error
    loss = -np.log(probabilities(weights, points)[np.arange(SAMPLES), labels]).mean()
    metrics = MetricRecord({"num-examples": SAMPLES, "train-loss": float(loss)})
    return Message(RecordDict({"arrays": ArrayRecord([weights]), "metrics": metrics}), reply_to=message)


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    points, labels = samples(100 + int(context.node_config["partition-id"]))
    [weights] = message.content.array_records["arrays"].to_numpy_ndarrays()
    accuracy = (probabilities(weights, points).argmax(axis=1) == labels).mean()
    metrics = MetricRecord({"num-examples": SAMPLES, "accuracy": float(accuracy)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def evaluate_centrally(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Takes the server a while, in which devices go on."""
    points, labels = samples(1_000)
    [weights] = arrays.to_numpy_ndarrays()
    return MetricRecord({"accuracy": float((probabilities(weights, points).argmax(axis=1) == labels).mean())})


@server.main()
def main(grid: Grid, context: Context) -> None:
    STRATEGIES[str(context.run_config["strategy"])]().start(
        grid=grid,
        initial_arrays=ArrayRecord([np.zeros((FEATURES, CLASSES))]),
        num_rounds=int(context.run_config["num-rounds"]),
        evaluate_fn=evaluate_centrally,
    )
