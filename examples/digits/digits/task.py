"""What is learned: the images, how devices share them, the model, and its training."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

Samples = tuple[Tensor, Tensor]
"""Images, float32 of shape (n, 1, 8, 8) in [0, 1], and their labels, int64 of shape (n,)."""


class Net(nn.Module):
    """Two convolutions and two dense layers, 13,706 parameters; logits of shape (n, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=3, padding=1)
        self.fc1 = nn.Linear(32 * 2 * 2, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        logits: Tensor = self.fc2(F.relu(self.fc1(x.flatten(1))))
        return logits


def initial_model(seed: int) -> Net:
    """A model whose weights depend on `seed` alone; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net()


@cache
def load_split() -> tuple[Samples, Samples]:
    """The 1,797 images that come with scikit-learn: 1,437 to train on and 360 to test on, stratified by label."""
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[:, np.newaxis]
    labels = digits.target.astype(np.int64)
    parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=42)
    train_images, test_images, train_labels, test_labels = map(torch.from_numpy, parts)
    return (train_images, train_labels), (test_images, test_labels)


def load_partition(partition_id: int, num_partitions: int, *, alpha: float, seed: int) -> tuple[Samples, Samples]:
    """The images of one device: those it trains on, and those it tests on, of the same mix of labels.

    Raises ValueError where there is no such partition.
    """
    if not 0 <= partition_id < num_partitions:
        raise ValueError(
            f"partition-id is {partition_id}: with num-partitions={num_partitions} it is 0 or more and less"
        )
    own = []
    for images, labels in load_split():
        chosen = dirichlet_partition(labels.numpy(), num_partitions, alpha=alpha, seed=seed)[partition_id]
        own.append((images[chosen], labels[chosen]))
    return own[0], own[1]


def dirichlet_partition(
    labels: NDArray[np.int64], num_partitions: int, *, alpha: float, seed: int
) -> list[NDArray[np.int64]]:
    """Split samples by label skew: each label is shared out over the partitions in proportions drawn from
    Dirichlet(alpha) (Yurochkin et al., 2019, arXiv:1905.12022, section 4), which depend on the arguments but not on
    `labels`. Partitions left with fewer than 10 samples (or an even share, if that is less) are filled up from the
    largest ones.

    Returns the indices of each partition's samples, shuffled; every sample is in exactly one.
    Raises ValueError where samples are too few for one each, or alpha is not positive.
    """
    if not 1 <= num_partitions <= len(labels):
        raise ValueError(f"num-partitions is {num_partitions}: choose from 1 to {len(labels)}, the number of samples")
    if alpha <= 0:
        raise ValueError(f"alpha is {alpha}: choose more than 0")
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(num_partitions, alpha), size=10)
    partitions: list[list[int]] = [[] for _ in range(num_partitions)]
    for label, share in enumerate(shares):
        samples = rng.permutation(np.flatnonzero(labels == label))
        ends = (np.cumsum(share)[:-1] * len(samples)).astype(int)
        for partition, part in zip(partitions, np.split(samples, ends), strict=True):
            partition.extend(part.tolist())
    for partition in partitions:
        rng.shuffle(partition)
    enough = min(10, len(labels) // num_partitions)
    while len(smallest := min(partitions, key=len)) < enough:
        smallest.append(max(partitions, key=len).pop())
    return [np.array(partition) for partition in partitions]


def train(
    model: Net,
    samples: Samples,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    momentum: float,
    steps: int | None = None,
) -> float:
    """Train `model` in place with SGD, in an order drawn from torch's global generator, for so many passes over the
    samples, or, where they are given, for so many `steps` of one batch each. Returns the mean loss of the last pass."""
    images, labels = samples
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=momentum)
    model.train()
    left = epochs * -(-len(labels) // batch_size) if steps is None else steps
    total, seen = torch.zeros(()), 1
    while left > 0:
        total, seen = torch.zeros((), device=images.device), 0
        for batch in torch.split(torch.randperm(len(labels)).to(images.device), batch_size)[:left]:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.detach() * len(batch)
            seen += len(batch)
            left -= 1
    return total.item() / seen


@torch.no_grad()
def evaluate(model: Net, samples: Samples) -> tuple[float, float]:
    """Mean cross-entropy and accuracy of `model` on `samples`."""
    images, labels = samples
    model.eval()
    logits = model(images)
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()
