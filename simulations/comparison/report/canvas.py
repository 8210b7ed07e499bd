"""How the report's charts look, whatever they show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedpace.simulations.comparison.report.files import Entry
from fedpace.simulations.comparison.report.palette import INK, MUTED, RULE

WIDE, HALF = 1000, 490
"""Widths, in CSS pixels, of a chart that has the column to itself, and of one of two."""

DASHED = (0, (4, 3))
_THEME: dict[Any, Any] = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 13,
    "axes.labelsize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 11.5,
    "ytick.labelsize": 11.5,
    "text.color": INK,
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
}


@contextmanager
def canvas(width: int, height: int, columns: int = 1) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of `width` x `height` CSS pixels, and its axes side by side. Drawn and saved inside the context."""
    with mpl.rc_context(_THEME):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        yield figure, [figure.add_subplot(1, columns, place + 1) for place in range(columns)]


@contextmanager
def rows_canvas(entries: Sequence[Entry]) -> Iterator[tuple[Figure, Axes]]:
    """A chart of half the width with a named row a strategy, the first on top: row n is at `len(entries) - 1 - n`."""
    rows = max(len(entries), 2)
    with canvas(HALF, 70 + 29 * rows) as (figure, [axes]):
        axes.set_yticks(range(len(entries)), [entry.label for entry in reversed(entries)])
        axes.tick_params(axis="y", labelcolor=INK, length=0)
        axes.set_ylim(-0.6, rows - 0.4)
        axes.grid(axis="y", visible=False)
        yield figure, axes
