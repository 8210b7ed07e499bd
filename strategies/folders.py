"""Folders: one change of many."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedpace.errors import ConfigError
from fedpace.strategies.blocks import BLOCK, blocks
from fedpace.strategies.parts import Vector


@dataclass(frozen=True, slots=True)
class Mean:
    """The weighted sum, where weights sum to 1 the mean (McMahan et al. 2017, algorithm 1). Changes pass one by one.

    `against`: "base", changes from the model a device began with (FedBuff), or "current", its model less the one it is
    folded into (FedAsync; FedAvg is either). Beside the sum it holds one block.
    """

    needs: ClassVar[str] = "sums"
    against: str = "base"

    def __post_init__(self) -> None:
        if self.against not in ("base", "current"):
            raise ConfigError(f'mean folder: against is {self.against!r}; choose "base" or "current"')

    def fold(self, changes: Iterator[tuple[float, Vector]], like: Vector) -> Vector:
        total = np.zeros_like(like)
        part = np.empty(min(BLOCK, len(like)), dtype=like.dtype)
        for weight, change in changes:
            for block in blocks(len(like)):
                product = part[: block.stop - block.start]
                np.multiply(change[block], weight, out=product, casting="same_kind")
                total[block] += product
        return total
