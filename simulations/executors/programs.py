"""Programs that run one step of the local work of many devices at once, compiled where there is a compiler.

A model whose arithmetic is small is run for `width` devices side by side (torch.func.vmap): what then costs is calling
operators, and the calls are shared. Convolutions side by side become grouped ones, which processors are bad at: such
models, and large ones, are run for one device after the other by a compiled program that is called once a step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fedpace.clients.training.declaration import SGD, Adam
from fedpace.clients.training.losses import Loss, correct
from fedpace.errors import ConfigError
from fedpace.simulations.executors.decompositions import FASTER
from fedpace.simulations.executors.structure import INSTEAD, Place, Structure

log = logging.getLogger(__name__)

Program = Callable[..., Any]

_WIDTHS = {"cpu": 50, "cuda": 400}
"""Devices side by side, at most: enough that calls cost little, few enough that their models stay in the cache."""
_NUMBERS = {"cpu": 500_000, "cuda": 200_000_000}
"""Parameters side by side, at most: where a call takes long in any case, it need not be shared."""
_said: list[bool] = []


def width_of(structure: Structure, device: torch.device) -> int:
    """How many devices are run side by side; 1: one after the other."""
    if device.type == "cpu" and structure.convolutional:
        return 1
    return max(1, min(_WIDTHS[device.type], _NUMBERS[device.type] // structure.size))


@dataclass
class Places:
    """The arrays of `width` devices as programs take them: each of shape (width, ...), or (...) where the width is 1.
    `in_rows`: those of one device lie in its row where they can, from `load` until `let_go`, and are not copied."""

    places: list[Place]
    own: list[Tensor]
    in_rows: bool

    def __post_init__(self) -> None:
        self.let_go()

    def let_go(self) -> None:
        """Of the rows."""
        self.tensors = list(self.own)

    def load(self, rows: Tensor) -> None:
        """From rows of shape (k, size), k at most the width."""
        for number, (place, tensor) in enumerate(zip(self.places, self.tensors, strict=True)):
            part = rows[:, place.start : place.stop]
            if self._lies_in_row(tensor):
                self.tensors[number] = part.view(place.shape)
            elif tensor.dim() == len(place.shape):
                tensor.copy_(part.view(place.shape))
            else:
                tensor[: len(rows)].copy_(part.view(-1, *place.shape))

    def store(self, rows: Tensor) -> None:
        """Into rows of shape (k, size)."""
        for place, tensor in zip(self.places, self.tensors, strict=True):
            part = rows[:, place.start : place.stop]
            if self._lies_in_row(tensor):
                continue
            if tensor.dim() == len(place.shape):
                part.view(place.shape).copy_(tensor)
            else:
                part.view(-1, *place.shape).copy_(tensor[: len(rows)])

    def _lies_in_row(self, tensor: Tensor) -> bool:
        return self.in_rows and tensor.dim() != 4


def empty_places(places: list[Place], width: int, device: torch.device) -> Places:
    """Zeros. Kernels of convolutions lie channels last, as processors want them."""
    tensors = []
    for place in places:
        shape = place.shape if width == 1 else (width, *place.shape)
        tensor = torch.zeros(shape, device=device)
        if width == 1 and len(shape) == 4:
            tensor = tensor.to(memory_format=torch.channels_last)
        tensors.append(tensor)
    return Places(places, tensors, in_rows=width == 1 and device.type == "cpu")


def training_step(
    model: nn.Module, loss: Loss, optimizer: SGD | Adam, structure: Structure, width: int, proximal: bool
) -> Program:
    """step(trained, constants, state, anchors, inputs, targets, weights, lr, mu, correction) -> (mean losses of (width,),).

    Changes `trained`, and `state` (one list a moment of the optimiser), in place. `weights` (width, batch_size) are those
    of samples in the mean; `lr`, `mu`: (width,); `correction` is a number for Adam, `bias_correction`. A device with
    weights and a learning rate of 0 keeps its model.
    """
    trained_names = [place.name for place in structure.places if place.trained]
    constant_names = [place.name for place in structure.places if not place.trained]

    def objective(
        trained: list[Tensor], constants: list[Tensor], inputs: Tensor, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        arrays = dict(zip(trained_names, trained, strict=True)) | dict(zip(constant_names, constants, strict=True))
        mean = torch.dot(loss(functional_call(model, arrays, (inputs,)), targets), weights)
        return mean, mean.detach()

    gradients = grad(objective, has_aux=True)
    if width > 1:
        gradients = vmap(gradients)

    def step(
        trained: list[Tensor],
        constants: list[Tensor],
        state: list[list[Tensor]],
        anchors: list[Tensor],
        inputs: Tensor,
        targets: Tensor,
        weights: Tensor,
        lr: Tensor,
        mu: Tensor,
        correction: Tensor,
    ) -> tuple[Tensor]:
        found, means = gradients(trained, constants, inputs, targets, weights)
        for index, (array, gradient) in enumerate(zip(trained, found, strict=True)):
            rate, share = (value.view(-1, *[1] * (array.dim() - 1)) if width > 1 else value for value in (lr, mu))
            if proximal:
                gradient = gradient + share * (array - anchors[index])
            move(optimizer, array, gradient, [moment[index] for moment in state], rate, correction)
        return (means,)

    return step


def moments(optimizer: SGD | Adam) -> int:
    """How many arrays the optimiser keeps for each of the model's; all begin as zeros."""
    return 2 if isinstance(optimizer, Adam) else 1 if optimizer.momentum else 0


