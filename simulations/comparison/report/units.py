"""Numbers as people read them: durations, bytes, shares."""

from __future__ import annotations

import math
from dataclasses import dataclass

_SECONDS = ((1.0, "s"), (60.0, "min"), (3600.0, "h"), (86_400.0, "d"))
_BYTES = ((1.0, "B"), (1e3, "kB"), (1e6, "MB"), (1e9, "GB"), (1e12, "TB"))
_NAMES = {"virtual_seconds": "virtual time", "device_seconds": "device time", "bytes": "bytes up and down"}
NOTHING = "–"


@dataclass(frozen=True)
class Unit:
    """The unit of an axis: `size` seconds or bytes."""

    cost: str
    size: float
    name: str

    @property
    def label(self) -> str:
        return f"{_NAMES[self.cost]} ({self.name})"


def unit_for(cost: str, most: float) -> Unit:
    """The largest unit of which `most` is at least three."""
    units = _BYTES if cost == "bytes" else _SECONDS
    size, name = [unit for unit in units if unit is units[0] or most >= 3 * unit[0]][-1]
    return Unit(cost, size, name)


def amount(cost: str, value: float | None) -> str:
    """A cost with three digits and its unit: 4.35 h, 812 MB."""
    if value is None or not math.isfinite(value):
        return NOTHING
    units = _BYTES if cost == "bytes" else _SECONDS
    size, name = [unit for unit in units if unit is units[0] or value >= unit[0]][-1]
    return f"{digits(value / size)} {name}"


def share(value: float) -> str:
    """A share with one decimal at most: 80%, 86.4%."""
    return f"{100 * value:.1f}".removesuffix(".0") + "%" if math.isfinite(value) else NOTHING


def amounts(cost: str, low: float, high: float) -> str:
    """A range of costs, its unit once where both have the same: 4.35–5.1 h, 812 MB–1.02 GB."""
    one, other = amount(cost, low), amount(cost, high)
    unit = other.rpartition(" ")[2]
    return f"{one.removesuffix(' ' + unit)}–{other}"


def digits(value: float) -> str:
    """Three significant digits, never with an exponent."""
    if not math.isfinite(value):
        return NOTHING
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 4)}f}"
