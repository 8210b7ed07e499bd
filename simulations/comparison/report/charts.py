"""The report's charts of accuracy and of time to accuracy, as SVG.

An entry's style ("s3", "s3u") gives its colour and line, and is the class of what shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter
from scipy.optimize import isotonic_regression

from fedpace.simulations.comparison.report.canvas import DASHED, HALF, WIDE, canvas, rows_canvas
from fedpace.simulations.comparison.report.curves import Curve, accuracy_curve
from fedpace.simulations.comparison.report.files import Entry, Scene
from fedpace.simulations.comparison.report.palette import MUTED, PAGE, colour, dashes
from fedpace.simulations.comparison.report.svg import embedded
from fedpace.simulations.comparison.report.units import Unit, share
from fedpace.simulations.comparison.statistics import Estimate, Floats

_DEPTH = 0.25  # of accuracy: how far below the target a chart goes
_LABEL_GAP = 0.052  # of the axis: the least distance between two lines' names


def accuracy(scene: Scene, name: str, unit: Unit, value: str, *, wide: bool = False) -> str:
    """Mean `value` over a cost with its band, a line a strategy; a run that diverged is thin, and ends in a cross.

    The cost is on a logarithmic scale: a strategy that takes twice as much is everywhere as far to the right.
    """
    with canvas(WIDE if wide else HALF, 400 if wide else 310) as (figure, [axes]):
        axes.set_xscale("log")
        drawn = _draw_curves(axes, scene, unit, value)
        _draw_diverged(axes, scene, unit, value)
        if value == scene.metric:
            _mark_target(axes, scene.target)
        if drawn:
            _fit(axes, [(curve.x / unit.size, curve.mean) for _, curve in drawn], scene.target)
        axes.set_xlabel(f"{unit.label}, logarithmic")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda part, _: share(part)))
        if wide:
            _name_ends(axes, [(entry, curve.x[-1] / unit.size, curve.mean[-1]) for entry, curve in drawn])
        return embedded(figure, name, f"{value.replace('_', ' ')} over {unit.label}, {scene.title}")


def _draw_curves(axes: Axes, scene: Scene, unit: Unit, value: str) -> list[tuple[Entry, Curve]]:
    found = [(entry, accuracy_curve(entry.completed, unit.cost, value)) for entry in scene.entries]
    drawn = [(entry, curve) for entry, curve in found if curve]
    for entry, curve in drawn:
        x, ink = curve.x / unit.size, colour(entry.style)
        if (curve.high > curve.low).any():
            axes.fill_between(x, curve.low, curve.high, color=ink, alpha=0.13, lw=0, gid=f"{entry.style}~band")
        axes.plot(x, curve.mean, color=ink, linestyle=dashes(entry.style), gid=entry.style)
    return drawn


def _draw_diverged(axes: Axes, scene: Scene, unit: Unit, value: str) -> None:
    for entry in scene.entries:
        for place, run in enumerate(run for run in entry.runs if run.row["status"] == "diverged"):
            x, y = run.evaluations[unit.cost] / unit.size, run.evaluations[value]
            ink = colour(entry.style)
            axes.plot(x, y, color=ink, lw=1, alpha=0.7, gid=f"{entry.style}~line{place}")
            axes.plot(x[-1:], y[-1:], "x", color=ink, ms=7, mew=2, gid=f"{entry.style}~end{place}")


def _fit(axes: Axes, lines: Sequence[tuple[Floats, Floats]], target: float) -> None:
    """Shows what is near the target: not the first steep rise, nor lines far below, which would take all the space."""
    last, top = max(x[-1] for x, _ in lines), axes.dataLim.y1
    bottom = min([target, *(float(y[x >= x[-1] / 12].min()) for x, y in lines)])
    bottom = max(bottom, min(target, max(float(y[-1]) for _, y in lines)) - _DEPTH)
    bottom = max(bottom - 0.06 * (top - bottom), 0.0)
    risen = [(x, np.flatnonzero((y >= bottom) & (y != y[0]))) for x, y in lines]
    first = min((float(x[shown[0] - 1]) for x, shown in risen if shown.size), default=last)
    axes.set_ylim(bottom, top + 0.03 * (top - bottom) + 1e-3)
    _tick(axes, min(first, last / 10), last, "{:,g}".format)


def _mark_target(axes: Axes, target: float) -> None:
    axes.axhline(target, color=MUTED, lw=1, ls=DASHED)
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate(f"target {share(target)}", (0, target), (4, 4), color=MUTED, fontsize=11, **place)


def _name_ends(axes: Axes, ends: Sequence[tuple[Entry, float, float]]) -> None:
    """Names the lines at the right edge, moved apart where they would overlap, with their values if far below."""
    ends = sorted(ends, key=lambda end: end[2])
    bottom, top = axes.get_ylim()
    heights = np.array([max(y, bottom) for _, _, y in ends])
    places = spread(heights, _LABEL_GAP * (top - bottom), bottom, top)
    for (entry, x, y), height, place in zip(ends, heights, places, strict=True):
        leader = {"arrowstyle": "-", "color": colour(entry.style), "lw": 1.2, "shrinkA": 1, "shrinkB": 1}
        axes.annotate(
            entry.label if y > bottom else f"{entry.label} ({share(y)})",
            (x, float(height)),
            (1.03, float(place)),
            textcoords=("axes fraction", "data"),
            va="center",
            fontsize=12,
            gid=f"{entry.style}~label",
            annotation_clip=False,
            arrowprops=leader | {"gid": f"{entry.style}~leader", "relpos": (0, 0.5)},
        )


def spread(values: Floats, gap: float, bottom: float, top: float) -> Floats:
    """The places nearest to the sorted `values` that are `gap` apart, and between the bounds where they fit there."""
    if not len(values):
        return values
    steps = gap * np.arange(len(values))
    places: Floats = np.minimum(isotonic_regression(values - steps).x, top - steps[-1]) + steps
    places += max(bottom - places[0], 0.0)
    return places


def ratios(found: Sequence[tuple[Entry, Estimate]], reference: str, name: str, title: str) -> str:
    """A forest plot on a logarithmic scale, in the order given. A bound is a hollow triangle that points to the truth."""
    markers = {"": "o", "at least": ">", "at most": "<", "unclear": "D"}
    with rows_canvas([entry for entry, _ in found]) as (figure, axes):
        axes.set_xscale("log")
        there = [v for _, ratio in found for v in (ratio.low, ratio.value, ratio.high) if 0 < v < np.inf]
        low, high = min([1.0, *there]) / 1.2, max([1.0, *there]) * 1.2
        for place, (entry, ratio) in enumerate(reversed(found)):
            ink, face = colour(entry.style), PAGE if ratio.bound else colour(entry.style)
            axes.plot([ratio.low, ratio.high], [place, place], color=ink, lw=2.4, gid=f"{entry.style}~0")
            look: dict[str, Any] = {"marker": markers[ratio.bound], "color": ink, "ms": 8, "mew": 2, "mfc": face}
            axes.plot(ratio.value, place, gid=f"{entry.style}~1", **look)
        axes.axvline(1, color=MUTED, lw=1)
        _tick(axes, low, high, "{:g}×".format)
        axes.set_xlabel(f"times sooner than {reference} (logarithmic)")
        return embedded(figure, name, title)


def _tick(axes: Axes, low: float, high: float, told: Callable[[float], str]) -> None:
    """Ends a logarithmic axis at `low` and `high`, and names round numbers on it."""
    digits = (1, 2, 3, 5) if high / low < 30 else (1, 2, 5) if high / low < 300 else (1,)
    steps = [float(f"{digit}e{power}") for power in range(-9, 16) for digit in digits]
    shown = [step for step in steps if low <= step <= high]
    axes.set_xticks(shown, [told(step) for step in shown])
    axes.xaxis.minorticks_off()
    axes.set_xlim(low, high)


def trials(found: Sequence[tuple[Entry, Sequence[tuple[float, bool]]]], name: str) -> str:
    """The value of every trial, a row a strategy; chosen ones filled. Logarithmic where values differ much."""
    with rows_canvas([entry for entry, _ in found]) as (figure, axes):
        for place, (entry, tried) in enumerate(reversed(found)):
            ink = colour(entry.style)
            for chosen in (False, True):
                values = [value for value, is_chosen in tried if is_chosen is chosen and np.isfinite(value)]
                look: dict[str, Any] = {"mfc": ink, "ms": 8} if chosen else {"mfc": "none", "ms": 5, "alpha": 0.7}
                axes.plot(values, [place] * len(values), "o", color=ink, gid=f"{entry.style}~{chosen:d}", **look)
        values = [value for _, tried in found for value, _ in tried if np.isfinite(value)]
        if values and min(values) > 0 and max(values) > 10 * min(values):
            axes.set_xscale("log")
            _tick(axes, min(values) / 1.2, max(values) * 1.2, "{:,g}".format)
        best = [[value for value, is_chosen in tried if is_chosen] == [min(tried)[0]] for _, tried in found]
        axes.set_xlabel(f"value of a trial, {'less' if all(best) else 'more'} is better")
        return embedded(figure, name, "Values of trials")
