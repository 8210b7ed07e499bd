"""Handwritten digits, of which each device sees few, and those mostly of a few kinds."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from fedpace.clients.training import SGD, FederatedData, LocalTraining, dirichlet_drawn
from fedpace.examples.compared.server import server_app

DEVICES = 1000


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def data() -> FederatedData:
    """scikit-learn's images of 8 x 8 pixels: 1,437 to train on, of which each device has 32, and 360 to test on.

    Each label's share on a device is drawn from Dirichlet(0.3).
    """
    images, labels = load_digits(return_X_y=True)
    inputs, test_inputs, targets, test_targets = train_test_split(
        (images / 16).astype(np.float32), labels.astype(np.int64), test_size=0.2, stratify=labels, random_state=42
    )
    partitions = dirichlet_drawn(targets, DEVICES, alpha=0.3 * 10, size=32, seed=0)
    return FederatedData(inputs, targets, partitions, test_inputs, test_targets)


training = LocalTraining(model=model, data=data, optimizer=SGD(lr=0.1), epochs=3, batch_size=16)
client = training.client_app()
server = server_app(training)
