"""The steps of torch's optimisers during one task: counted, and their gradients corrected. Torch is not imported here:
where the app has not, there is nothing to see.

torch's hooks are the whole process's, and may not change while another thread takes a step. So they are set once and
stay; each thread then has its own list of who watches, and where nobody does a step costs two calls more.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, RecordDict
from numpy.typing import NDArray

from fedpace.errors import ConfigError

Tensor = Any
Optimizer = Any
NumpyArrays = Mapping[str, NDArray[Any]]

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
"""What torch's normalisation layers call their statistics, which are no parameters."""

_watching = threading.local()
_setting = threading.Lock()
_hooked = False


class StepWatcher:
    """Counts the optimiser steps of its thread."""

    def __init__(self) -> None:
        self.steps = 0

    def prepare(self, optimizer: Optimizer) -> None:
        """Before a step, while the parameters are as they were."""

    def correct(self, optimizer: Optimizer) -> None:
        """Before a step, when the gradients are there; with a closure, after each of its calls."""

    def stepped(self, optimizer: Optimizer) -> None:
        """After a step."""
        self.steps += 1


def torch_loaded() -> bool:
    """Whether somebody in this process has imported torch."""
    return "torch.optim.optimizer" in sys.modules


@contextmanager
def watch_steps(watcher: StepWatcher) -> Iterator[None]:
    """Inside, `watcher` sees the steps that this thread takes; none where torch is not yet imported."""
    _set_hooks()
    watchers = _watchers()
    watchers.append(watcher)
    try:
        yield
    finally:
        watchers.remove(watcher)


def _watchers() -> list[StepWatcher]:
    if not hasattr(_watching, "list"):
        _watching.list = []
    found: list[StepWatcher] = _watching.list
    return found


def _set_hooks() -> None:
    global _hooked
    with _setting:
        if not _hooked and torch_loaded():
            module = sys.modules["torch.optim.optimizer"]
            module.register_optimizer_step_pre_hook(_before)
            module.register_optimizer_step_post_hook(_after)
            _hooked = True


def _before(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Corrects the gradients, or has the closure do so that computes them."""
    watchers = list(_watchers())
    if not watchers:
        return None
    for watcher in watchers:
        watcher.prepare(optimizer)

    def corrected(closure: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            loss = closure()
            for watcher in watchers:
                watcher.correct(optimizer)
            return loss

        return call

    if len(args) > 1 and args[1] is not None:  # after the optimiser itself
        return (args[0], corrected(args[1]), *args[2:]), kwargs
    if kwargs.get("closure") is not None:
        return args, {**kwargs, "closure": corrected(kwargs["closure"])}
    for watcher in watchers:
        watcher.correct(optimizer)
    return None


def _after(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for watcher in list(_watchers()):
        watcher.stepped(optimizer)


def parameters_of(groups: list[dict[str, Any]]) -> list[Tensor]:
    """The parameters that steps may change."""
    return [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]


class GradientCorrection(StepWatcher):
    """Adds a term to the gradient of every parameter before each step. `model` are the arrays the app received.

    A parameter belongs to the received array that it equals in shape and value before its first step (the first such
    that is still free), so groups, shared weights and buffers do no harm. Where an app does not start from what it
    received, its parameters belong to the arrays that are no buffers by their order, if all shapes agree.
    """

    def __init__(self, mod: str, model: NumpyArrays) -> None:
        super().__init__()
        self.mod = mod
        self.names: dict[int, str] = {}
        self._parameters: dict[int, Tensor] = {}  # kept, so that no other gets the id of one of them
        self._terms: dict[int, Tensor] = {}
        self._free = {
            name: array
            for name, array in model.items()
            if array.dtype.kind == "f" and name.rpartition(".")[2] not in _BUFFERS
        }

    def constant(self, name: str) -> NDArray[Any]:
        """What `term` needs for the received array `name`, in its shape; it comes back as a tensor like the parameter."""
        raise NotImplementedError

    def term(self, parameter: Tensor, constant: Tensor) -> Tensor:
        """What is added to the gradient."""
        raise NotImplementedError

    def prepare(self, optimizer: Optimizer) -> None:
        """Raises ConfigError for parameters that belong to nothing received."""
        new = [each for each in parameters_of(optimizer.param_groups) if id(each) not in self.names]
        if not new:
            return
        by_value = [self._take(parameter) for parameter in new]
        if not self.names and by_value.count(None) == len(new):
            by_value = self._by_order(new)
        for parameter, name in zip(new, by_value, strict=True):
            if name is None:
                raise ConfigError(
                    f"{self.mod}: a parameter of the {type(optimizer).__name__} optimiser, of shape "
                    f"{list(parameter.shape)}, is none of the arrays received: load the model from all of them before "
                    "its first step, and give the optimiser no other parameters"
                )
            self.names[id(parameter)] = name
            self._parameters[id(parameter)] = parameter
            self._terms[id(parameter)] = parameter.detach().new_tensor(self.constant(name))

    def _take(self, parameter: Tensor) -> str | None:
        value = parameter.detach()
        for name, array in self._free.items():
            if array.shape == tuple(value.shape) and value.equal(value.new_tensor(array)):
                del self._free[name]
                return name
        return None

    def _by_order(self, parameters: list[Tensor]) -> list[str | None]:
        shapes = [tuple(parameter.shape) for parameter in parameters]
        if shapes != [array.shape for array in self._free.values()]:
            return [None] * len(parameters)
        names: list[str | None] = list(self._free)
        self._free = {}
        return names

    def correct(self, optimizer: Optimizer) -> None:
        scale = getattr(optimizer, "grad_scale", None)  # a GradScaler leaves it to fused optimisers to divide by it
        for parameter in parameters_of(optimizer.param_groups):
            term = self.term(parameter.detach(), self._terms[id(parameter)])
            if scale is not None:
                term = term * scale
            if parameter.grad is None:
                parameter.grad = term.clone()
            else:
                parameter.grad.detach().add_(term)


def model_of(content: RecordDict, mod: str) -> NumpyArrays:
    """The arrays of the record "arrays", or else of the only one there is, as copies. Raises ConfigError where that is not clear."""
    records = content.array_records
    if "arrays" in records:
        return to_numpy(records["arrays"])
    if len(records) != 1:
        names = ", ".join(map(repr, records)) or "none"
        raise ConfigError(f'{mod}: which array record is the model? There are {names}; call it "arrays"')
    return to_numpy(next(iter(records.values())))


def to_numpy(record: ArrayRecord) -> dict[str, NDArray[Any]]:
    """The arrays of a record by name, as copies."""
    return {name: array.numpy() for name, array in record.items()}


def same(left: NumpyArrays, right: NumpyArrays) -> bool:
    """Whether two models are equal."""
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)
