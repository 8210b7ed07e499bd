"""Multi-layer perceptrons: recognised from what a model's forward pass does, trained by a kernel of their own.

The kernel (`mlp.cpp`) takes a device's whole local run at once, its model in the processor's cache. It is compiled where
it runs, by the compiler that torch's own programs are made with, and does for each device alone what it does in company.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from fedpace.clients.training.data import FederatedData
from fedpace.clients.training.declaration import SGD, Adam, LocalTraining
from fedpace.simulations.executors.schedule import Chunk, training_schedule
from fedpace.simulations.executors.structure import Floats, Structure

Doubles = NDArray[np.float64]

_LARGEST = 1_000_000
"""Numbers of a model that the processor's cache holds, with their gradients; of larger ones, products are done in blocks."""

_aten = torch.ops.aten
_ACTIVATIONS = {_aten.relu.default: 1, _aten.tanh.default: 2, _aten.sigmoid.default: 3}
_RESHAPES = (_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default)
_LOSSES = {"cross-entropy": 0, "mean-squared-error": 1}


class _Layer(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("inputs", "outputs", "weight", "bias", "activation")]


class _Optimizer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("adam", "nesterov", "decoupled")),
        *((name, ctypes.c_double) for name in ("momentum", "weight_decay", "beta1", "beta2", "eps")),
    ]


class _Cohort(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(_Layer)),
        *((name, ctypes.c_int64) for name in ("depth", "numbers", "loss")),
        ("optimizer", _Optimizer),
        *((name, ctypes.c_void_p) for name in ("inputs", "labels", "values")),
        *((name, ctypes.c_int64) for name in ("devices", "steps", "batch")),
        *((name, ctypes.c_void_p) for name in ("samples", "counts", "passes", "lr", "mu", "models", "losses")),
    ]


@dataclass(frozen=True)
class Dense:
    """A layer: where its weight, (outputs, inputs), and its bias (or -1) begin in a row, and what comes after it."""

    inputs: int
    outputs: int
    weight: int
    bias: int
    activation: int


class MlpKernel:
    """Trains devices whose model is such a perceptron. Raises what the compiler raises where there is none."""

    def __init__(self, training: LocalTraining, layers: list[Dense], numbers: int) -> None:
        self._data = training.federation
        self._loss = _LOSSES[str(training.loss)]
        self._layers = (_Layer * len(layers))(
            *(_Layer(each.inputs, each.outputs, each.weight, each.bias, each.activation) for each in layers)
        )
        self._numbers = numbers
        self._optimizer = _told(training.optimizer)
        kind = np.float32 if self._loss else np.int64
        self._inputs = np.ascontiguousarray(self._data.inputs)
        self._targets = np.ascontiguousarray(self._data.targets, kind)
        self._train = _library().train

    def train(self, chunk: Chunk, rows: Floats) -> Doubles:
        """Trains the models `rows`, (k, numbers), in place. Returns the mean loss of each device's last pass, (k,)."""
        count = len(chunk)
        schedule = training_schedule(chunk, self._data.training, count)
        inputs, targets, samples = self._inputs, self._targets, schedule.samples
        if self._data.shift is not None:
            everybody = np.ascontiguousarray(samples.swapaxes(0, 1).reshape(count, -1))
            inputs, targets = self._data.batches(chunk.rows, everybody, self._data.training)
            targets = np.ascontiguousarray(targets, self._targets.dtype)
            numbers = np.arange(everybody.size).reshape(count, *samples.shape[::2])
            samples = np.ascontiguousarray(numbers.swapaxes(0, 1))
        found = np.empty(count)
        cohort = _Cohort(
            self._layers,
            len(self._layers),
            self._numbers,
            self._loss,
            self._optimizer,
            inputs.ctypes.data,
            targets.ctypes.data,
            targets.ctypes.data,
            count,
            len(samples),
            chunk.batch_size,
            samples.ctypes.data,
            schedule.counts.ctypes.data,
            schedule.passes.ctypes.data,
            chunk.lr.ctypes.data,
            chunk.mu.ctypes.data,
            rows.ctypes.data,
            found.ctypes.data,
        )
        self._train(ctypes.byref(cohort))
        counted = schedule.counts * (np.arange(len(samples))[:, np.newaxis] >= schedule.passes)
        means: Doubles = found / counted.sum(axis=0)
        return means


def layers_of(training: LocalTraining, model: nn.Module, structure: Structure) -> list[Dense] | None:
    """The layers of a model that the kernel can train, with its data, its loss and its optimiser; None of others."""
    data = training.federation
    if structure.size > _LARGEST or training.loss not in _LOSSES or data.inputs.dtype != np.float32:
        return None
    if not all(place.trained for place in structure.places):
        return None
    layers = _perceptron(model, structure, data)
    return layers if layers and _fits(training, layers[-1].outputs) else None


def _fits(training: LocalTraining, outputs: int) -> bool:
    targets = training.federation.targets
    if training.loss == "mean-squared-error":
        return targets.dtype == np.float32 and targets.shape[1:] == (outputs,)
    if targets.dtype.kind not in "iu" or targets.ndim != 1 or not len(targets):
        return False
    return bool(0 <= targets.min() and targets.max() < outputs)


def _perceptron(model: nn.Module, structure: Structure, data: FederatedData) -> list[Dense] | None:
    """What the forward pass computes, if it is nothing but layers, one after the other, that use every array once."""
    samples, names = 3, structure.names
    arrays = [torch.zeros(place.shape) for place in structure.places]
    inputs = torch.zeros((samples, *data.inputs.shape[1:]))
    model.train()
    with torch.no_grad():
        graph = make_fx(lambda *given: functional_call(model, dict(zip(names, given, strict=False)), given[-1:]))(
            *arrays, inputs
        )
    nodes = iter(graph.graph.nodes)
    starts = {next(nodes): place.start for place in structure.places}
    layers, used = [], set()
    value = next(nodes)
    for node in nodes:
        if node.op == "output":
            whole = node.args == (value,) and used == set(starts)
            return layers if whole and value.meta["val"].dim() == 2 else None
        if node.target == _aten.t.default and node.args[0] in starts:
            continue
        if (step := _step(node, value, starts, samples)) is None:
            return None
        ...
    return None


def _told(optimizer: SGD | Adam) -> _Optimizer:
    if isinstance(optimizer, SGD):
        return _Optimizer(0, optimizer.nesterov, 0, optimizer.momentum, optimizer.weight_decay)
    decay = optimizer.weight_decay
    return _Optimizer(1, 0, optimizer.decoupled, 0.0, decay, *optimizer.betas, optimizer.eps)


@functools.cache
def _library() -> ctypes.CDLL:
    from torch._inductor.codecache import CppCodeCache

    source = resources.files(__package__).joinpath("mlp.cpp").read_text()
    library: ctypes.CDLL = CppCodeCache.load(source)
    library.train.argtypes = [ctypes.POINTER(_Cohort)]
    library.train.restype = None
    return library
