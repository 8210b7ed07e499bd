"""Devices that have resources to spare."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpace.errors import ConfigError
from fedpace.strategies.fleet import Floats, Rows
from fedpace.strategies.parts import Context, Devices
from fedpace.strategies.selectors.drawing import by_weight, check_range, known


@dataclass(frozen=True, slots=True)
class Resources:
    """Draws devices in proportion to a score of what they have free; those under a floor are left out.

    The score is the mean, weighted by `memory`, `idle` and `battery`, of three shares from 0 to 1: memory free, 1 - load,
    charge. What a device does not say counts as the median of those that do. Choosing by what devices have at the time is
    the idea of FedCS (Nishio and Yonetani 2019, "Client selection for federated learning with heterogeneous resources in
    mobile edge", section III); drawing by score, and not the best, leaves no device out that is above the floors.

    Floors: `min_battery_percent` (a device that reports no charge, as without a battery, is not below it),
    `min_free_bytes` of memory and, from above, `max_load`. Fewer than asked for are chosen if the others are below; none,
    if all are, until their heartbeats say otherwise.
    """

    memory: float = 1.0
    idle: float = 1.0
    battery: float = 1.0
    min_battery_percent: float = 20.0
    min_free_bytes: float = 0.0
    max_load: float = 1.0

    def __post_init__(self) -> None:
        for name in ("memory", "idle", "battery", "min_free_bytes"):
            check_range(self, name, 0.0)
        check_range(self, "min_battery_percent", 0.0, 100.0)
        check_range(self, "max_load", 0.0, 1.0)
        if not self.memory + self.idle + self.battery > 0:
            raise ConfigError("Resources: memory, idle and battery are all 0; give one of them a weight")

    def select(self, devices: Devices, count: int, context: Context) -> Rows:
        fit = np.flatnonzero(self._fit(devices))
        scores = self.scores(devices)[fit]
        return fit[by_weight(count, context.rng, np.maximum(scores, 1e-3))]

    def scores(self, devices: Devices) -> Floats:
        """One number from 0 (nothing to spare) to 1 a device."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            shares = (
                (self.memory, devices.free_memory_bytes / devices.memory_bytes),
                (self.idle, 1.0 - devices.load),
                (self.battery, devices.battery_percent / 100.0),
            )
        total = np.zeros(len(devices))
        for weight, share in shares:
            total += weight * np.clip(known(share, 0.5), 0.0, 1.0)
        result: Floats = total / (self.memory + self.idle + self.battery)
        return result

    def _fit(self, devices: Devices) -> NDArray[np.bool_]:
        below: NDArray[np.bool_] = devices.battery_percent < self.min_battery_percent
        below |= devices.free_memory_bytes < self.min_free_bytes
        below |= devices.load > self.max_load
        return ~below
