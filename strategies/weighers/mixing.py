"""Factors that are not divided away: they make the server's step longer or shorter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedpace.errors import ConfigError
from fedpace.strategies.composition import name_of, weigh
from fedpace.strategies.fleet import Floats
from fedpace.strategies.parts import Context, Updates, Weigher, WeigherFunction


@dataclass(frozen=True, slots=True)
class Mixing:
    """The mixing weight alpha of FedAsync (Xie et al. 2019, algorithm 1): x <- (1 - alpha) x + alpha x_new. Absolute.

    alpha_t = alpha * s(staleness) is this beside `Absolute(Polynomial(a))`, with a folder against the current model.
    """

    reads_pace: ClassVar[bool] = False

    alpha: float = 0.6

    def __post_init__(self) -> None:
        if not 0.0 < self.alpha <= 1.0:
            raise ConfigError(f"mixing: alpha is {self.alpha}; choose more than 0.0 and at most 1.0")

    def scale(self, updates: Updates, relative: Floats, context: Context) -> Floats:
        return np.full(len(updates), self.alpha)


@dataclass(frozen=True, slots=True)
class Absolute:
    """Any relative weigher's factors, not divided by their sum: what they take from one update no other one gets."""

    reads_pace: ClassVar[bool] = False

    weigher: Weigher | WeigherFunction

    @property
    def __name__(self) -> str:
        return f"Absolute {name_of(self.weigher)}"

    @property
    def needs_scores(self) -> bool:
        return bool(getattr(self.weigher, "needs_scores", False))

    def scale(self, updates: Updates, relative: Floats, context: Context) -> Floats:
        return np.asarray(weigh(self.weigher, updates, context), dtype=np.float64)