def move(
    optimizer: SGD | Adam, array: Tensor, gradient: Tensor, kept: list[Tensor], lr: Tensor, correction: Tensor
) -> None:
    """One step of torch's optimiser, in place."""
    if isinstance(optimizer, Adam) and optimizer.decoupled:
        array.mul_(1 - lr * optimizer.weight_decay)
    elif optimizer.weight_decay:
        gradient = gradient + optimizer.weight_decay * array
    if isinstance(optimizer, Adam):
        first, second = kept
        first.mul_(optimizer.betas[0]).add_(gradient, alpha=1 - optimizer.betas[0])
        second.mul_(optimizer.betas[1]).add_(gradient * gradient, alpha=1 - optimizer.betas[1])
        array.sub_(lr * correction[0] * first / (second.sqrt() * correction[1] + optimizer.eps))
        return
    if optimizer.momentum:
        (velocity,) = kept
        velocity.mul_(optimizer.momentum).add_(gradient)
        gradient = gradient + optimizer.momentum * velocity if optimizer.nesterov else velocity
    array.sub_(lr * gradient)


def bias_correction(optimizer: SGD | Adam, step: int) -> tuple[float, float]:
    """What Adam multiplies the learning rate, and the root of the second moment, by at a step (from 0)."""
    if isinstance(optimizer, SGD):
        return 1.0, 1.0
    return 1 / (1 - optimizer.betas[0] ** (step + 1)), (1 - optimizer.betas[1] ** (step + 1)) ** -0.5


def evaluation_step(model: nn.Module, loss: Loss, structure: Structure, width: int) -> Program:
    """step(arrays, inputs, targets, weights) -> sums of losses and of right answers, each (width,).

    `weights` are 1 for samples that count. The second is NaN where targets are no labels.
    """
    names = structure.names

    def evaluate(arrays: list[Tensor], inputs: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        outputs = functional_call(model, dict(zip(names, arrays, strict=True)), (inputs,))
        right = correct(outputs, targets)
        nobody = torch.full_like(weights, torch.nan)
        return torch.dot(loss(outputs, targets), weights), torch.dot(nobody if right is None else right, weights)

    return vmap(evaluate) if width > 1 else evaluate


def traced(
    step: Program, arguments: tuple[Any, ...], instead: Mapping[Any, Callable[..., Any]] | None = None
) -> torch.fx.GraphModule:
    """The operators of a program for arguments of these shapes, which it takes one by one, lists taken apart. `instead` has
    functions that stand for operators.

    Raises ConfigError for what cannot be traced, and for random numbers, which devices that are run together would draw
    otherwise than alone."""
    tensors, structure = tree_flatten(arguments)
    try:
        with torch.no_grad():
            graph = make_fx(lambda *tensors: step(*tree_unflatten(tensors, structure)), {**(instead or {})})(*tensors)
    except Exception as error:  # whatever the model's and the loss's code raises, and torch where it knows no way
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"fused: the local work cannot be run for many devices at once ({reason}): {INSTEAD}"
        ) from error
    for node in graph.graph.nodes:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise ConfigError(f"fused: the local work draws random numbers ({node.target}): {INSTEAD}")
    return graph


def compiled(step: Program, arguments: tuple[Any, ...]) -> Program:
    """The same, compiled; only traced where there is no compiler, which is said once. Runs it on the arguments."""
    tensors = tree_leaves(arguments)
    try:
        # Without torch.compile's guards: shapes are known, and looking at them took a third of a step's time.
        with torch.no_grad():
            program: Program = torch._inductor.compile(traced(step, arguments, FASTER), tensors)
            program(*tensors)
    except Exception as error:  # noqa: BLE001 - no compiler, or one that fails: the work can be done without
        say_slow(error)
        return traced(step, arguments)
    return program


def say_slow(error: Exception) -> None:
    """Says once that there is no compiler."""
    if not _said:
        _said.append(True)
        reason = str(error).strip().partition("\n")[0]
        log.warning(
            "fused: the local work cannot be compiled here (%s) and takes up to five times as long: install g++", reason
        )
