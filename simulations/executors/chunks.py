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
from fedpace.simulations.executors.schedule import Chunk, Schedule, evaluation_schedule, gathered, training_schedule
from fedpace.simulations.executors.structure import Floats, Place, Structure

Doubles = NDArray[np.float64]
_Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Done:
    """What was found of devices, (2, k), and of those that failed, why: by their places among them."""

    found: Doubles
    failures: dict[int, str]


@dataclass(frozen=True)
class _Numbers:
    """What programs are told beside the batches: `weights` (steps, devices, batch size), `rates` (steps, devices),
    `shares` (devices), and one of `corrections` a step."""

    weights: Tensor
    rates: Tensor
    shares: Tensor
    corrections: Sequence[Tensor]


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

    def run(self, kind: str, chunk: Chunk, rows: Floats) -> Done:
        """`train` or `evaluate`, as `kind` says: `width` devices at most, or, where it is 1, any number, one after the
        other. Raises what the model's and the loss's code does where devices fail that are run side by side."""
        return self.train(chunk, rows) if kind == MessageType.TRAIN else self.evaluate(chunk, rows)

    def train(self, chunk: Chunk, rows: Floats) -> Done:
        """Trains the models `rows`, (k, size), in place. Found are the mean loss of each device's last pass, and whether its
        model's numbers are finite, (2, k)."""
        if self.kernel is not None:
            return Done(self.kernel.train(chunk, rows), {})
        with _one_thread(), torch.no_grad():
            schedule = training_schedule(chunk, self._data.training, max(self.width, len(chunk)))
            proximal = bool(chunk.mu.any())
            step = self._training_program(chunk.batch_size, proximal=proximal)
            numbers = self._numbers(chunk, schedule)
            models, failures = torch.from_numpy(rows), {}
            means = np.zeros(schedule.counts.shape)
            for part in self._parts(chunk):
                self._begin(models[part], proximal=proximal)
                steps = int(chunk.steps[part].max())
                batches = self._batches(chunk, schedule, part, steps, self._data.training)
                try:
                    found = self._steps(step, batches, numbers, part, steps)
                except Exception as error:  # noqa: BLE001 - whatever the model's and the loss's code raises
                    failures[part.start] = self._failed_alone(error)
                    continue
                means[:steps, part.start : part.start + self.width] = found
                self._memory.trained.store(models[part])
            self._let_go()
        counts = np.where(np.arange(len(means))[:, np.newaxis] >= schedule.passes, schedule.counts, 0)
        losses: Doubles = (np.where(counts > 0, means, 0.0) * counts).sum(axis=0) / np.maximum(counts.sum(axis=0), 1)
        return Done(np.stack([losses[: len(chunk)], _finite(rows)]), failures)

    def evaluate(self, chunk: Chunk, rows: Floats) -> Done:
        """Found are the mean losses of each device's samples, and shares that are right (or NaN), (2, k)."""
        with _one_thread(), torch.no_grad():
            schedule = evaluation_schedule(chunk, self._data.testing, max(self.width, len(chunk)))
            step = self._evaluation_program(chunk.batch_size)
            counted = np.arange(chunk.batch_size) < schedule.counts[:, :, np.newaxis]
            weights = self._tensor(counted.astype(np.float32))
            models, failures = torch.from_numpy(rows), {}
            sums = torch.zeros((2, schedule.counts.shape[1]), dtype=torch.float64, device=self._device)
            for part in self._parts(chunk):
                self._arrays.load(models[part])
                steps = int((schedule.counts[:, part] > 0).sum(axis=0).max())
                batches = self._batches(chunk, schedule, part, steps, self._data.testing)
                into = sums[:, part.start : part.start + self.width]
                try:
                    for batch, counts in zip(batches, self._by_steps(weights, part, steps), strict=True):
                        into += torch.stack(step(*self._arrays.tensors, *batch, counts)).view(2, self.width)
                except Exception as error:  # noqa: BLE001 - whatever the model's and the loss's code raises
                    failures[part.start] = self._failed_alone(error)
            self._let_go()
        means: Doubles = sums.cpu().numpy()[:, : len(chunk)] / chunk.sizes
        return Done(means, failures)

    def _parts(self, chunk: Chunk) -> list[slice]:
        """The devices that are run at once."""
        return [slice(start, min(start + self.width, len(chunk))) for start in range(0, len(chunk), self.width)]

    def _failed_alone(self, error: Exception) -> str:
        """Why a device failed; of many side by side nobody knows which did."""
        if self.width > 1:
            raise error
        return f"{type(error).__name__}: {error}"

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

    def _let_go(self) -> None:
        for places in (self._memory.trained, self._memory.constants, self._arrays):
            places.let_go()

    def _numbers(self, chunk: Chunk, schedule: Schedule) -> _Numbers:
        lr = np.zeros(schedule.counts.shape, np.float32)
        lr[:, : len(chunk)] = chunk.lr
        lr[schedule.counts == 0] = 0
        mu = np.zeros(schedule.counts.shape[1], np.float32)
        mu[: len(chunk)] = chunk.mu
        corrections = [programs.bias_correction(self._declared.optimizer, at) for at in range(len(lr))]
        corrected = self._tensor(np.array(corrections, np.float32))
        return _Numbers(self._tensor(schedule.weights()), self._tensor(lr), self._tensor(mu), corrected.unbind())

    def _steps(self, step: Program, batches: Iterator[_Batch], numbers: _Numbers, part: slice, steps: int) -> Doubles:
        """Mean losses of batches, (steps, width)."""
        shares = self._side(numbers.shares[part.start : part.start + self.width])
        memory, found = tree_leaves(self._memory_arguments()), []
        weights, rates = self._by_steps(numbers.weights, part, steps), self._by_steps(numbers.rates, part, steps)
        for batch, weight, rate, corrected in zip(batches, weights, rates, numbers.corrections[:steps], strict=True):
            (means,) = step(*memory, *batch, weight, rate, shares, corrected)
            found.append(means)
        all_means: Doubles = torch.stack(found).view(-1, self.width).double().cpu().numpy()
        return all_means

    def _by_steps(self, numbers: Tensor, part: slice, steps: int) -> Sequence[Tensor]:
        """Of (steps, devices, ...) what programs take at each step."""
        its = numbers[:steps, part.start : part.start + self.width]
        found: Sequence[Tensor] = (its if self.width > 1 else its[:, 0]).unbind()
        return found

    def _batches(self, chunk: Chunk, schedule: Schedule, part: slice, steps: int, split: Split) -> Iterator[_Batch]:
        """The batches of devices that are run at once."""
        devices = np.zeros(self.width, np.int64)
        devices[: part.stop - part.start] = chunk.rows[part]
        samples = schedule.samples[:steps, part.start : part.start + self.width]
        for inputs, targets in gathered(self._data, split, devices, samples):
            yield self._side(self._tensor(inputs)), self._side(self._tensor(targets))

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
