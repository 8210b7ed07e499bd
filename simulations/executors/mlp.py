"""Multi-layer perceptrons: recognised from what a model's forward pass does, trained by a kernel of their own.

The kernel (`mlp.cpp`) takes a device's whole local run at once, its model in the processor's cache. It is compiled where
it runs, by the compiler that torch's own programs are made with, and does for each device alone what it does in company.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.func import functional_call
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from fedpace.clients.training.data import FederatedData
from fedpace.clients.training.declaration import SGD, Adam, LocalTraining
from fedpace.simulations.executors.schedule import Chunk, run_orders
from fedpace.simulations.executors.structure import Floats, Structure

Doubles = NDArray[np.float64]

_LARGEST = 1_000_000
"""Numbers of a model that the processor's cache holds, with their gradients; of larger ones, products are done in blocks."""

_aten = torch.ops.aten
_ACTIVATIONS = {
    _aten.relu.default: 1,
    _aten.relu_.default: 1,
    _aten.tanh.default: 2,
    _aten.tanh_.default: 2,
    _aten.sigmoid.default: 3,
    _aten.sigmoid_.default: 3,
}
_TRACED = 7
"""Samples that the forward pass is traced with."""
_LOSSES = {"cross-entropy": 0, "mean-squared-error": 1}


class Layer(ctypes.Structure):
    """Where its weight, (outputs, inputs), and its bias (or -1) begin in a row, and what comes after it."""

    _fields_ = [(name, ctypes.c_int64) for name in ("inputs", "outputs", "weight", "bias", "activation")]


class _Optimizer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("adam", "nesterov", "decoupled")),
        *((name, ctypes.c_double) for name in ("momentum", "weight_decay", "beta1", "beta2", "eps")),
    ]


class _Cohort(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(Layer)),
        *((name, ctypes.c_int64) for name in ("depth", "numbers", "loss")),
        ("optimizer", _Optimizer),
        *((name, ctypes.c_void_p) for name in ("inputs", "labels", "values")),
        *((name, ctypes.c_int64) for name in ("devices", "most", "batch")),
        *((name, ctypes.c_void_p) for name in ("samples", "sizes", "steps", "lr", "mu", "models", "losses", "finite")),
    ]


class MlpKernel:
    """Trains devices whose model has these layers. Raises what the compiler raises where there is none."""

    def __init__(self, training: LocalTraining, layers: Sequence[Layer], numbers: int) -> None:
        self._data = training.federation
        self._loss = _LOSSES[str(training.loss)]
        self._layers = (Layer * len(layers))(*layers)
        self._numbers = numbers
        self._optimizer = _told(training.optimizer)
        kind = np.float32 if self._loss else np.int64
        self._inputs = np.ascontiguousarray(self._data.inputs)
        self._targets = np.ascontiguousarray(self._data.targets, kind)
        self._train = _library().train

    def train(self, chunk: Chunk, rows: Floats) -> Doubles:
        """Trains the models `rows`, (k, numbers), in place. Returns the mean loss of each device's last pass, and whether
        its model's numbers are finite, (2, k)."""
        count, split, most = len(chunk), self._data.training, int(chunk.sizes.max())
        orders = run_orders(chunk)
        starts = split.partitions.offsets[chunk.rows] + chunk.first
        inputs, targets = self._inputs, self._targets
        if self._data.shift is not None:  # devices see samples in ways of their own
            own = np.take(split.partitions.indices, starts[:, np.newaxis] + np.arange(most), mode="clip")
            inputs, targets = self._data.batches(chunk.rows, own, split)
            inputs, targets = np.ascontiguousarray(inputs), np.ascontiguousarray(targets, self._targets.dtype)
            samples = orders + np.arange(count)[:, np.newaxis] * most
        else:
            samples = np.take(split.partitions.indices, orders + starts[:, np.newaxis], mode="clip").astype(np.int64)
        losses, finite = np.empty(count), np.empty(count, np.int64)
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
            most,
            chunk.batch_size,
            samples.ctypes.data,
            chunk.sizes.ctypes.data,
            chunk.steps.ctypes.data,
            chunk.lr.ctypes.data,
            chunk.mu.ctypes.data,
            rows.ctypes.data,
            losses.ctypes.data,
            finite.ctypes.data,
        )
        self._train(ctypes.byref(cohort))
        return np.stack([losses, finite])


