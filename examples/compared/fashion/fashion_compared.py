"""Photographs of clothes, of which each device sees mostly a few kinds."""

from __future__ import annotations

from torch import nn

from fedpace.clients.training import SGD, FederatedData, LocalTraining, dirichlet
from fedpace.examples.compared import fashion_mnist
from fedpace.examples.compared.server import server_app

DEVICES = 1000


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(196, 64), nn.ReLU(), nn.Linear(64, 10))


def data() -> FederatedData:
    """Fashion-MNIST: 60,000 images, each on one device, and 10,000 to test on.

    Each label is shared out in proportions drawn from Dirichlet(0.3): devices have 60 images on average, and 10 at
    least.
    """
    inputs, targets, test_inputs, test_targets = fashion_mnist.load()
    partitions = dirichlet(targets, DEVICES, alpha=0.3, seed=0, at_least=10)
    return FederatedData(inputs, targets, partitions, test_inputs, test_targets)


training = LocalTraining(model=model, data=data, optimizer=SGD(lr=0.1), epochs=3, batch_size=16)
client = training.client_app()
server = server_app(training)
