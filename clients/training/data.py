"""Data of a federation, held once: all samples in one place, and which of them each device has as index arrays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpace.errors import ConfigError


@dataclass(frozen=True, eq=False)
class Partitions:
    """Device d has the samples `indices[offsets[d] : offsets[d + 1]]`; a sample may belong to many devices.

    `indices`: int32 or int64 of shape (n,). `offsets`: int64 of shape (devices + 1,), from 0 to n, never falling.
    Raises ConfigError where they are something else.
    """

    indices: NDArray[Any]
    offsets: NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.indices.dtype not in (np.int32, np.int64) or self.indices.ndim != 1:
            raise ConfigError(f"partitions: indices are {_told(self.indices)}; give int32 or int64 of shape (n,)")
        if self.offsets.dtype != np.int64 or self.offsets.ndim != 1 or len(self.offsets) < 2:
            raise ConfigError(f"partitions: offsets are {_told(self.offsets)}; give int64 of shape (devices + 1,)")
        if self.offsets[0] != 0 or self.offsets[-1] != len(self.indices) or (np.diff(self.offsets) < 0).any():
            raise ConfigError("partitions: offsets have to rise from 0 to the number of indices")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, device: int) -> NDArray[Any]:
        """The samples of one device, a view. Raises IndexError where there is no such device."""
        if not 0 <= device < len(self):
            raise IndexError(f"there is no device {device}: with {len(self)} devices it is 0 or more and less")
        found: NDArray[Any] = self.indices[self.offsets[device] : self.offsets[device + 1]]
        return found

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self[device] for device in range(len(self)))

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Samples of each device, of shape (devices,)."""
        return np.diff(self.offsets)


@dataclass(frozen=True, eq=False)
class FeatureShift:
    """What each device's sensor does to its samples: inputs turned by quarters, then times `gain`, plus `bias`.

    `gain`, `bias`: float32 of shape (devices,). `turns`: int8 of shape (devices,), quarter turns counter-clockwise, of
    inputs whose last two axes are height and width, of equal length.
    """

    gain: NDArray[np.float32]
    bias: NDArray[np.float32]
    turns: NDArray[np.int8]

    def apply(self, inputs: NDArray[np.float32], devices: NDArray[np.int64]) -> NDArray[np.float32]:
        """The inputs, of shape (k, n, ...), as k devices see them: a new array."""
        per_device = (-1,) + (1,) * (inputs.ndim - 1)
        shifted = inputs * self.gain[devices].reshape(per_device) + self.bias[devices].reshape(per_device)
        turns = self.turns[devices]
        for turn in (1, 2, 3):
            if (turned := turns == turn).any():
                shifted[turned] = np.rot90(shifted[turned], turn, axes=(-2, -1))
        return shifted


@dataclass(frozen=True, eq=False)
class Split:
    """Samples, and which of them each device has: `inputs` (n, ...), `targets` (n, ...), `partitions`."""

    inputs: NDArray[Any]
    targets: NDArray[Any]
    partitions: Partitions


@dataclass(frozen=True, eq=False)
class FederatedData:
    """All samples, what each device has of them, and a test set that none trains on.

    `inputs`: of shape (n, ...), float32 or integers (tokens). `targets`: of shape (n, ...), integer class labels or
    float32. `test_inputs`, `test_targets`: the same of the test set. `test_partitions` say what of the test set each
    device evaluates on; without them it is the samples that it trains on. `shift` is what devices make of their inputs.
    Raises ConfigError where they do not fit together.
    """

    inputs: NDArray[Any]
    targets: NDArray[Any]
    partitions: Partitions
    test_inputs: NDArray[Any]
    test_targets: NDArray[Any]
    test_partitions: Partitions | None = None
    shift: FeatureShift | None = None

    def __post_init__(self) -> None:
        for name in ("inputs", "targets", "test_inputs", "test_targets"):
            array = getattr(self, name)
            if array.dtype != np.float32 and array.dtype.kind not in "iu":
                raise ConfigError(f"data: {name} are {array.dtype}; convert them to float32, or to integers")
        for one, other in (("inputs", "targets"), ("test_inputs", "test_targets")):
            if len(getattr(self, one)) != len(getattr(self, other)):
                raise ConfigError(f"data: {len(getattr(self, one))} {one}, but {len(getattr(self, other))} {other}")
        for split in (self.training, self.testing):
            used, held = split.partitions.indices, len(split.inputs)
            if len(used) and not 0 <= used.min() <= used.max() < held:
                raise ConfigError(f"data: partitions name samples {used.min()} to {used.max()}; there are {held}")
        if len(self.testing.partitions) != len(self.partitions):
            raise ConfigError(
                f"data: {len(self.partitions)} devices train, but {len(self.testing.partitions)} evaluate; give as many"
            )
        if self.shift is not None:
            self._check_shift(self.shift)

    def _check_shift(self, shift: FeatureShift) -> None:
        if self.inputs.dtype != np.float32:
            raise ConfigError(f"data: a feature shift needs float32 inputs, not {self.inputs.dtype}")
        for each in fields(shift):
            if getattr(shift, each.name).shape != (len(self.partitions),):
                told = _told(getattr(shift, each.name))
                raise ConfigError(f"data: the shift's {each.name} is {told}, for {len(self.partitions)} devices")
        shape = self.inputs.shape[1:]
        if shift.turns.any() and (len(shape) < 2 or shape[-1] != shape[-2]):
            raise ConfigError(f"data: only square images can be turned by quarters, not inputs of shape {shape}")

    @property
    def training(self) -> Split:
        """What devices train on."""
        return Split(self.inputs, self.targets, self.partitions)

    @property
    def testing(self) -> Split:
        """What devices evaluate on."""
        if self.test_partitions is None:
            return self.training
        return Split(self.test_inputs, self.test_targets, self.test_partitions)

    def samples(self, device: int, split: Split) -> tuple[NDArray[Any], NDArray[Any]]:
        """Inputs and targets of one device in a split, copies. Raises IndexError where there is no such device."""
        rows = split.partitions[device]
        inputs, targets = self.batches(np.array([device]), rows[np.newaxis], split)
        return inputs[0], targets[0]

    def batches(
        self, devices: NDArray[np.int64], rows: NDArray[Any], split: Split
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Inputs (k, n, ...) and targets (k, n, ...) of k devices: the samples `rows`, of shape (k, n), of a split, as the
        devices see them. Copies."""
        inputs = split.inputs[rows]
        if self.shift is not None:
            inputs = self.shift.apply(inputs, devices)
        return inputs, split.targets[rows]


def _told(array: NDArray[Any]) -> str:
    return f"{array.dtype} of shape {array.shape}"
