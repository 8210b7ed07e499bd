"""`control_variates`: the device's half of SCAFFOLD.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh: "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
ICML 2020, algorithm 1 with option II. The server sends its control variate c in the array record "control", with the
names and shapes of the model x. The device steps along g(y) - c_i + c; afterwards it keeps

    c_i+ = c_i - c + (x - y_i) / (K eta)

and sends c_i+ - c_i back, in an array record of the same name. The app sees nothing of either.

K eta is the sum of what one unit of gradient moves a parameter by: K times the learning rate for plain SGD. With
momentum, or a rate that changes, it is the sum over the steps of what each would add (the norm ||a||_1 of Wang et al.,
"Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization", NeurIPS 2020, section 4), so that
(x - y_i) / (K eta) stays a weighted mean of the gradients.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from numpy.typing import NDArray

from fedpace.clients.mods._steps import (
    GradientCorrection,
    NumpyArrays,
    Optimizer,
    Tensor,
    model_of,
    parameters_of,
    same,
    to_numpy,
    watch_steps,
)
from fedpace.errors import ConfigError

RECORD = "control"
"""Name of the array record, in messages and replies."""
STATE = "fedpace.control"
"""Where c_i is kept in `context.state`, an array record."""


@dataclass
class _Task:
    """`difference` is c - c_i; `taken` says that the app applies it itself; `distance` is K eta as it reports it."""

    difference: NumpyArrays
    taken: bool = False
    distance: float | None = None


_task: ContextVar[_Task | None] = ContextVar("control_variates", default=None)


def control_variates(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """Corrects the gradients of torch's SGD, and does the rest; messages without a control variate pass as they are.

    Apps that train with anything else apply `correction()` themselves and call `report_steps`. The term comes after
    whatever the app does to its gradients before a step. Mods that change models on their way (clipping, noise,
    compression) go outside of this one. Raises ConfigError where records do not match the model, where steps cannot be
    seen, and where training diverged; c_i is then as it was.
    """
    content = message.content
    if RECORD not in content.array_records:
        return call_next(message, context)
    control = to_numpy(content.array_records[RECORD])
    message.content = RecordDict({name: record for name, record in content.items() if name != RECORD})
    try:
        model = model_of(message.content, "control_variates")
        _check("the server's control variate", control, model)
        own = _own(context, control)
        task = _Task({name: control[name] - own[name] for name, array in model.items() if array.dtype.kind == "f"})
        watcher = _ControlTerm(model, task)
        token = _task.set(task)
        try:
            with watch_steps(watcher):
                reply = call_next(message, context)
        finally:
            _task.reset(token)
    finally:
        message.content = content
    if reply.has_error():
        return reply
    trained = _trained(reply, model)
    distances = watcher.distances() if task.distance is None else dict.fromkeys(task.difference, task.distance)
    if not any(distances.values()) and not same(model, trained):
        raise ConfigError(
            "control_variates: the app trained without a step of torch's optimisers that could be seen: import torch at "
            "the top of the app's module, or apply fedpace.clients.mods.control.correction() and call report_steps()"
        )
    change = _change(model, trained, control, distances)
    context.state[STATE] = _record({**own, **{name: own[name] + change[name] for name in task.difference}})
    reply.content[RECORD] = _record(change)
    return reply


def correction() -> Mapping[str, NDArray[Any]]:
    """c - c_i of the task at hand by the model's array names, for an app that adds it to its gradients itself.

    Whoever asks is left alone: this task's optimiser steps are neither corrected nor counted, and `report_steps` has
    to say what was done. Empty where the server sent no control variate.
    """
    task = _task.get()
    if task is None:
        return {}
    task.taken = True
    return task.difference


def report_steps(count: int, lr: float) -> None:
    """Says that the model was trained by `count` gradient steps with the learning rate `lr`; several calls add up.

    Raises ConfigError for numbers that cannot be. Outside of a task with control variates it does nothing.
    """
    if count < 0 or not 0 < lr < np.inf:
        raise ConfigError(f"report_steps: {count} steps with a learning rate of {lr} cannot be")
    if (task := _task.get()) is not None:
        task.distance = (task.distance or 0.0) + count * lr


class _ControlTerm(GradientCorrection):
    """Adds c - c_i, and follows how far one unit of gradient would have moved each parameter."""

    def __init__(self, model: NumpyArrays, task: _Task) -> None:
        super().__init__("control_variates", model)
        self._task = task
        self._velocity: dict[int, float] = {}
        self._distance: dict[int, float] = {}
        self._foreign = ""

    def prepare(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, _sgd()):
            self._foreign = type(optimizer).__name__
        if self._active():
            super().prepare(optimizer)

    def correct(self, optimizer: Optimizer) -> None:
        if self._active():
            super().correct(optimizer)

    def _active(self) -> bool:
        return not self._foreign and not self._task.taken

    def constant(self, name: str) -> NDArray[Any]:
        return self._task.difference[name]

    def term(self, parameter: Tensor, constant: Tensor) -> Tensor:
        return constant

    def stepped(self, optimizer: Optimizer) -> None:
        """torch.optim.SGD with a gradient of 1 (see its documentation): v = m v + (1 - d) g, and v = g at first."""
        super().stepped(optimizer)
        if not self._active():
            return
        for group in optimizer.param_groups:
            momentum, damping = float(group["momentum"]), float(group["dampening"])
            for parameter in parameters_of([group]):
                key = id(parameter)
                before = self._velocity.get(key)
                velocity = 1.0 if before is None else momentum * before + 1.0 - (damping if momentum else 0.0)
                self._velocity[key] = velocity
                moved = 1.0 + momentum * velocity if group["nesterov"] else velocity
                self._distance[key] = self._distance.get(key, 0.0) + float(group["lr"]) * moved

    def distances(self) -> dict[str, float]:
        """K eta of each array that was trained. Raises ConfigError where the optimiser was not SGD."""
        if self._foreign:
            raise ConfigError(
                f"control_variates: SCAFFOLD corrects gradient descent, but the app trains with {self._foreign}: use "
                "torch.optim.SGD, or apply fedpace.clients.mods.control.correction() and call report_steps() in the app"
            )
        return {self.names[key]: distance for key, distance in self._distance.items()}


def _sgd() -> Any:
    return sys.modules["torch.optim.sgd"].SGD


def _own(context: Context, control: NumpyArrays) -> NumpyArrays:
    """c_i: what is kept, or zeros."""
    if STATE not in context.state.array_records:
        return {name: np.zeros_like(array) for name, array in control.items()}
    own = to_numpy(context.state.array_records[STATE])
    _check("this device's control variate", own, control)
    return own


def _check(what: str, control: NumpyArrays, model: NumpyArrays) -> None:
    ours, theirs = ({name: array.shape for name, array in arrays.items()} for arrays in (control, model))
    if ours != theirs:
        wrong = min(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
        raise ConfigError(
            f"control_variates: {what} is not of the model's names and shapes: {wrong!r} is {ours.get(wrong)}, "
            f"{theirs.get(wrong)} in the model"
        )


def _trained(reply: Message, model: NumpyArrays) -> NumpyArrays:
    trained = model_of(reply.content, "control_variates")
    _check("the reply", trained, model)
    return trained


def _change(
    model: NumpyArrays, trained: NumpyArrays, control: NumpyArrays, distances: Mapping[str, float]
) -> NumpyArrays:
    """c_i+ - c_i = (x - y_i) / (K eta) - c, of the kind of number that c is; 0 for arrays that are not trained."""
    change: dict[str, NDArray[Any]] = {}
    for name, array in model.items():
        distance = distances.get(name, 0.0)
        if distance:
            found = (array - trained[name]) / distance - control[name]
            if not np.isfinite(found).all():
                raise ConfigError(
                    f"control_variates: the trained array {name!r} is not finite: training diverged; lower the "
                    "learning rate"
                )
            change[name] = found.astype(control[name].dtype)
        else:
            change[name] = np.zeros_like(control[name])
    return change


def _record(arrays: NumpyArrays) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})
