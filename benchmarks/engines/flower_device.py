"""The ClientApp that Flower simulates. A worker keeps the images that it has read."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from benchmarks.engines.arrays import Work, load
from benchmarks.engines.models import make_model, train_epoch

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the model that came for an epoch on the images of this device."""
    work = work_at(str(message.content.config_records["config"]["work"]))
    images, labels = work.device(int(context.node_config["partition-id"]))
    model = make_model(work.name)
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    train_epoch(model, torch.from_numpy(images), torch.from_numpy(labels))
    metrics = MetricRecord({"num-examples": len(labels)})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=message)


@functools.cache
def work_at(path: str) -> Work:
    torch.set_num_threads(1)
    return load(Path(path))
