"""Model, data and local training of work M: the same numbers as those of benchmarks/engines/arrays.py."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn

SAMPLES = 32  # a device
BATCH_SIZE = 16
LEARNING_RATE = 0.1
TEST_SHARE = 0.2
SEED = 2026


def make_model() -> nn.Sequential:
    """Logits (n, 10) from images (n, 64)."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def first_model() -> nn.Sequential:
    torch.manual_seed(SEED)
    return make_model()


@cache
def split() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images (n, 64) in 0..1 and labels (n,), to train and to test."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(SEED).permutation(len(labels))
    test, train = np.split(order, [round(TEST_SHARE * len(labels))])
    inputs, targets = torch.from_numpy((images / 16).astype(np.float32)), torch.from_numpy(labels.astype(np.int64))
    return (inputs[train], targets[train]), (inputs[test], targets[test])


@cache
def partition(devices: int) -> NDArray[np.int32]:
    """The training images of each device, (devices, SAMPLES): drawn anew for each, without repetition within one."""
    (_, labels), (_, held_out) = split()
    rng = np.random.default_rng(SEED)
    rng.permutation(len(labels) + len(held_out))  # that of the split
    draws = np.sort(rng.integers(0, len(labels) - SAMPLES + 1, (devices, SAMPLES), dtype=np.int32), axis=1)
    return draws + np.arange(SAMPLES, dtype=np.int32)


@cache
def images_of(device: int, devices: int) -> tuple[Tensor, Tensor]:
    """Images (SAMPLES, 64) and labels (SAMPLES,) of one device."""
    (images, labels), _ = split()
    rows = torch.from_numpy(partition(devices)[device].astype(np.int64))
    return images[rows], labels[rows]


def train_epoch(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """One epoch of SGD over shuffled images."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for rows in torch.randperm(len(labels)).split(BATCH_SIZE):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()


@torch.no_grad()
def evaluate(model: nn.Module) -> tuple[float, float]:
    """Mean loss (cross-entropy) and accuracy on the test images."""
    _, (images, labels) = split()
    logits = model(images)
    loss = float(nn.functional.cross_entropy(logits, labels))
    return loss, float((logits.argmax(dim=1) == labels).float().mean())
