"""When simulated devices are there: sessions that come and go by day and night, or a trace of real ones.

A device alternates between present and absent. A cursor a device (the stretch it is in: since, until, how many came
before) answers in O(1) while time goes on; what it says depends on the seed, the row and the time alone, so looking back
is right as well, and only slower.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray

from fedpace.simulations.fleets.hashing import (
    COUNTER_STRIDE,
    ROW_STRIDE,
    Floats,
    counters,
    elements,
    exponential_table,
    lognormal_table,
    look_up,
    look_up_many,
    mix,
    mix_many,
    residual_table,
    table_mean,
    uniform_many,
)
from fedpace.simulations.fleets.settings import Availability

DAY, HOUR = 86_400.0, 3_600.0
_SHORTEST = 0.001
"""Seconds that any stretch lasts at least, so that time goes on."""


class Presence(ABC):
    """Stretches of presence and absence of every row. Times are seconds from 0 on."""

    def __init__(self, initial: NDArray[np.bool_], until: Floats) -> None:
        self.initial = initial
        self.first_until = until
        size = len(initial)
        self._since_array, self._until_array = np.zeros(size), until.copy()
        self._passed_array = np.zeros(size, np.uint32)
        self._initial, self._passed = elements(initial), elements(self._passed_array)
        self._since, self._until = elements(self._since_array), elements(self._until_array)

    @property
    def nbytes(self) -> int:
        """Bytes of all that grows with the fleet."""
        held = (self.initial, self.first_until, self._since_array, self._until_array, self._passed_array)
        return sum(array.nbytes for array in held)

    def at(self, row: int, at: float) -> tuple[bool, float]:
        """Whether a device is there at a time, and when that next changes: strictly later, `inf` for never."""
        if not self._since[row] <= at < self._until[row]:
            self._seek(row, at)
        return self._initial[row] == (self._passed[row] & 1 == 0), self._until[row]

    def at_many(self, rows: NDArray[np.int64], at: Floats) -> tuple[NDArray[np.bool_], Floats]:
        """`at` of every element."""
        present = self.initial[rows] == (self._passed_array[rows] & 1 == 0)
        until = self._until_array[rows]
        for index in np.flatnonzero((at < self._since_array[rows]) | (at >= until)).tolist():
            present[index], until[index] = self.at(int(rows[index]), float(at[index]))
        return present, until

    @abstractmethod
    def _seek(self, row: int, at: float) -> None:
        """Moves the cursor of a row to the stretch that holds a time."""


class Sessions(Presence):
    """Log-normal sessions; gaps whose rate follows the night of each device's own time zone.

    Sessions start as a Poisson process while a device is absent, at a rate of share / (1 - share) / mean session by day
    and by night: in each the long-run share of devices that are present is then what was asked for. A gap is an
    exponential draw of the rate's integral, which is inverted in closed form.
    """

    def __init__(self, settings: Availability, size: int, key: int, phase_key: int) -> None:
        rows = np.arange(size, dtype=np.int64)
        self._key = key
        lengths = lognormal_table(settings.session_median_seconds, settings.session_sigma)
        residuals, gaps = residual_table(lengths), exponential_table()
        self._lengths, self._residuals, self._gaps = lengths.tolist(), residuals.tolist(), gaps.tolist()
        mean = table_mean(lengths)
        self._night_rate = settings.night_share / (1 - settings.night_share) / mean
        self._day_rate = settings.day_share / (1 - settings.day_share) / mean
        self._night = settings.night_hours * HOUR
        self._by_dawn = self._night_rate * self._night
        self._by_dusk = self._by_dawn + self._day_rate * (DAY - self._night)

        spread = uniform_many(counters(phase_key, rows, 0)) - 0.5
        hours = settings.starts_at_hour - settings.night_starts_at_hour + settings.phase_spread_hours * spread
        offsets = (hours * HOUR % DAY).astype(np.float32)
        offsets[offsets >= DAY] = 0.0
        self._offset_array = offsets
        self._offsets = elements(offsets)
        share = np.where(offsets < self._night, settings.night_share, settings.day_share)
        initial = uniform_many(counters(key, rows, 0)) < share
        bits = mix_many(counters(key, rows, 1)) >> np.uint64(32)
        gone = self._gap_ends(offsets.astype(np.float64), look_up_many(gaps, bits))
        until = np.maximum(np.where(initial, look_up_many(residuals, bits), gone), _SHORTEST)
        super().__init__(initial, until)

    @property
    def nbytes(self) -> int:
        return super().nbytes + self._offset_array.nbytes

    def _seek(self, row: int, at: float) -> None:
        passed, until = self._passed[row], self._until[row]
        since = self._since[row]
        if at < since:
            passed, since, until = 0, 0.0, self.first_until.item(row)
        while until <= at:
            passed, since = passed + 1, until
            bits = mix(self._key + row * ROW_STRIDE + (passed + 1) * COUNTER_STRIDE) >> 32
            if self._initial[row] == (passed & 1 == 0):
                until = since + look_up(self._lengths, bits)
            else:
                until = self._gap_end(self._offsets[row], since, look_up(self._gaps, bits))
            until = max(until, since + _SHORTEST)
        self._passed[row], self._since[row], self._until[row] = passed, since, until

    def _gap_end(self, offset: float, since: float, gap: float) -> float:
        """When the integral of the rate from `since` on reaches `gap`."""
        days, clock = divmod(since + offset, DAY)
        due = self._night_rate * min(clock, self._night) + self._day_rate * max(clock - self._night, 0.0) + gap
        more = due // self._by_dusk
        due -= more * self._by_dusk
        clock = min(due, self._by_dawn) / self._night_rate + max(due - self._by_dawn, 0.0) / self._day_rate
        return (days + more) * DAY + clock - offset

    def _gap_ends(self, offsets: Floats, gaps: Floats) -> Floats:
        """`_gap_end` of gaps that begin at 0."""
        due = self._night_rate * np.minimum(offsets, self._night) + gaps
        due += self._day_rate * np.maximum(offsets - self._night, 0.0)
        more = due // self._by_dusk
        due -= more * self._by_dusk
        clock = np.minimum(due, self._by_dawn) / self._night_rate
        clock += np.maximum(due - self._by_dawn, 0.0) / self._day_rate
        ends: Floats = more * DAY + clock - offsets
        return ends


class Trace(Presence):
    """Recorded sessions, over and over: row r is the trace's device r modulo their number. A change is found by bisection."""

    def __init__(self, sessions: list[list[tuple[float, float]]], size: int, cycle: float) -> None:
        """`sessions` of each device: sorted, apart from each other, within 0 and `cycle` seconds."""
        self._cycle = cycle
        self._changes = [_changes(entry, cycle) for entry in sessions]
        initial = np.array([entry[0][0] == 0.0 for entry in sessions])
        until = np.array([changes[0] if changes else math.inf for changes in self._changes])
        recorded = np.arange(size) % len(sessions)
        super().__init__(initial[recorded], until[recorded])

    def _seek(self, row: int, at: float) -> None:
        changes = self._changes[row % len(self._changes)]
        if not changes:
            return  # one stretch for ever; only times before 0 come here
        cycles = int(at // self._cycle)
        index = cycles * len(changes) + bisect_right(changes, at - cycles * self._cycle)
        # The same sums as everywhere else decide, so that rounding never puts a change on both sides of its own time.
        while index > 0 and self._change(changes, index - 1) > at:
            index -= 1
        while self._change(changes, index) <= at:
            index += 1
        self._passed[row] = index
        self._since[row] = self._change(changes, index - 1) if index else 0.0
        self._until[row] = self._change(changes, index)

    def _change(self, changes: list[float], index: int) -> float:
        cycles, inside = divmod(index, len(changes))
        return cycles * self._cycle + changes[inside]


def _changes(sessions: list[tuple[float, float]], cycle: float) -> list[float]:
    """Times in (0, cycle] at which presence changes; none where a session fills the cycle."""
    changes = [time for session in sessions for time in session]
    if changes[0] > 0.0:
        return changes
    if changes[-1] == cycle:  # goes on from one cycle into the next
        return changes[1:-1]
    return [*changes[1:], cycle]
