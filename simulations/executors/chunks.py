"""Runs chunks of devices through compiled programs, in this process and on one thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import MessageType
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fedpace.clients.training.data import Split
from fedpace.clients.training.declaration import LocalTraining
from fedpace.clients.training.losses import losses
from fedpace.errors import ConfigError
from fedpace.simulations.executors import programs
from fedpace.simulations.executors.mlp import Layer, MlpKernel, layers_of
from fedpace.simulations.executors.programs import Places, Program, empty_places
from fedpace.simulations.executors.schedule import Chunk, Schedule, evaluation_schedule, training_schedule
from fedpace.simulations.executors.structure import Floats, Place, Structure

Doubles = NDArray[np.float64]


@dataclass
class _Memory:
    """What a training program reads and changes; one set serves all of them."""

    trained: Places
    constants: Places
    moments: list[list[Tensor]]
    anchors: list[Tensor]


class ChunkRunner:
    """The programs of one `LocalTraining`, made when first needed: one for each kind of task and size of batch.

    `width` devices are run side by side; `compiled` or only traced. `kernel`, where there is one, does the training
    instead, of any number of devices. Raises ConfigError for models that cannot be run so.
    """

    def __init__(self, training: LocalTraining, device: str, width: int | None = None, compiled: bool = True) -> None:
        self._declared = training
        self._data = training.federation
        self._device = _device(device)
        self._model = training.model().to(self._device)
        self.structure = Structure(self._model)
        self.width = width or programs.width_of(self.structure, self._device)
        self._make = programs.compiled if compiled else programs.traced
        self._programs: dict[tuple[Any, ...], Program] = {}
        places = self.structure.places
        trained = self._places([place for place in places if place.trained])
        self._memory = _Memory(
            trained,
            self._places([place for place in places if not place.trained]),
            [_zeros(trained) for _ in range(programs.moments(training.optimizer))],
            _zeros(trained),
        )
        self._arrays = self._places(places)
        self.kernel: MlpKernel | None = None
        if compiled and self._device.type == "cpu" and (layers := layers_of(training, self._model, self.structure)):
            self.kernel = _kernel(training, layers, self.structure.size)

    def check(self) -> None:
        """Raises ConfigError where the model, the loss and the data cannot be run together."""
        with _one_thread():
            size = self._declared.batch_size
            programs.traced(self._training_step(proximal=False), self._training_example(size))
            programs.traced(self._evaluation_step(), self._evaluation_example(size))

    def run(self, kind: str, chunk: Chunk, rows: Floats) -> Doubles:
        """`train` or `evaluate`, as `kind` says."""
        return self.train(chunk, rows) if kind == MessageType.TRAIN else self.evaluate(chunk, rows)

    def train(self, chunk: Chunk, rows: Floats) -> Doubles:
        """Trains the models `rows`, (k, size), in place. Returns the mean loss of each device's last pass, and whether its
        model's numbers are finite, (2, k)."""
        if self.kernel is not None:
            return self.kernel.train(chunk, rows)
        with _one_thread(), torch.no_grad():
            schedule = training_schedule(chunk, self._data.training, self.width)
            proximal = bool(chunk.mu.any())
            step = self._training_program(chunk.batch_size, proximal=proximal)
            models = torch.from_numpy(rows)
            self._begin(models, proximal=proximal)
            means = self._steps(step, chunk, schedule)
            self._memory.trained.store(models)
        counts = np.where(np.arange(len(means))[:, np.newaxis] >= schedule.passes, schedule.counts, 0)
        found: Doubles = (np.where(counts > 0, means, 0.0) * counts).sum(axis=0) / np.maximum(counts.sum(axis=0), 1)
        return np.stack([found[: len(chunk)], _finite(rows)])

    def evaluate(self, chunk: Chunk, rows: Floats) -> Doubles:
        """Mean losses of each device's samples, and shares that are right (or NaN), (2, k)."""
        with _one_thread(), torch.no_grad():
            schedule = evaluation_schedule(chunk, self._data.testing, self.width)
            step = self._evaluation_program(chunk.batch_size)
            self._arrays.load(torch.from_numpy(rows))
            counted = np.arange(chunk.batch_size) < schedule.counts[:, :, np.newaxis]
            weights = self._tensor(counted.astype(np.float32))
            sums = torch.zeros((2, self.width), dtype=torch.float64, device=self._device)
            for at in range(len(weights)):
                batch = self._batch(chunk, schedule, at, self._data.testing)
                found = step(*self._arrays.tensors, *batch, self._side(weights[at]))
                sums += torch.stack(found).view(2, self.width)
        means: Doubles = sums.cpu().numpy()[:, : len(chunk)] / chunk.sizes
        return means

    def _begin(self, models: Tensor, *, proximal: bool) -> None:
        memory = self._memory
        memory.trained.load(models)
        memory.constants.load(models)
        for tensors in memory.moments:
            for tensor in tensors:
                tensor.zero_()
        if proximal:
            for anchor, tensor in zip(memory.anchors, memory.trained.tensors, strict=True):
                anchor.copy_(tensor)

    def _steps(self, step: Program, chunk: Chunk, schedule: Schedule) -> Doubles:
        """Mean losses of batches, (steps, width)."""
        weights = self._tensor(schedule.weights())
        lr = np.zeros(schedule.counts.shape, np.float32)
        lr[:, : len(chunk)] = chunk.lr
        lr[schedule.counts == 0] = 0
        mu = np.zeros(self.width, np.float32)
        mu[: len(chunk)] = chunk.mu
        rates, shares = self._tensor(lr), self._side(self._tensor(mu))
        corrections = [programs.bias_correction(self._declared.optimizer, at) for at in range(len(lr))]
        corrected = self._tensor(np.array(corrections, np.float32))
        memory, found = tree_leaves(self._memory_arguments()), []
        for at in range(len(lr)):
            batch = self._batch(chunk, schedule, at, self._data.training)
            numbers = (self._side(weights[at]), self._side(rates[at]), shares, corrected[at])
            (means,) = step(*memory, *batch, *numbers)
            found.append(means)
        all_means: Doubles = torch.stack(found).view(-1, self.width).double().cpu().numpy()
        return all_means

    def _batch(self, chunk: Chunk, schedule: Schedule, at: int, split: Split) -> tuple[Tensor, Tensor]:
        devices = np.zeros(self.width, np.int64)
        devices[: len(chunk)] = chunk.rows
        inputs, targets = self._data.batches(devices, schedule.samples[at], split)
        return self._side(self._tensor(inputs)), self._side(self._tensor(targets))

    def _side(self, tensor: Tensor) -> Tensor:
        """Of (width, ...) what programs take: one device's alone where the width is 1."""
        return tensor if self.width > 1 else tensor[0]

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def _places(self, places: list[Place]) -> Places:
        return empty_places(places, self.width, self._device)

    def _training_program(self, batch_size: int, *, proximal: bool) -> Program:
        key = ("train", batch_size, proximal)
        if key not in self._programs:
            example = self._training_example(batch_size)
            self._programs[key] = self._make(self._training_step(proximal), example)
        self._model.train()
        return self._programs[key]

    def _evaluation_program(self, batch_size: int) -> Program:
        key = ("evaluate", batch_size)
        if key not in self._programs:
            self._programs[key] = self._make(self._evaluation_step(), self._evaluation_example(batch_size))
        return self._programs[key]

    def _training_step(self, proximal: bool) -> Program:
        loss, optimizer = losses(self._declared.loss), self._declared.optimizer
        self._model.train()
        return programs.training_step(self._model, loss, optimizer, self.structure, self.width, proximal)

    def _evaluation_step(self) -> Program:
        self._model.eval()
        return programs.evaluation_step(self._model, losses(self._declared.loss), self.structure, self.width)

    def _memory_arguments(self) -> tuple[Any, ...]:
        memory = self._memory
        return memory.trained.tensors, memory.constants.tensors, memory.moments, memory.anchors

    def _training_example(self, batch_size: int) -> tuple[Any, ...]:
        weights = torch.zeros((self.width, batch_size), device=self._device)
        numbers = torch.zeros(self.width, device=self._device)
        correction = torch.ones(2, device=self._device)
        batch = self._example_batch(batch_size, self._data.training)
        return (
            *self._memory_arguments(),
            *batch,
            *map(self._side, (weights, numbers, numbers.clone())),
            correction,
        )

    def _evaluation_example(self, batch_size: int) -> tuple[Any, ...]:
        weights = torch.zeros((self.width, batch_size), device=self._device)
        return self._arrays.tensors, *self._example_batch(batch_size, self._data.testing), self._side(weights)

    def _example_batch(self, batch_size: int, split: Split) -> tuple[Tensor, Tensor]:
        batch = (
            np.zeros((self.width, batch_size, *array.shape[1:]), array.dtype) for array in (split.inputs, split.targets)
        )
        inputs, targets = (self._side(self._tensor(array)) for array in batch)
        return inputs, targets


def _device(name: str) -> torch.device:
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(f"fused: no device {name!r}; choose cpu or cuda")
    if name != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"fused: the device is {name!r}, but torch finds no GPU here: choose cpu")
    return torch.device(name)


def _kernel(training: LocalTraining, layers: Sequence[Layer], numbers: int) -> MlpKernel | None:
    try:
        return MlpKernel(training, layers, numbers)
    except Exception as error:  # noqa: BLE001 - no compiler, or one that fails: there are the programs
        programs.say_slow(error)
        return None


def _finite(rows: Floats) -> NDArray[np.bool_]:
    """Whether all numbers of each row are; of rows whose sum is finite, they are."""
    with np.errstate(over="ignore", invalid="ignore"):
        found: NDArray[np.bool_] = np.isfinite(rows.sum(axis=1))
    if not found.all():
        found[~found] = np.isfinite(rows[~found]).all(axis=1)
    return found


def _zeros(places: Places) -> list[Tensor]:
    return [torch.zeros_like(tensor) for tensor in places.tensors]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Operators so small are slower on more threads, and sums are the same on any machine only on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
