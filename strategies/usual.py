"""What is usual in a fleet: the median and the spread of a quantity over the devices observed last."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterable

WIDTH = 255
"""Observations kept: enough for a median to 8 % of the spread, few enough to insert one in a microsecond."""


class Window:
    """The last `WIDTH` observations, in the order they came and sorted, so that an exact median costs O(1).

    A tenth of them may be anything at all before the spread follows them, and half before the median does.
    """

    __slots__ = ("_sorted", "recent")

    def __init__(self, values: Iterable[float] = ()) -> None:
        self.recent = list(values)[-WIDTH:]
        self._sorted = sorted(self.recent)

    def __len__(self) -> int:
        return len(self.recent)

    def add(self, value: float) -> None:
        """Takes in a finite value; the oldest goes when there are too many."""
        self.recent.append(value)
        insort(self._sorted, value)
        if len(self.recent) > WIDTH:
            del self._sorted[bisect_left(self._sorted, self.recent.pop(0))]

    def median(self) -> float:
        """NaN of nothing."""
        return self._quantile(0.5) if self._sorted else math.nan

    def spread(self) -> float:
        """The standard deviation of a normal distribution with the same 10 % and 90 % quantiles; NaN of nothing.

        Unlike the median absolute deviation it sees a minority: one slow device in five is part of what is usual.
        """
        return (self._quantile(0.9) - self._quantile(0.1)) / 2.5631 if self._sorted else math.nan

    def _quantile(self, share: float) -> float:
        place = share * (len(self._sorted) - 1)
        low = int(place)
        high = min(low + 1, len(self._sorted) - 1)
        return self._sorted[low] + (place - low) * (self._sorted[high] - self._sorted[low])
