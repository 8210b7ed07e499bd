"""Slow devices know what fast ones do not: a third of the devices, the slow ones, are alone in seeing tops.

The fleet is `fleet.toml` beside this file: of every three devices the first is slow.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedpace.clients.training import SGD, FederatedData, LocalTraining, Partitions, dirichlet_drawn
from fedpace.examples.compared import fashion_mnist
from fedpace.examples.compared.server import server_app

DEVICES = 500
IMAGES = 100
SLOW = np.arange(DEVICES) % 3 == 0
TOPS = (0, 2, 4, 6)
"""T-shirts, pullovers, coats and shirts."""


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(196, 64), nn.ReLU(), nn.Linear(64, 10))


def data() -> FederatedData:
    """Fashion-MNIST: each device has 100 images, of tops if it is slow, else of anything but tops.

    Each label's share on a device is drawn from Dirichlet(0.3), of those labels that its group has.
    """
    inputs, targets, test_inputs, test_targets = fashion_mnist.load()
    is_top = np.isin(targets, TOPS)
    indices = np.empty((DEVICES, IMAGES), np.int32)
    for group, samples in ((SLOW, is_top), (~SLOW, ~is_top)):
        indices[group] = _shared_out(np.flatnonzero(samples), targets, int(group.sum()))
    partitions = Partitions(indices.reshape(-1), np.arange(DEVICES + 1) * IMAGES)
    return FederatedData(inputs, targets, partitions, test_inputs, test_targets)


def _shared_out(samples: NDArray[np.int64], targets: NDArray[np.int64], devices: int) -> NDArray[np.int64]:
    """Samples of some of the labels for each device of a group, of shape (devices, IMAGES)."""
    labels = targets[samples]
    drawn = dirichlet_drawn(labels, devices, alpha=0.3 * len(np.unique(labels)), size=IMAGES, seed=0)
    return samples[drawn.indices].reshape(devices, IMAGES)


training = LocalTraining(model=model, data=data, optimizer=SGD(lr=0.1), epochs=1, batch_size=16)
client = training.client_app()
server = server_app(training)
