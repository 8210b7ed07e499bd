"""Overlap: what a stale change asks for and the model has done meanwhile is not done again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedpace.errors import ConfigError
from fedpace.strategies.blocks import blocks
from fedpace.strategies.parts import Folding, Vector


@dataclass(frozen=True, slots=True)
class Overlap:
    """delta <- delta - strength * c m, with m = w_now - w_old and c = <delta, m> / <m, m>, clipped to [0, 1]. Ours.

    c m is the change's projection on how the model has moved since the device began, or all of that movement, if the
    change asks for more. Devices that began with one version mostly ask for the same; where many arrive before a new
    version reaches anybody, their sum is so many times too long, and the model swings. Without the overlap each adds
    what is at a right angle to what has been done: the model moves by the root of their number, not by their number. A
    change against the movement is left as it is.

    A factor for staleness, (1 + staleness)^-a, shortens what is common and what is a device's own alike.
    """

    strength: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.strength <= 1.0:
            raise ConfigError(f"overlap: strength is {self.strength}; choose from 0.0 to 1.0")

    def adjust(self, delta: Vector, update: Folding, memory: dict[str, Any]) -> Vector:
        if self.strength == 0.0 or update.staleness <= 0:
            return delta
        along = length = 0.0
        for block in blocks(len(delta)):
            moved = update.current[block] - update.base[block]
            along += float(delta[block] @ moved)
            length += float(moved @ moved)
        if along > 0.0 and length > 0.0:
            part = delta.dtype.type(self.strength * min(along / length, 1.0))
            for block in blocks(len(delta)):
                delta[block] -= part * (update.current[block] - update.base[block])
        return delta

    def finish(self, step: Vector, folded: Sequence[Folding], memory: dict[str, Any]) -> Vector:
        return step
