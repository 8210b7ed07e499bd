"""quickstart-numpy: the model, its training, and the data."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

Data = tuple[NDArray[np.float32], NDArray[np.int64]]
IMAGES = 40  # a partition


@cache
def digits() -> Data:
    images, labels = load_digits(return_X_y=True)
    return (images / 16).astype(np.float32), labels.astype(np.int64)


def load_data(partition_id: int, num_partitions: int) -> tuple[Data, Data]:
    """Four fifths of a partition's images, and the rest."""
    images, labels = digits()
    rows = np.random.default_rng([partition_id, num_partitions]).choice(len(labels), IMAGES, replace=False)
    train, test = rows[: IMAGES * 4 // 5], rows[IMAGES * 4 // 5 :]
    return (images[train], labels[train]), (images[test], labels[test])


def first_model() -> list[NDArray[np.float32]]:
    return [np.zeros((64, 10), np.float32), np.zeros(10, np.float32)]


def train(model: list[NDArray[np.float32]], data: Data, epochs: int, learning_rate: float) -> float:
    """Trains in place, on images shuffled by the global generator; returns the loss of the last epoch."""
    weight, bias = model
    images, labels = data
    losses: list[float] = []
    for _ in range(epochs):
        losses = []
        for rows in np.array_split(np.random.permutation(len(labels)), 4):
            chances = predict(model, images[rows])
            losses += (-np.log(chances[np.arange(len(rows)), labels[rows]])).tolist()
            error = (chances - np.eye(10, dtype=np.float32)[labels[rows]]) / len(rows)
            weight -= learning_rate * images[rows].T @ error
            bias -= learning_rate * error.sum(axis=0)
    return float(np.mean(losses))


def evaluate(model: list[NDArray[np.float32]], data: Data) -> tuple[float, float]:
    """Loss (cross-entropy) and accuracy."""
    images, labels = data
    chances = predict(model, images)
    loss = -np.log(chances[np.arange(len(labels)), labels]).mean()
    return float(loss), float((chances.argmax(axis=1) == labels).mean())


def predict(model: list[NDArray[np.float32]], images: NDArray[np.float32]) -> NDArray[np.float32]:
    weight, bias = model
    logits = images @ weight + bias
    scaled = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(scaled / scaled.sum(axis=1, keepdims=True))