def layers_of(training: LocalTraining, model: nn.Module, structure: Structure) -> list[Layer]:
    """The layers of a model that the kernel can train, with its data and its loss; none of another."""
    data = training.federation
    if structure.size > _LARGEST or training.loss not in _LOSSES or data.inputs.dtype != np.float32:
        return []
    if not all(place.trained for place in structure.places):
        return []
    layers = _perceptron(model, structure, data)
    return layers if layers and _fits(training, layers[-1].outputs) else []


def _fits(training: LocalTraining, outputs: int) -> bool:
    targets = training.federation.targets
    if training.loss == "mean-squared-error":
        return targets.dtype == np.float32 and targets.shape[1:] == (outputs,)
    if targets.dtype.kind not in "iu" or targets.ndim != 1 or not len(targets):
        return False
    return bool(targets.min() >= 0 and targets.max() < outputs)


def _perceptron(model: nn.Module, structure: Structure, data: FederatedData) -> list[Layer]:
    """What the forward pass computes, if it is nothing but layers, one after the other, that use every array once.
    Otherwise nothing."""
    arrays = [torch.zeros(place.shape) for place in structure.places]
    inputs = torch.zeros((_TRACED, *data.inputs.shape[1:]))
    names = structure.names
    model.train()
    forward = make_fx(lambda *given: functional_call(model, dict(zip(names, given, strict=False)), given[-1:]))
    try:
        with torch.no_grad():
            nodes = iter(forward(*arrays, inputs).graph.nodes)
    except Exception:  # noqa: BLE001 - whatever the model's code raises: `ChunkRunner.check` will tell
        return []
    starts = {next(nodes): place.start for place in structure.places}
    layers: list[Layer] = []
    unused, value = set(starts), next(nodes)
    for node in nodes:
        if node.target is _aten.t.default and node.args[0] in starts:
            continue
        if node.op == "output":
            return [] if unused or node.args != (value,) else layers
        layer = _layer(node, value, starts)
        if layer is not None and unused.issuperset(_arrays(node)):
            unused.difference_update(_arrays(node))
            layers.append(layer)
        elif layers and not layers[-1].activation and node.target in _ACTIVATIONS and node.args == (value,):
            layers[-1].activation = _ACTIVATIONS[node.target]
        elif layers or not _flattens(node, value):
            return []
        value = node
    return []


def _arrays(node: Node) -> list[Any]:
    """The weight and, if there is one, the bias of what may be a layer."""
    weights = node.args[-1]
    return [*weights.args, *node.args[:-2]] if isinstance(weights, Node) and weights.target is _aten.t.default else []


def _layer(node: Node, value: Node, starts: Mapping[Node, int]) -> Layer | None:
    """A product of `value` with the transpose of an array, with or without a bias."""
    if node.target not in (_aten.addmm.default, _aten.mm.default) or node.kwargs or node.args[-2] is not value:
        return None
    found = _arrays(node)
    if not found or any(array not in starts for array in found):
        return None
    outputs, inputs = found[0].meta["val"].shape
    if len(found) > 1 and found[1].meta["val"].shape != (outputs,):
        return None
    places = [starts[array] for array in found]
    return Layer(inputs, outputs, places[0], *(places[1:] or [-1]))


def _flattens(node: Node, value: Node) -> bool:
    """Whether every sample of `value` becomes one row."""
    if node.target is not _aten.view.default or node.args[0] is not value:
        return False
    shape = node.meta["val"].shape
    return len(shape) == 2 and shape[0] == _TRACED


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
