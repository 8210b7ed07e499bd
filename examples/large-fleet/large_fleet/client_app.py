"""What a device does, declared once: which model, which samples, how it trains."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits
from torch import nn

from fedpace.clients.training import SGD, FederatedData, LocalTraining, dirichlet_drawn

DEVICES = 10_000
TEST = 360  # images that no device trains on


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def data() -> FederatedData:
    """Digits of 8 x 8 pixels: 32 for each device, mostly of a few classes."""
    images, labels = load_digits(return_X_y=True)
    inputs, targets = (images / 16.0).astype(np.float32), labels.astype(np.int64)
    partitions = dirichlet_drawn(targets[TEST:], DEVICES, alpha=0.3, size=32, seed=0)
    return FederatedData(inputs[TEST:], targets[TEST:], partitions, inputs[:TEST], targets[:TEST])


training = LocalTraining(model=model, data=data, optimizer=SGD(lr=0.1), epochs=1, batch_size=16)
app = training.client_app()
