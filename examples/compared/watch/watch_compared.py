"""Smartwatches that learn which exercise their wearer does: each has seen one person do one of them, for seconds."""

from __future__ import annotations

import hashlib
import io
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedpace.clients.training import SGD, FederatedData, LocalTraining, Partitions, by_key
from fedpace.errors import ConfigError
from fedpace.examples.compared.server import server_app

WINDOW = 100
"""Samples at 50 Hz: two seconds."""
STRETCHES = 5
"""Devices that share a recording."""
SHA256 = "eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537"

Floats = NDArray[np.float32]


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 7))


def data() -> FederatedData:
    """140 recordings of ten people's exercises (Burns et al., "Shoulder physiotherapy exercise recognition", 2018,
    arXiv:1802.01489), as the package seglearn has them: the last fifth of each is to test on, and the rest is shared out
    to five devices, a stretch of 3 to 9 seconds to each. All five are tested on the same.

    Windows begin every fifth of a second to train on, and every second to test on.
    """
    recordings = read_recordings()
    train, test = [], []
    for axes, _ in recordings:
        known, new = np.split(axes, [len(axes) * 4 // 5])
        train += [windows(stretch, 10) for stretch in np.array_split(known, STRETCHES)]
        test.append(windows(new, 50))
    exercises = np.array([exercise for _, exercise in recordings], np.int64)
    inputs, recorded_by = features(np.concatenate(train)), _numbered(train)
    test_inputs, recorded_as = features(np.concatenate(test)), _numbered(test)
    mean, deviation = inputs.mean(axis=0), inputs.std(axis=0)
    return FederatedData(
        (inputs - mean) / deviation,
        exercises[recorded_by // STRETCHES],
        by_key(recorded_by),
        (test_inputs - mean) / deviation,
        exercises[recorded_as],
        _shared(by_key(recorded_as)),
    )


def _numbered(parts: list[Floats]) -> NDArray[np.int64]:
    """Which of the parts each window is of."""
    return np.repeat(np.arange(len(parts)), [len(part) for part in parts])


def _shared(recordings: Partitions) -> Partitions:
    """The windows of each recording for each of the devices that share it."""
    sizes = np.repeat(recordings.sizes, STRETCHES)
    indices = np.concatenate([np.tile(own, STRETCHES) for own in recordings])
    return Partitions(indices, np.concatenate([[0], np.cumsum(sizes)]))


def read_recordings() -> list[tuple[Floats, int]]:
    """Six axes of acceleration and rotation, float32 of shape (samples, 6), and which of seven exercises it is.

    The package's file is read as it is: it holds objects, which numpy has to be allowed to make, so it is made sure that
    it is the one file known. Raises ConfigError where the package is not installed, or is another.
    """
    found = find_spec("seglearn")
    if found is None or not found.submodule_search_locations:
        raise ConfigError("the recordings are those of the package seglearn: pip install seglearn==1.2.5")
    path = Path(found.submodule_search_locations[0]) / "data" / "watch_dataset.npy"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; pip install seglearn==1.2.5") from None
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise ConfigError(f"{path} is not the file of that name in seglearn 1.2.5; pip install seglearn==1.2.5")
    table = np.load(io.BytesIO(content), allow_pickle=True).item()
    return [(axes.astype(np.float32), int(label)) for axes, label in zip(table["X"], table["y"], strict=True)]


def windows(axes: Floats, stride: int) -> Floats:
    """Of shape (windows, WINDOW, 6): one begins every `stride` samples."""
    starts = np.arange(0, len(axes) - WINDOW + 1, stride)
    return axes[starts[:, np.newaxis] + np.arange(WINDOW)]


def features(found: Floats) -> Floats:
    """Of windows, shape (n, 30): of each axis its mean, deviation, extremes, and mean change from sample to sample."""
    changes = np.abs(np.diff(found, axis=1)).mean(axis=1)
    return np.concatenate(
        [found.mean(axis=1), found.std(axis=1), found.min(axis=1), found.max(axis=1), changes], axis=1
    )


training = LocalTraining(model=model, data=data, optimizer=SGD(lr=0.1), epochs=3, batch_size=16)
client = training.client_app()
server = server_app(training)
