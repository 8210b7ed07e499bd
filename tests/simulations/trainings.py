"""Small federations and their training, for tests of executors; importable by worker processes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from fedpace.clients.training import SGD, Adam, FeatureShift, FederatedData, LocalTraining, Partitions

MODELS = ("linear", "mlp", "cnn", "frozen")


class FrozenFirst(nn.Module):
    """A layer that is not trained, a constant buffer, a normalisation, and functional operators."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(36, 7).requires_grad_(False)
        self.norm = nn.LayerNorm(7)
        self.second = nn.Linear(7, 3)
        self.register_buffer("scale", torch.full((7,), 1.5))

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.norm(self.first(inputs.flatten(1)))) * self.scale)
        return out


def make_model(name: str) -> nn.Module:
    """Logits (n, 3) of images (n, 1, 6, 6)."""
    if name == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    if name == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3))
    if name == "cnn":
        convolution = nn.Conv2d(1, 4, 3, padding=1)
        return nn.Sequential(convolution, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3))
    return FrozenFirst()


def make_data(sizes: tuple[int, ...], seed: int = 0, shifted: bool = False) -> FederatedData:
    """Images (n, 1, 6, 6) of three classes; device d trains on sizes[d] of them, and evaluates on d + 1."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, 90)
    images = (rng.standard_normal((90, 1, 6, 6)) + labels[:, np.newaxis, np.newaxis, np.newaxis]).astype(np.float32)
    offsets = np.cumsum([0, *sizes], dtype=np.int64)
    tested = np.arange(1, len(sizes) + 1)
    shift = None
    if shifted:
        draws = rng.standard_normal((2, len(sizes))).astype(np.float32)
        shift = FeatureShift(1 + draws[0] / 4, draws[1] / 4, rng.integers(0, 4, len(sizes), dtype=np.int8))
    return FederatedData(
        images,
        labels,
        Partitions(rng.integers(0, 90, offsets[-1]), offsets),
        images[:40],
        labels[:40],
        Partitions(rng.integers(0, 40, tested.sum()), np.cumsum([0, *tested], dtype=np.int64)),
        shift,
    )


def make_mislabelled() -> FederatedData:
    """Three devices, of which the second has labels of no class, to train and to evaluate on."""
    data = make_data((5, 3, 4))
    targets, rows = data.targets.copy(), data.partitions[1]
    targets[rows] += 50
    assert not np.isin(np.concatenate([data.partitions[0], data.partitions[2]]), rows).any()
    return replace(data, targets=targets, test_partitions=None)


def squared_distance(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss of one's own."""
    return torch.square(outputs.softmax(1) - (targets[:, None] == torch.arange(3)).float()).sum(1)


def make_training(
    model: str = "mlp",
    sizes: tuple[int, ...] = (5, 12, 1, 8, 30, 3),
    optimizer: SGD | Adam | None = None,
    *,
    batch_size: int = 4,
    epochs: int = 1,
    own_loss: bool = False,
    shifted: bool = False,
) -> LocalTraining:
    return LocalTraining(
        model=partial(make_model, model),
        data=partial(make_data, sizes, shifted=shifted),
        loss=squared_distance if own_loss else "cross-entropy",
        optimizer=optimizer or SGD(lr=0.1),
        epochs=epochs,
        batch_size=batch_size,
    )
