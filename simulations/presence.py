"""Who of a simulated fleet is there, and when that changes next."""

from __future__ import annotations

import heapq
import math

import numpy as np
from numpy.typing import NDArray

from fedpace.simulations.fleets import SimulatedFleet


class Presence:
    """Rows that are there. The changes known from the start lie in one sorted array, later ones in a heap: O(log n)."""

    def __init__(self, fleet: SimulatedFleet) -> None:
        self._fleet = fleet
        self.there: NDArray[np.bool_] = fleet.initially_present()
        self.count = int(self.there.sum())
        self._heap: list[tuple[float, int]] = []
        self._at = fleet.initial_changes()
        order = np.argsort(self._at, kind="stable")
        self._first_rows = order[np.isfinite(self._at[order])]
        self._first_times = self._at[self._first_rows]
        self._place = 0

    @property
    def next_change(self) -> float:
        """When somebody comes or goes next; infinity for never."""
        first = self._peek_first()
        while self._heap and self._at[self._heap[0][1]] != self._heap[0][0]:
            heapq.heappop(self._heap)
        return min(first, self._heap[0][0]) if self._heap else first

    def _peek_first(self) -> float:
        while self._place < len(self._first_rows):
            at = self._first_times[self._place]
            if self._at[self._first_rows[self._place]] == at:
                return float(at)
            self._place += 1
        return math.inf

    def change(self) -> tuple[int, bool]:
        """Lets the next change happen. Returns the row, and whether it is there now."""
        at = self.next_change
        if self._peek_first() == at:
            row = int(self._first_rows[self._place])
            self._place += 1
        else:
            row = heapq.heappop(self._heap)[1]
        there = not self.there[row]
        self._set(row, there, at)
        return row, there

    def gone(self, row: int, at: float) -> bool:
        """A device goes away before its time. Whether it was there."""
        was = bool(self.there[row])
        self._set(row, False, at)
        return was

    def _set(self, row: int, there: bool, at: float) -> None:
        self.count += int(there) - int(self.there[row])
        self.there[row] = there
        self._at[row] = self._fleet.next_change(row, at)
        if math.isfinite(self._at[row]):
            heapq.heappush(self._heap, (float(self._at[row]), row))
