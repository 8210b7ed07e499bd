"""The models of the two works in torch, and the local run of a device as one writes it by hand."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from benchmarks.engines.arrays import BATCH_SIZE, LEARNING_RATE, Floats, Work


def make_model(name: str) -> nn.Sequential:
    """The model of work `name`: logits (n, 10) from images (n, *IMAGE_SHAPES[name])."""
    if name == "M":
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 7 * 7, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def first_model(work: Work) -> nn.Sequential:
    """The model with the first weights of `work`."""
    model = make_model(work.name)
    set_weights(model, work.weights)
    return model


def set_weights(model: nn.Module, weights: Mapping[str, Floats]) -> None:
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})


def train_epoch(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, batch_size: int = BATCH_SIZE) -> None:
    """One epoch of SGD over shuffled images."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for rows in torch.randperm(len(labels)).split(batch_size):  # type: ignore[no-untyped-call]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def weights_of(model: nn.Module) -> dict[str, Floats]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def judge(weights: Mapping[str, Floats], work: Work) -> tuple[float, float]:
    """Mean loss (cross-entropy) and accuracy of the model with these weights on the test images of `work`."""
    model = make_model(work.name)
    set_weights(model, weights)
    logits, labels = model(torch.from_numpy(work.test_x)), torch.from_numpy(work.test_y)
    loss = nn.functional.cross_entropy(logits, labels)
    return float(loss), float((logits.argmax(dim=1) == labels).double().mean())
