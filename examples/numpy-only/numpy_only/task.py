"""What is learned: the images, how devices share them, and softmax regression."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

Floats = NDArray[np.float32]
Samples = tuple[Floats, NDArray[np.int64]]
"""Images, float32 of shape (n, 64) in [0, 1], and their labels, int64 of shape (n,)."""

SHAPES = {"weight": (64, 10), "bias": (10,)}


def zeros() -> dict[str, Floats]:
    """Arrays of the model's shapes: the model that training begins with, and the velocity a device begins with."""
    return {key: np.zeros(shape, np.float32) for key, shape in SHAPES.items()}


@cache
def load_split() -> tuple[Samples, Samples]:
    """The 1,797 images that come with scikit-learn: 1,437 to train on and 360 to test on, stratified by label."""
    digits = load_digits()
    images, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int64)
    parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=42)
    train_images, test_images, train_labels, test_labels = parts
    return (train_images, train_labels), (test_images, test_labels)


def load_partition(partition_id: int, num_partitions: int) -> Samples:
    """The training images of one device: each takes every `num_partitions`-th one."""
    images, labels = load_split()[0]
    return images[partition_id::num_partitions], labels[partition_id::num_partitions]


def train(
    model: dict[str, Floats],
    velocity: dict[str, Floats],
    samples: Samples,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    momentum: float,
) -> float:
    """Train `model` with SGD, in an order drawn from numpy's global generator; `velocity` goes on from where it was.

    Both are changed in place. Returns the mean loss after training.
    """
    images, labels = samples
    targets = np.eye(10, dtype=np.float32)[labels]
    for _ in range(epochs):
        order = np.random.permutation(len(labels))
        for batch in np.split(order, range(batch_size, len(order), batch_size)):
            error = (softmax(model, images[batch]) - targets[batch]) / len(batch)
            gradient = {"weight": images[batch].T @ error, "bias": error.sum(axis=0)}
            for key in model:
                velocity[key] *= momentum
                velocity[key] += gradient[key]
                model[key] -= learning_rate * velocity[key]
    return evaluate(model, samples)[0]


def softmax(model: dict[str, Floats], images: Floats) -> Floats:
    """Probabilities, (n, 10)."""
    logits = images @ model["weight"] + model["bias"]
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities: Floats = exponentials / exponentials.sum(axis=1, keepdims=True)
    return probabilities


def evaluate(model: dict[str, Floats], samples: Samples) -> tuple[float, float]:
    """Mean cross-entropy and accuracy of `model` on `samples`."""
    images, labels = samples
    probabilities = softmax(model, images)
    loss = -np.log(probabilities[np.arange(len(labels)), labels] + 1e-9).mean()
    return float(loss), float((probabilities.argmax(axis=1) == labels).mean())
