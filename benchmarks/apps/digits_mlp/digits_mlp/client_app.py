"""What a device does: an epoch of SGD on its own images."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from digits_mlp.task import images_of, make_model, train_epoch

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the model that came for an epoch on the images of this partition."""
    images, labels = images_of(int(context.node_config["partition-id"]), int(context.node_config["num-partitions"]))
    model = make_model()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    train_epoch(model, images, labels)
    metrics = MetricRecord({"num-examples": len(labels)})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)
