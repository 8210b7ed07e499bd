"""The report's sections about one scene, an app on a fleet, as the template takes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedpace.simulations.comparison.report import charts, device_charts
from fedpace.simulations.comparison.report.files import COSTS, Entry, Scene
from fedpace.simulations.comparison.report.observed import Observed, observe
from fedpace.simulations.comparison.report.standings import Standing
from fedpace.simulations.comparison.report.units import amount, amounts, digits, share, unit_for
from fedpace.simulations.comparison.statistics import Estimate

_SIGNS = {"": "", "at least": "≥ ", "at most": "≤ ", "unclear": "≈ "}
Told = Callable[[Estimate], tuple[str, str]]
"""An estimate's value and interval as text."""


@dataclass(frozen=True)
class Cell:
    """An estimate in a table: text, its interval in small print, and whether it is the best of its kind in the scene."""

    text: str = ""
    interval: str = ""
    best: bool = False


def scene_section(scene: Scene, name: str, ranked: Sequence[Standing], reference: str) -> dict[str, Any]:
    """What the template shows of a scene. `name` is its id in the page; `ranked`, how its entries stand, the best first."""
    observed = [(entry, observe(entry.read_details())) for entry in scene.entries]
    return {
        "id": name,
        "app": scene.app,
        "fleet": scene.fleet,
        "title": scene.title,
        "target": _target(scene),
        "finding": _finding(scene, ranked, reference),
        "rows": rows_of(ranked),
        "has_slow": scene.has_slow,
        "accuracy": _accuracy_charts(scene, name),
        "ratios": _ratio_chart(scene, ranked, reference, name),
        "work": _work(observed, name),
        "staleness": _staleness(observed, name),
        "weights": _weights(observed, name),
        "gantt": _gantt(observed, name),
    }


# ------------------------------------------------------------ accuracy, and what it cost


def _accuracy_charts(scene: Scene, name: str) -> dict[str, Any]:
    runs = [run for entry in scene.entries for run in entry.runs if run.evaluations["virtual_seconds"].size]
    if not runs:
        return {}
    units = {cost: unit_for(cost, max(run.evaluations[cost].max() for run in runs)) for cost in COSTS}
    time = units["virtual_seconds"]
    return {
        "time": charts.accuracy(scene, f"{name}-time", time, "accuracy", wide=True),
        "bytes": charts.accuracy(scene, f"{name}-bytes", units["bytes"], "accuracy"),
        "device": charts.accuracy(scene, f"{name}-device", units["device_seconds"], "accuracy"),
        "slow": charts.accuracy(scene, f"{name}-slow", time, "slow_accuracy") if scene.has_slow else None,
        "diverged": any(run.row["status"] == "diverged" for run in runs),
    }


def _ratio_chart(scene: Scene, ranked: Sequence[Standing], reference: str, name: str) -> str | None:
    found = [
        (standing.entry, standing.speedup)
        for standing in ranked
        if standing.entry.label != reference and math.isfinite(standing.speedup.value)
    ]
    title = f"Times sooner at the target than {reference}, {scene.title}"
    return charts.ratios(found, reference, f"{name}-ratios", title) if found else None


def rows_of(ranked: Sequence[Standing]) -> list[dict[str, Any]]:
    """Rows of a table, in the order given: the entry, how many of its runs arrived, and a cell a column."""
    columns = {
        "time": _cost_cells(ranked, "seconds", "virtual_seconds"),
        "device": _cost_cells(ranked, "device_seconds", "device_seconds"),
        "bytes": _cost_cells(ranked, "bytes", "bytes"),
        "ratio": _cells([standing.speedup for standing in ranked], _ratio, ("", "at least")),
        "final": _cells([standing.accuracy for standing in ranked], _percent, ("",)),
        "slow": _cells([standing.slow_accuracy for standing in ranked], _percent, ("",)),
    }
    return [
        {"entry": standing.entry, "reached": standing.reached, "runs": standing.runs}
        | {column: cells[place] for column, cells in columns.items()}
        for place, standing in enumerate(ranked)
    ]


def _cost_cells(ranked: Sequence[Standing], measure: str, cost: str) -> list[Cell]:
    found = [standing.costs[measure] for standing in ranked]

    def told(estimate: Estimate) -> tuple[str, str]:
        return amount(cost, estimate.value), amounts(cost, estimate.low, estimate.high)

    return _cells(found, told, ("",), best=min)


def _ratio(estimate: Estimate) -> tuple[str, str]:
    return f"{digits(estimate.value)}×", f"{digits(estimate.low)}–{digits(estimate.high)}"


