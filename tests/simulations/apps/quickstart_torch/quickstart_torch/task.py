"""quickstart-torch: the model, its training, and the data."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

IMAGES = 40  # a partition
Loader = DataLoader[tuple[torch.Tensor, ...]]


class Net(nn.Module):
    """An MLP for 8x8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.fc2(nn.functional.relu(self.fc1(x)))
        return found


@cache
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)


def load_data(partition_id: int, num_partitions: int, batch_size: int) -> tuple[Loader, Loader]:
    """Four fifths of a partition's images, shuffled, and the rest."""
    images, labels = digits()
    rows = np.random.default_rng([partition_id, num_partitions]).choice(len(labels), IMAGES, replace=False)
    train, test = rows[: IMAGES * 4 // 5], rows[IMAGES * 4 // 5 :]
    trainset, testset = (TensorDataset(images[part], labels[part]) for part in (train, test))
    return DataLoader(trainset, batch_size=batch_size, shuffle=True), DataLoader(testset, batch_size=batch_size)


def train(net: nn.Module, trainloader: Loader, epochs: int, lr: float, device: torch.device) -> float:
    """Train the model on the training set; returns its mean loss."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    net.train()
    total = 0.0
    for _ in range(epochs):
        for images, labels in trainloader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            total += loss.item()
    return total / (epochs * len(trainloader))


@torch.no_grad()
def test(net: nn.Module, testloader: Loader, device: torch.device) -> tuple[float, float]:
    """Mean loss and accuracy."""
    net.eval()
    loss, correct = 0.0, 0
    for images, labels in testloader:
        outputs = net(images.to(device))
        loss += nn.functional.cross_entropy(outputs, labels.to(device), reduction="sum").item()
        correct += int((outputs.argmax(1) == labels.to(device)).sum())
    return loss / len(testloader.dataset), correct / len(testloader.dataset)  # type: ignore[arg-type]
