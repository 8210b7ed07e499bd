"""Devices at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedpace.strategies.fleet import Rows
from fedpace.strategies.parts import Context, Devices


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every idle device is as likely as any other (McMahan et al. 2017, "Communication-efficient learning of deep
    networks from decentralized data", algorithm 1: a random set of clients)."""

    reads_pace: ClassVar[bool] = False
    uniform: ClassVar[bool] = True

    def select(self, devices: Devices, count: int, context: Context) -> Rows:
        return context.rng.choice(len(devices), count, replace=False)
