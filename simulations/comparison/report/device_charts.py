"""The report's charts of devices and their updates, as SVG; styles as in `charts`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedpace.simulations.comparison.report.canvas import DASHED, HALF, WIDE, canvas, rows_canvas
from fedpace.simulations.comparison.report.files import Entry, Gantt
from fedpace.simulations.comparison.report.observed import WeightsBySpeed, Work
from fedpace.simulations.comparison.report.palette import MUTED, colour, dashes, outcome_colour
from fedpace.simulations.comparison.report.svg import embedded
from fedpace.simulations.comparison.report.units import Unit, share

_MOST_TASKS = 1000  # in a strip
_STALENESS_TICKS = (0, 2, 4, 6, 8, 10, 20, 50, 100, 200, 500, 1000, 10_000, 100_000)


def work(found: Sequence[tuple[Entry, Work]], name: str) -> str:
    """Lorenz curves: the share of all tasks done by the devices that did least."""
    with canvas(HALF, 330) as (figure, [axes]):
        axes.plot([0, 1], [0, 1], color=MUTED, lw=1, ls=DASHED)
        place: dict[str, Any] = {"textcoords": "offset points", "color": MUTED, "fontsize": 11, "ha": "right"}
        axes.annotate("all the same", (0.55, 0.55), (-6, 4), **place)
        for entry, of_entry in found:
            look = {"color": colour(entry.style), "linestyle": dashes(entry.style), "gid": entry.style}
            axes.plot(of_entry.share_of_devices, of_entry.share_of_tasks, **look)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda part, _: share(part)))
        axes.set(xlabel="share of devices, least busy first", ylabel="share of tasks", xlim=(0, 1), ylim=(0, 1))
        return embedded(figure, name, "Lorenz curves of tasks over devices")


def staleness(found: Sequence[tuple[Entry, tuple[float, ...]]], name: str) -> str:
    """Quantiles (5, 25, 50, 75, 95, 100 %) of the staleness of folded updates, a row a strategy."""
    top = max(max(quantiles) for _, quantiles in found)
    with rows_canvas([entry for entry, _ in found]) as (figure, axes):
        for place, (entry, (p5, p25, p50, p75, p95, most)) in enumerate(reversed(found)):
            ink, style = colour(entry.style), entry.style
            axes.plot([p5, p95], [place, place], color=ink, lw=1.6, gid=f"{style}~0")
            box = axes.barh(place, p75 - p25, left=p25, height=0.5, color=ink, alpha=0.35, lw=0)
            box[0].set_gid(f"{style}~1")
            axes.plot([p50, p50], [place - 0.3, place + 0.3], color=ink, lw=3, gid=f"{style}~2")
            axes.plot(most, place, ".", color=ink, ms=6, gid=f"{style}~3")
        axes.set_xscale("symlog", linthresh=10, linscale=1)
        shown = [step for step in _STALENESS_TICKS if step <= max(top, 2)]
        axes.set_xticks(shown, [f"{step:,}" for step in shown])
        axes.xaxis.minorticks_off()
        axes.set_xlim(-0.3, max(top, 2) * 1.08 + 0.2)
        axes.set_xlabel("versions (logarithmic above 10)" if top > 10 else "versions")
        return embedded(figure, name, "Staleness of folded updates")


def weights(found: Sequence[tuple[Entry, WeightsBySpeed]], name: str) -> str:
    """By device speed: the weight of an update, and the share of all weight that a device had."""
    with canvas(WIDE, 330, columns=2) as (figure, [left, right]):
        for entry, by_speed in found:
            look: dict[str, Any] = {
                "color": colour(entry.style),
                "linestyle": dashes(entry.style),
                "marker": "o",
                "ms": 4,
            }
            left.plot(by_speed.percentile, by_speed.each, gid=f"{entry.style}~0", **look)
            right.plot(by_speed.percentile, by_speed.influence, gid=f"{entry.style}~1", **look)
        _by_speed(left, "Weight of one update")
        _by_speed(right, "Weight of a device, over the run")
        left.set_ylabel("times the mean")
        return embedded(figure, name, "Weights by device speed")


def _by_speed(axes: Axes, title: str) -> None:
    axes.axhline(1, color=MUTED, lw=1, ls=DASHED)
    axes.set(title=title, xlabel="devices from slowest to fastest (percentile)", xlim=(0, 100))
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda times, _: f"{times:g}×"))


def gantt(found: Gantt, until: float, unit: Unit, name: str, title: str) -> str:
    """Tasks of a hundred devices up to `until` (seconds), the fastest on top; one path an outcome."""
    rows = int(found.device.max()) + 1
    with canvas(HALF, 200) as (figure, [axes]):
        for outcome in outcomes([found]):
            kept = (found.outcome == outcome) & (found.start < until)
            x = np.stack([found.start[kept], np.minimum(found.end[kept], until)], axis=1) / unit.size
            y = np.repeat(found.device[kept, np.newaxis], 2, axis=1)
            if len(x):
                codes = np.tile([Outline.MOVETO, Outline.LINETO], len(x))
                lines = Outline(np.stack([x, y], axis=-1).reshape(-1, 2), codes)
                axes.add_artist(PathPatch(lines, fill=False, ec=outcome_colour(outcome), lw=1.5, capstyle="butt"))
        axes.set(xlim=(0, until / unit.size), ylim=(rows - 0.3, -0.7), yticks=[], xlabel=unit.label)
        axes.set_ylabel("slow … fast")
        axes.grid(visible=False)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        return embedded(figure, name, title)


def gantt_until(of_scene: Sequence[Gantt]) -> float:
    """The seconds that all strips of a scene show: as far as each of them goes, and none has too many tasks to see."""
    few = [found.end.max() for found in of_scene if found.start.size < _MOST_TASKS]
    many = [np.sort(found.start)[_MOST_TASKS - 1] for found in of_scene if found.start.size >= _MOST_TASKS]
    return float(min(few + many))


def outcomes(of_scene: Sequence[Gantt]) -> list[str]:
    """What became of the tasks in a scene's strips, in the palette's order."""
    found = {str(outcome) for of_entry in of_scene for outcome in np.unique(of_entry.outcome)}
    return sorted(found, key=lambda outcome: (outcome_colour(outcome), outcome))
