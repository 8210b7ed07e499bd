"""Delay compensation: what a stale change would have been at the model it is folded into, to first order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedpace.errors import ConfigError
from fedpace.strategies.blocks import blocks
from fedpace.strategies.parts import Folding, Vector


@dataclass(frozen=True, slots=True)
class DelayCompensation:
    """DC-ASGD (Zheng et al. 2017, "Asynchronous Stochastic Gradient Descent with Delay Compensation", eq. 10).

    g(w_now) ~ g + lambda * g * g * (w_now - w_old), elementwise, with the pseudo-gradient g = -delta in the place of the
    gradient. Here g is s = learning rate * local steps times a mean gradient:

    - `adaptive` (DC-ASGD-a, section 5): lambda = strength / sqrt(mean square), where mean square <- momentum * mean
      square + (1 - momentum) * g * g over all updates, begun with the first. Mean square has the scale s * s, so the
      result has the scale s as delta has: `strength` is the paper's lambda_0 and needs no other.
    - else lambda = strength, the paper's lambda divided by s.

    A first-order correction larger than what it corrects is no longer one: where it is more than `bound` times a
    coordinate of the change, it is that much (infinity: as in the paper).
    """

    strength: float = 2.0
    adaptive: bool = True
    momentum: float = 0.95
    bound: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength < np.inf:
            raise ConfigError(f"delay compensation: strength is {self.strength}; choose 0 or more")
        if not 0.0 <= self.momentum < 1.0:
            raise ConfigError(f"delay compensation: momentum is {self.momentum}; choose at least 0.0 and less than 1.0")
        if not self.bound > 0.0:
            raise ConfigError(f"delay compensation: bound is {self.bound}; choose more than 0")

    def adjust(self, delta: Vector, update: Folding, memory: dict[str, Any]) -> Vector:
        with np.errstate(over="ignore"):
            if self.adaptive and "mean_square" not in memory:
                memory["mean_square"] = np.square(delta)
            square: Vector | None = memory["mean_square"] if self.adaptive else None
            for block in blocks(len(delta)):
                if square is not None:
                    square[block] *= self.momentum
                    square[block] += (1.0 - self.momentum) * np.square(delta[block])
                if update.staleness > 0:
                    root = None if square is None else np.sqrt(square[block])
                    self._adjust(delta[block], update.current[block] - update.base[block], root)
        return delta

    def _adjust(self, delta: Vector, moved: Vector, root: Vector | None) -> None:
        """One block, in place: with g = -delta, g + lambda g g moved is -delta (1 - lambda delta moved)."""
        if root is None:
            part = self.strength * delta
        else:  # where a root is 0 so is delta; divided first, for then nothing can overflow
            part = self.strength * np.divide(delta, root, out=np.zeros_like(delta), where=root > 0)
        part *= moved
        np.clip(part, -self.bound, self.bound, out=part)
        delta *= 1.0 - part

    def finish(self, step: Vector, folded: Sequence[Folding], memory: dict[str, Any]) -> Vector:
        return step
