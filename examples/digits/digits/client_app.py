"""What a device does: train the model on its own images, and test it on its own."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from digits.task import Net, Samples, evaluate, load_partition, train
from fedpace.clients.mods import control_variates, measure, proximal

app = ClientApp(mods=[measure, proximal, control_variates])


@app.train()
def train_on_device(message: Message, context: Context) -> Message:
    """Train the model that came on this device's images, for as many local steps as the server asks, if it does."""
    config = context.run_config
    steps = message.content.config_records["config"].get("local-steps")
    model = received_model(message, context)
    samples, _ = own_samples(context)
    loss = train(
        model,
        samples,
        epochs=int(config["local-epochs"]),
        batch_size=int(config["batch-size"]),
        learning_rate=float(config["learning-rate"]),
        momentum=float(config["momentum"]),
        steps=None if steps is None else int(steps),
    )
    metrics = MetricRecord({"train-loss": loss, "num-examples": len(samples[1])})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)


@app.evaluate()
def evaluate_on_device(message: Message, context: Context) -> Message:
    """Test the model that came on images kept from training, of the labels this device sees."""
    _, samples = own_samples(context)
    loss, accuracy = evaluate(received_model(message, context), samples)
    metrics = MetricRecord({"loss": loss, "accuracy": accuracy, "num-examples": len(samples[1])})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)


def accelerator(context: Context) -> torch.device:
    """The accelerator that this device's owner or its runtime names, else the first there is."""
    return torch.device(str(context.node_config.get("device") or ("cuda:0" if torch.cuda.is_available() else "cpu")))


def received_model(message: Message, context: Context) -> Net:
    """The model that `message` carries."""
    model = Net()
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    return model.to(accelerator(context))


def own_samples(context: Context) -> tuple[Samples, Samples]:
    """This device's images to train on and to test on."""
    missing = {"partition-id", "num-partitions"} - context.node_config.keys()
    if missing:
        raise ValueError(
            f"the node config lacks {' and '.join(sorted(missing))}: "
            "start the device with --node-config 'partition-id=0 num-partitions=8'"
        )
    device = accelerator(context)
    (images, labels), (test_images, test_labels) = load_partition(
        int(context.node_config["partition-id"]),
        int(context.node_config["num-partitions"]),
        alpha=float(context.run_config["alpha"]),
        seed=int(context.run_config["seed"]),
    )
    return (images.to(device), labels.to(device)), (test_images.to(device), test_labels.to(device))
