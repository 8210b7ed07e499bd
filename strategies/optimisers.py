"""The server's optimisers: the adaptive ones of Reddi et al. 2021 ("Adaptive Federated Optimization", algorithm 2).

The combined change Delta_t is a negative pseudo-gradient, so models move by +lr times it. In numbers they equal Flower's
FedAvgM, FedAdam, FedYogi and FedAdagrad: moments begin at 0, and tau keeps the first steps finite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fedpace.errors import ConfigError
from fedpace.strategies.blocks import blocks
from fedpace.strategies.parts import Vector


@dataclass(frozen=True, slots=True)
class SGD:
    """x <- x + lr * Delta. With lr = 1 the server takes the mean as it is (FedAvg)."""

    lr: float = 1.0

    def __post_init__(self) -> None:
        _check(self)

    def step(self, change: Vector, memory: dict[str, Any], step: int) -> Vector:
        if self.lr != 1.0:
            change *= self.lr
        return change


@dataclass(frozen=True, slots=True)
class Momentum:
    """m <- momentum * m + Delta, x <- x + lr * m (FedAvgM; Hsu et al. 2019, "Measuring the Effects of Non-Identical Data
    Distribution for Federated Visual Classification", section 4)."""

    lr: float = 1.0
    momentum: float = 0.9

    def __post_init__(self) -> None:
        _check(self)

    def step(self, change: Vector, memory: dict[str, Any], step: int) -> Vector:
        m = _moment(memory, "m", change)
        for block in blocks(len(change)):
            m[block] *= self.momentum
            m[block] += change[block]
            np.multiply(m[block], self.lr, out=change[block])
        return change


@dataclass(frozen=True, slots=True)
class Adam:
    """m <- beta_1 m + (1 - beta_1) Delta, v <- beta_2 v + (1 - beta_2) Delta^2, x <- x + lr_t m / (sqrt(v) + tau).

    lr_t = lr sqrt(1 - beta_2^(t + 1)) / (1 - beta_1^(t + 1)) corrects the bias of moments that begin at 0 (Kingma & Ba
    2015, section 2), with Flower's exponent t + 1 where t counts from 1; Reddi et al. leave it out.
    """

    lr: float = 0.1
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _check(self)

    def step(self, change: Vector, memory: dict[str, Any], step: int) -> Vector:
        lr = self.lr * np.sqrt(1.0 - self.beta_2 ** (step + 1.0)) / (1.0 - self.beta_1 ** (step + 1.0))
        m, v = _moment(memory, "m", change), _moment(memory, "v", change)
        for block in blocks(len(change)):
            _average(m[block], change[block], self.beta_1)
            _average(v[block], np.square(change[block]), self.beta_2)
            change[block] = _scaled(lr, m[block], v[block], self.tau)
        return change


@dataclass(frozen=True, slots=True)
class Yogi:
    """As Adam, but v <- v - (1 - beta_2) Delta^2 sign(v - Delta^2), and no correction of bias."""

    lr: float = 0.01
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _check(self)

    def step(self, change: Vector, memory: dict[str, Any], step: int) -> Vector:
        m, v = _moment(memory, "m", change), _moment(memory, "v", change)
        for block in blocks(len(change)):
            square = np.square(change[block])
            _average(m[block], change[block], self.beta_1)
            v[block] -= (1.0 - self.beta_2) * square * np.sign(v[block] - square)
            change[block] = _scaled(self.lr, m[block], v[block], self.tau)
        return change


@dataclass(frozen=True, slots=True)
class Adagrad:
    """v <- v + Delta^2, x <- x + lr * Delta / (sqrt(v) + tau): algorithm 2 with beta_1 = 0."""

    lr: float = 0.1
    tau: float = 1e-3

    def __post_init__(self) -> None:
        _check(self)

    def step(self, change: Vector, memory: dict[str, Any], step: int) -> Vector:
        v = _moment(memory, "v", change)
        for block in blocks(len(change)):
            v[block] += np.square(change[block])
            change[block] = _scaled(self.lr, change[block], v[block], self.tau)
        return change


def _moment(memory: dict[str, Any], name: str, like: Vector) -> Vector:
    """The moment of that name, zero at first."""
    if name not in memory:
        memory[name] = np.zeros_like(like)
    moment: Vector = memory[name]
    return moment


def _average(moment: Vector, value: Vector, beta: float) -> None:
    moment *= beta
    moment += (1.0 - beta) * value


def _scaled(lr: float, m: Vector, v: Vector, tau: float) -> Vector:
    result: Vector = float(lr) * m / (np.sqrt(v) + tau)
    return result


def _check(optimiser: Any) -> None:
    """Raises ConfigError for a number out of its range."""
    name = type(optimiser).__name__.lower()
    for field in optimiser.__slots__:
        value = getattr(optimiser, field)
        if field in ("lr", "tau"):
            if not 0.0 < value < np.inf:
                raise ConfigError(f"server optimiser {name}: {field} is {value}; choose more than 0")
        elif not 0.0 <= value < 1.0:
            raise ConfigError(f"server optimiser {name}: {field} is {value}; choose at least 0.0 and less than 1.0")
