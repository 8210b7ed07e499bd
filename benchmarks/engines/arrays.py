"""The work that every engine simulates: the same images, the same partition, the same first model, from one .npz.

Read with numpy alone, for environments that have little else; made here, where scikit-learn and torch are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SAMPLES = 32  # a device
BATCH_SIZE = 16
LEARNING_RATE = 0.1
DEVICES_A_ROUND = 100
TEST_SHARE = 0.2
SEED = 2026

# M: 8x8 digits, an MLP 64-64-10. C: 28x28 digits, a CNN with 105,866 parameters. What they are in torch is in models.py.
NAMES = ("M", "C")
IMAGE_SHAPES = {"M": (64,), "C": (1, 28, 28)}
PARAMETERS = {"M": 4_810, "C": 105_866}

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Indices = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Work:
    """Images are float32 in 0..1, of shape (n, *IMAGE_SHAPES[name]); labels are int64 in 0..9.

    `partition` has a row a device: the indices of its SAMPLES training images, int32. `weights` are the first model's parameters
    by their names in torch, float32, with torch's layouts: (out, in) of a dense layer, (out, in, height, width) of a
    convolution.
    """

    name: str
    train_x: Floats
    train_y: Integers
    test_x: Floats
    test_y: Integers
    partition: Indices
    weights: dict[str, Floats]

    @property
    def devices(self) -> int:
        return len(self.partition)

    def device(self, index: int) -> tuple[Floats, Integers]:
        """A copy of one device's images and labels."""
        rows = self.partition[index]
        return self.train_x[rows], self.train_y[rows]


def save(work: Work, path: Path) -> None:
    arrays: dict[str, Any] = {f"weight:{name}": array for name, array in work.weights.items()}
    arrays |= {name: getattr(work, name) for name in ("train_x", "train_y", "test_x", "test_y", "partition")}
    np.savez(path, name=np.array(work.name), **arrays)


def load(path: Path) -> Work:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    weights = {name.removeprefix("weight:"): arrays.pop(name) for name in list(arrays) if name.startswith("weight:")}
    return Work(name=str(arrays.pop("name")), weights=weights, **arrays)


def make_work(name: str, devices: int, mnist: Path | None = None) -> Work:
    """Work `name` for a fleet of `devices`. Images are drawn anew for each device, without repetition within one.

    `mnist` is the file of 28x28 digits, which work C needs: rows of 784 pixels in 0..255 and the label, compressed.
    """
    import torch

    from benchmarks.engines.models import make_model, weights_of

    rng = np.random.default_rng(SEED)
    images, labels = small_digits() if name == "M" else large_digits(mnist)
    order = rng.permutation(len(labels))
    test, train = np.split(order, [round(TEST_SHARE * len(labels))])
    # Sorted draws moved apart by one each: none comes twice, for a million devices at once.
    draws = np.sort(rng.integers(0, len(train) - SAMPLES + 1, (devices, SAMPLES), dtype=np.int32), axis=1)
    partition = np.asarray(draws + np.arange(SAMPLES, dtype=np.int32), np.int32)
    torch.manual_seed(SEED)
    weights = weights_of(make_model(name))
    return Work(name, images[train], labels[train], images[test], labels[test], partition, weights)


def small_digits() -> tuple[Floats, Integers]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return (images / 16).astype(np.float32), labels.astype(np.int64)


def large_digits(path: Path | None) -> tuple[Floats, Integers]:
    if path is None:
        raise ValueError("work C needs the file of 28x28 digits: run `python benchmarks/peers.py mnist`")
    rows = np.loadtxt(path, delimiter=",", dtype=np.float32)  # reads .gz as it is
    images = np.asarray(rows[:, :-1] / 255, np.float32)
    return images.reshape(-1, *IMAGE_SHAPES["C"]), rows[:, -1].astype(np.int64)
