"""What a device does: train on its own images, and remember its velocity and how often it took part."""

from __future__ import annotations

from typing import cast

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from numpy_only.task import Floats, Samples, evaluate, load_partition, train, zeros

app = ClientApp()


@app.train()
def train_on_device(message: Message, context: Context) -> Message:
    """Train the model that came; reply with the new weights, and with how often this device has taken part."""
    config, state = context.run_config, context.state
    if "velocity" not in state:
        state["velocity"] = to_record(zeros())
        state["history"] = MetricRecord({"participations": 0})
    model, velocity = to_floats(message.content.array_records["arrays"]), to_floats(state.array_records["velocity"])
    samples = own_samples(context)
    loss = train(
        model,
        velocity,
        samples,
        epochs=int(config["local-epochs"]),
        batch_size=int(config["batch-size"]),
        learning_rate=float(config["learning-rate"]),
        momentum=float(config["momentum"]),
    )
    history = state.metric_records["history"]
    history["participations"] = cast(int, history["participations"]) + 1
    state["velocity"] = to_record(velocity)
    metrics = {"train-loss": loss, "participations": history["participations"], "num-examples": len(samples[1])}
    content = RecordDict({"arrays": to_record(model), "metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=message)


@app.evaluate()
def evaluate_on_device(message: Message, context: Context) -> Message:
    """Test the model that came on this device's images."""
    samples = own_samples(context)
    loss, accuracy = evaluate(to_floats(message.content.array_records["arrays"]), samples)
    metrics = MetricRecord({"loss": loss, "accuracy": accuracy, "num-examples": len(samples[1])})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)


def own_samples(context: Context) -> Samples:
    """This device's images, by the partition that its node config names."""
    return load_partition(int(context.node_config["partition-id"]), int(context.node_config["num-partitions"]))


def to_floats(arrays: ArrayRecord) -> dict[str, Floats]:
    """The arrays of a record, as copies to write into."""
    return {key: array.numpy().astype(np.float32) for key, array in arrays.items()}


def to_record(arrays: dict[str, Floats]) -> ArrayRecord:
    """A record that holds `arrays`."""
    return ArrayRecord({key: Array(array) for key, array in arrays.items()})
