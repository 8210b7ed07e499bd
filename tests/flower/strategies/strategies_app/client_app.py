"""Softmax regression on data made from the partition id; the message received is spoiled once it has been used."""

from __future__ import annotations

from typing import cast

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

Floats = NDArray[np.float64]
LOCAL_STEPS = 5

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """A few full-batch gradient steps, of a length that falls with the round, with FedProx's term where it is asked for."""
    weight, bias = received_model(message)
    config = message.content.config_records["config"]
    step = cast(float, config["learning-rate"]) / cast(int, config["server-round"])
    mu = cast(float, config.get("proximal-mu", 0.0))
    inputs, targets = own_samples(context, *weight.shape)
    received_weight, received_bias = weight.copy(), bias.copy()
    for _ in range(LOCAL_STEPS):
        error = (softmax(inputs @ weight + bias) - targets) / len(inputs)
        weight -= step * (inputs.T @ error + mu * (weight - received_weight))
        bias -= step * (error.sum(axis=0) + mu * (bias - received_bias))
    arrays = ArrayRecord({"weight": Array(weight.astype(np.float32)), "bias": Array(bias.astype(np.float32))})
    metrics = MetricRecord({"loss": cross_entropy(inputs, targets, weight, bias), "num-examples": len(inputs)})
    spoil(message)
    return Message(content=RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """The loss of the model received on this partition's data."""
    weight, bias = received_model(message)
    inputs, targets = own_samples(context, *weight.shape)
    metrics = MetricRecord({"loss": cross_entropy(inputs, targets, weight, bias), "num-examples": len(inputs)})
    spoil(message)
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)


def spoil(message: Message) -> None:
    """Write into the message received, in each way there is: whoever reads it after this client gets nonsense."""
    arrays, config = message.content.array_records["arrays"], message.content.config_records["config"]
    arrays["weight"] = Array(np.full_like(arrays["weight"].numpy(), np.nan))
    arrays["bias"].data = Array(np.full_like(arrays["bias"].numpy(), np.nan)).data
    config["learning-rate"] = float("nan")
    config["server-round"] = -1
    del message.content["config"]
    message.content["arrays"] = ArrayRecord()


def received_model(message: Message) -> tuple[Floats, Floats]:
    """Weight, (features, classes), and bias, (classes,), in double precision."""
    arrays = message.content.array_records["arrays"]
    return arrays["weight"].numpy().astype(np.float64), arrays["bias"].numpy().astype(np.float64)


def own_samples(context: Context, features: int, classes: int) -> tuple[Floats, Floats]:
    """Inputs, (n, features), and one-hot targets, (n, classes), of this partition: each has its own n and skew."""
    partition = int(context.node_config["partition-id"])
    rng = np.random.default_rng(partition)
    truth = np.random.default_rng(1234).normal(size=(features, classes))
    inputs = rng.normal(loc=0.2 * partition, size=(20 + 7 * partition, features))
    return inputs, np.eye(classes)[(inputs @ truth).argmax(axis=1)]


def softmax(logits: Floats) -> Floats:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    chances: Floats = exponentials / exponentials.sum(axis=1, keepdims=True)
    return chances


def cross_entropy(inputs: Floats, targets: Floats, weight: Floats, bias: Floats) -> float:
    return float(-np.log((softmax(inputs @ weight + bias) * targets).sum(axis=1)).mean())
