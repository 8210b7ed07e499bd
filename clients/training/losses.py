"""Losses by name, and what counts as right."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]


def losses(loss: str | Loss) -> Loss:
    """A function of outputs and targets, each of shape (n, ...), to the loss of each sample, of shape (n,)."""
    return loss if callable(loss) else _NAMED[loss]


def correct(outputs: Tensor, targets: Tensor) -> Tensor | None:
    """The share of each sample that is right, float32 of shape (n,), where targets are labels of the classes in
    dimension 1 of the outputs; or None."""
    if targets.is_floating_point() or outputs.dim() != targets.dim() + 1:
        return None
    return (
        (outputs.argmax(1) == targets).float().flatten(1).mean(1)
        if targets.dim() > 1
        else (outputs.argmax(1) == targets).float()
    )


def _per_sample(function: Callable[..., Tensor], outputs: Tensor, targets: Tensor) -> Tensor:
    """Means over whatever dimensions a sample's targets have."""
    found = function(outputs, targets if targets.is_floating_point() else targets.long(), reduction="none")
    return found if found.dim() == 1 else found.flatten(1).mean(1)


def _binary(outputs: Tensor, targets: Tensor, reduction: str) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction=reduction)


def _squared(outputs: Tensor, targets: Tensor, reduction: str) -> Tensor:
    return torch.square(outputs - targets)


_NAMED: dict[str, Loss] = {
    "cross-entropy": partial(_per_sample, F.cross_entropy),
    "mean-squared-error": partial(_per_sample, _squared),
    "binary-cross-entropy": partial(_per_sample, _binary),
}
