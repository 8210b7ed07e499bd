"""What every device of a cohort takes at every step: the batches of the sequential loop, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpace.clients.training.data import FederatedData, Split
from fedpace.clients.training.order import sample_orders

_GATHERED_BYTES = 4 << 20
"""Inputs that are gathered at once for one device, about."""


@dataclass(frozen=True)
class Chunk:
    """Devices that are run through one program together. All arrays have one entry a device.

    `rows`: their partitions. `seeds`: of the order of their samples. `first` and `sizes`: which of their samples the task
    is about. `steps`: batches. `lr`, `mu`: learning rate and FedProx's term. Evaluations have no use for the last three.
    """

    batch_size: int
    rows: NDArray[np.int64]
    seeds: NDArray[np.uint64]
    first: NDArray[np.int64]
    sizes: NDArray[np.int64]
    steps: NDArray[np.int64]
    lr: NDArray[np.float32]
    mu: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, which: slice | NDArray[np.int64]) -> Chunk:
        """Some of the devices."""
        return Chunk(self.batch_size, *(array[which] for array in self._arrays()))

    @staticmethod
    def joined(chunks: Sequence[Chunk]) -> Chunk:
        """The devices of chunks with the same size of batch."""
        if len(chunks) == 1:
            return chunks[0]
        columns = zip(*(chunk._arrays() for chunk in chunks), strict=True)
        return Chunk(chunks[0].batch_size, *map(np.concatenate, columns))

    def _arrays(self) -> tuple[NDArray[Any], ...]:
        return self.rows, self.seeds, self.first, self.sizes, self.steps, self.lr, self.mu


@dataclass(frozen=True)
class Schedule:
    """Of `width` places, of which the first are the chunk's devices and the rest take part with a weight of 0.

    `samples`: int64 of shape (steps, width, batch_size), rows of the data. `counts`: int64 of shape (steps, width), how
    many of them count, 0 once a device is done. The others stand at the end and name a sample of the device.
    `passes`: int64 of shape (width,), the step at which a device's last pass over its samples begins.
    """

    samples: NDArray[np.int64]
    counts: NDArray[np.int64]
    passes: NDArray[np.int64]

    def weights(self) -> NDArray[np.float32]:
        """Of each sample in its batch's mean: float32 of shape (steps, width, batch_size)."""
        shares = (1.0 / np.maximum(self.counts, 1)).astype(np.float32)
        counted = np.arange(self.samples.shape[2]) < self.counts[:, :, np.newaxis]
        return np.where(counted, shares[:, :, np.newaxis], np.float32(0))


def training_schedule(chunk: Chunk, split: Split, width: int) -> Schedule:
    """The batches that `local_batches` gives each device, at the same steps."""
    a_pass = -(-chunk.sizes // chunk.batch_size)
    return _schedule(chunk, split, width, chunk.steps, a_pass, shuffled=True)


def evaluation_schedule(chunk: Chunk, split: Split, width: int) -> Schedule:
    """Every device's samples once, in their order."""
    a_pass = -(-chunk.sizes // chunk.batch_size)
    return _schedule(chunk, split, width, a_pass, a_pass, shuffled=False)


def gathered(
    data: FederatedData, split: Split, devices: NDArray[np.int64], samples: NDArray[np.int64]
) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Inputs and targets, (k, n, ...), of k devices at each step; `samples` are those of a schedule, (steps, k, n). What one
    device alone takes is gathered for many steps at once."""
    steps, count, size = samples.shape
    many = max(1, _GATHERED_BYTES // (size * max(1, split.inputs[:1].nbytes))) if count == 1 else 1
    for at in range(0, steps, many):
        inputs, targets = data.batches(devices, samples[at : at + many].reshape(count, -1), split)
        if count > 1:
            yield inputs, targets
            continue
        for start in range(0, inputs.shape[1], size):
            yield inputs[:, start : start + size], targets[:, start : start + size]


def run_orders(chunk: Chunk) -> NDArray[np.int64]:
    """The order in which each device takes its samples in every pass: int64 of shape (passes, devices, max(sizes)). What
    follows a device's own samples, or its last pass, names none of them."""
    a_pass = -(-chunk.sizes // chunk.batch_size)
    passes = int((-(-chunk.steps // a_pass)).max())
    count = len(chunk)
    if passes == 1:
        return sample_orders(chunk.seeds, np.zeros(count, np.int64), chunk.sizes)[np.newaxis]
    epochs = np.repeat(np.arange(passes), count)
    return sample_orders(np.tile(chunk.seeds, passes), epochs, np.tile(chunk.sizes, passes)).reshape(passes, count, -1)


def _schedule(
    chunk: Chunk, split: Split, width: int, steps: NDArray[np.int64], a_pass: NDArray[np.int64], *, shuffled: bool
) -> Schedule:
    size, devices, most = chunk.batch_size, len(chunk), int(a_pass.max())
    places = np.zeros((int(steps.max()), width, size), np.int64)
    counts = np.zeros(places.shape[:2], np.int64)
    batches = np.arange(most)
    held = np.clip(chunk.sizes[:, np.newaxis] - batches * size, 0, size)  # of each batch of a pass
    for epoch in range(int((-(-steps // a_pass)).max())):
        at = epoch * a_pass[:, np.newaxis] + batches
        device, batch = np.nonzero((batches < a_pass[:, np.newaxis]) & (at < steps[:, np.newaxis]))
        numbers = np.zeros((devices, most * size), np.int64)
        taken = int(chunk.sizes.max())
        if shuffled:
            numbers[:, :taken] = sample_orders(chunk.seeds, np.full(devices, epoch), chunk.sizes)
        else:
            numbers[:, :taken] = np.arange(taken)
        step = at[device, batch]
        places[step, device] = numbers.reshape(devices, most, size)[device, batch]
        counts[step, device] = held[device, batch]
    places[np.arange(size) >= counts[:, :, np.newaxis]] = 0
    starts = np.zeros(width, np.int64)
    starts[:devices] = split.partitions.offsets[chunk.rows] + chunk.first
    passes = np.zeros(width, np.int64)
    passes[:devices] = (steps - 1) // a_pass * a_pass
    return Schedule(split.partitions.indices[places + starts[:, np.newaxis]].astype(np.int64), counts, passes)
