"""What work does to a device: its battery drains, and it heats up until it runs slower.

This is the state that makes `draw` depend on the draws before it: a few plain arrays, brought up to date when a row is
looked at. A device works on one task at a time; its draws come in the order of their times.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedpace.simulations.fleets.hashing import Floats, counters, elements, uniform_many
from fedpace.simulations.fleets.settings import Battery, Compute

_HOUR = 3_600.0
Rows = NDArray[np.int64]


def wears(battery: Battery, compute: Compute) -> bool:
    """Whether these settings have devices wear at all."""
    return math.isfinite(battery.hours_of_compute) or math.isfinite(compute.throttle_after_seconds)


class Wear:
    """Charge (0 to 1) and heat of every row: seconds of sustained work, of which no more counts than makes it hot."""

    def __init__(self, battery: Battery, compute: Compute, size: int, key: int) -> None:
        self._drain = 1.0 / (battery.hours_of_compute * _HOUR)
        self._charging = 1.0 / (battery.hours_to_charge * _HOUR)
        self._floor = battery.leave_below
        self._recharge = (battery.return_above - battery.leave_below) / self._charging
        self.has_battery = self._drain > 0.0
        self._hot, self._factor = compute.throttle_after_seconds, compute.throttle_factor
        self._throttles = math.isfinite(self._hot)
        self._cooling = self._hot / compute.throttle_cool_seconds if self._throttles else 0.0

        uniform = uniform_many(counters(key, np.arange(size, dtype=np.int64), 0))
        charge = battery.start_low + (battery.start_high - battery.start_low) * uniform
        self.state: dict[str, Floats] = {
            "charge": charge,
            "heat": np.zeros(size),
            "busy_from": np.zeros(size),
            "busy_until": np.zeros(size),
            "away_from": np.full(size, math.inf),
        }
        self._charge, self._heat, self._busy_from, self._busy_until, self._away_from = map(
            elements, self.state.values()
        )

    def charge(self, row: int, at: float) -> float:
        """Share of a full battery at a time after the row's last task; while it runs, what will be left then."""
        idle = max(0.0, at - self._busy_until[row])
        charge: float = min(1.0, self._charge[row] + idle * self._charging)
        return charge

    def charge_many(self, rows: Rows, at: Floats | float) -> Floats:
        """`charge` of many rows."""
        idle = np.maximum(0.0, at - self.state["busy_until"][rows])
        return np.minimum(1.0, self.state["charge"][rows] + idle * self._charging)

    def away(self, row: int) -> tuple[float, float]:
        """From when to when a device is gone for want of charge: its last such absence, `inf` both if none."""
        return self._away_from[row], self._away_from[row] + self._recharge

    def away_many(self, rows: Rows, at: Floats) -> NDArray[np.bool_]:
        """Which rows are then gone for want of charge."""
        away_from = self.state["away_from"][rows]
        away: NDArray[np.bool_] = (away_from <= at) & (at < away_from + self._recharge)
        return away

    def slowed(self, row: int, at: float, seconds: float) -> float:
        """Seconds that a computation which begins at `at` takes, if a cool device takes `seconds`."""
        if not self._throttles:
            return seconds
        room = self._hot - self._heat_at(row, at)
        return seconds if seconds <= room else room + (seconds - room) * self._factor

    def slowed_many(self, rows: Rows, at: Floats, seconds: Floats) -> Floats:
        """`slowed` of many rows."""
        if not self._throttles:
            return seconds
        room = self._hot - self._heat_at_many(rows, at)
        return np.where(seconds <= room, seconds, room + (seconds - room) * self._factor)

    def lasts(self, row: int, at: float) -> float:
        """Seconds that a device can compute from `at` on before it leaves to charge; `inf` without a battery."""
        if not self.has_battery:
            return math.inf
        return max(0.0, self.charge(row, at) - self._floor) / self._drain

    def lasts_many(self, rows: Rows, at: Floats) -> Floats:
        """`lasts` of many rows."""
        if not self.has_battery:
            return np.full(len(rows), math.inf)
        return np.maximum(0.0, self.charge_many(rows, at) - self._floor) / self._drain

    def work(self, row: int, start: float, seconds: float, exhausted: bool) -> None:
        """The device computes for `seconds` from `start` on; `exhausted` if it then leaves to charge."""
        self._heat[row] = self._heat_at(row, start) + seconds
        self._charge[row] = self.charge(row, start) - seconds * self._drain
        self._busy_from[row], self._busy_until[row] = start, start + seconds
        if exhausted:
            self._away_from[row] = start + seconds

    def work_many(self, rows: Rows, start: Floats, seconds: Floats, exhausted: NDArray[np.bool_]) -> None:
        """`work` of many rows, none of which comes twice."""
        state = self.state
        state["heat"][rows] = self._heat_at_many(rows, start) + seconds
        state["charge"][rows] = self.charge_many(rows, start) - seconds * self._drain
        state["busy_from"][rows], state["busy_until"][rows] = start, start + seconds
        state["away_from"][rows[exhausted]] = (start + seconds)[exhausted]

    def stop(self, row: int, at: float) -> None:
        """The last task was called off: what it would have computed after `at` is taken back."""
        undone = self._busy_until[row] - max(at, self._busy_from[row])
        if undone <= 0.0:
            return
        if self._away_from[row] == self._busy_until[row]:
            self._away_from[row] = math.inf
        self._charge[row] += undone * self._drain
        self._heat[row] -= undone
        self._busy_until[row] -= undone

    def _heat_at(self, row: int, at: float) -> float:
        idle = max(0.0, at - self._busy_until[row])
        heat: float = max(0.0, min(self._hot, self._heat[row]) - idle * self._cooling)
        return heat

    def _heat_at_many(self, rows: Rows, at: Floats) -> Floats:
        idle = np.maximum(0.0, at - self.state["busy_until"][rows])
        return np.maximum(0.0, np.minimum(self._hot, self.state["heat"][rows]) - idle * self._cooling)
