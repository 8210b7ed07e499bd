"""Control variates, the server's half: the direction in which each device drifts, known and taken off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fedpace.strategies.blocks import blocks
from fedpace.strategies.parts import Folding, Vector


@dataclass(frozen=True, slots=True)
class ControlVariates:
    """SCAFFOLD (Karimireddy et al. 2020, algorithm 1, option II): c <- c + |S| / N * mean of (c_i+ - c_i).

    c goes out with the model in the array record "control", and devices send what their c_i changed by in a record of
    that name; their mod steps along gradient - c_i + c. Changes of the model pass as they are. |S| counts the devices
    that sent a control; an update without one still counts for the model.
    """

    record: ClassVar[str] = "control"

    def outgoing(self, current: Vector, memory: dict[str, Any]) -> Vector:
        control: Vector = memory.setdefault("control", np.zeros_like(current))
        return control

    def adjust(self, delta: Vector, update: Folding, memory: dict[str, Any]) -> Vector:
        if update.extra is not None:
            change: Vector = memory.setdefault("change", np.zeros_like(delta))
            for block in blocks(len(delta)):
                change[block] += update.extra[block]
        return delta

    def finish(self, step: Vector, folded: Sequence[Folding], memory: dict[str, Any]) -> Vector:
        change = memory.pop("change", None)
        if change is not None:
            change /= max(folded[-1].devices, 1)
            change += self.outgoing(step, memory)
            memory["control"] = change  # a new vector: the one before may still be on its way to devices
        return step