def _percent(estimate: Estimate) -> tuple[str, str]:
    return f"{estimate.value:.1%}", f"{100 * estimate.low:.1f}–{100 * estimate.high:.1f}"


def _cells(found: Sequence[Estimate], told: Told, sure: Sequence[str], best: Callable[..., float] = max) -> list[Cell]:
    """A cell each. Marked is the best of those whose bounds are `sure`: the others may be worse than they look."""
    there = [estimate.value for estimate in found if estimate.bound in sure and math.isfinite(estimate.value)]
    mark = best(there, default=math.nan)
    return [_cell(estimate, told, estimate.bound in sure and estimate.value == mark) for estimate in found]


def _cell(estimate: Estimate, told: Told, best: bool) -> Cell:
    if not math.isfinite(estimate.value):
        return Cell()
    text, interval = told(estimate)
    return Cell(_SIGNS[estimate.bound] + text, "" if math.isnan(estimate.low) else interval, best)


def _target(scene: Scene) -> str:
    return share(scene.target) + (" on slow devices' data" if scene.metric == "slow_accuracy" else "")


def _finding(scene: Scene, ranked: Sequence[Standing], reference: str) -> str:
    """The outcome in a few sentences."""
    sentences = [f"No strategy reached {_target(scene)}."]
    never = [standing.entry.label for standing in ranked if not standing.reached]
    if ranked and ranked[0].reached:
        first = ranked[0]
        took = _SIGNS[first.costs["seconds"].bound] + amount("virtual_seconds", first.costs["seconds"].value)
        sentences = [f"{first.entry.label} is the first at {_target(scene)}, after {took}"]
        if first.entry.label != reference and math.isfinite(first.speedup.value):
            sentences[0] += (
                f": {_SIGNS[first.speedup.bound]}{digits(first.speedup.value)} times sooner than {reference}"
            )
        sentences[0] += "."
        if never:
            sentences.append(f"Never there: {', '.join(sorted(never, key=str.casefold))}.")
    if finals := [standing for standing in ranked if math.isfinite(standing.accuracy.value)]:
        best = max(finals, key=lambda standing: standing.accuracy.value)
        sentences.append(f"Most accurate at the end: {best.entry.label}, {best.accuracy.value:.1%}.")
    return " ".join(sentences)


# ------------------------------------------------------------ devices and their updates


def _work(observed: Sequence[tuple[Entry, Observed]], name: str) -> dict[str, Any] | None:
    found = [(entry, of_entry.work) for entry, of_entry in observed if of_entry.work]
    if not found:
        return None
    rows = [
        {"entry": entry, "jain": f"{work.jain:.3f}", "busiest": f"{work.busiest:.0%}", "idle": f"{work.idle:.0%}"}
        for entry, work in found
    ]
    return {"chart": device_charts.work(found, f"{name}-work"), "rows": rows}


def _mean_count(entry: Entry, fate: str) -> str:
    return f"{np.mean([run.row[fate] for run in entry.completed]):,.0f}"


def _staleness(observed: Sequence[tuple[Entry, Observed]], name: str) -> dict[str, Any] | None:
    found = [(entry, of_entry.staleness) for entry, of_entry in observed if of_entry.staleness]
    if not found:
        return None
    rows = [
        {"entry": entry, "median": f"{quantiles[2]:g}", "p95": f"{quantiles[4]:g}"}
        | {fate: _mean_count(entry, fate) for fate in ("folded", "discarded", "lost", "given_up")}
        for entry, quantiles in found
    ]
    return {"chart": device_charts.staleness(found, f"{name}-staleness"), "rows": rows}


def _weights(observed: Sequence[tuple[Entry, Observed]], name: str) -> str | None:
    found = [(entry, of_entry.weights) for entry, of_entry in observed if of_entry.weights]
    return device_charts.weights(found, f"{name}-weights") if found else None


def _gantt(observed: Sequence[tuple[Entry, Observed]], name: str) -> dict[str, Any] | None:
    found = [(entry, of_entry.gantt) for entry, of_entry in observed if of_entry.gantt]
    if not found:
        return None
    strips = [strip for _, strip in found]
    until = device_charts.gantt_until(strips)
    unit = unit_for("virtual_seconds", until)
    drawn = [
        (entry, device_charts.gantt(strip, until, unit, f"{name}-gantt-{entry.style}", f"Tasks under {entry.label}"))
        for entry, strip in found
    ]
    devices = max(int(strip.device.max()) + 1 for strip in strips)
    return {"strips": drawn, "outcomes": device_charts.outcomes(strips), "devices": devices}
