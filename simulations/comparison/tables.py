"""The tables of a comparison: `summary.csv` and `failures.csv` for programs, `tables.md` for people.

`summary.csv` has a row for every app, fleet and strategy, and one for all apps together, whose app is `ALL`. Ratios are
the reference's cost over the strategy's: above 1 the strategy needs less.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from fedpace.hosting.files import write_atomically
from fedpace.simulations.comparison.results import read_rows
from fedpace.simulations.comparison.statistics import MEASURES, Estimate, Runs
from fedpace.simulations.progress import told_seconds

ALL = "(all)"
_ACCURACIES = ("final_accuracy", "final_slow_accuracy")
_RATIOS = {"seconds": "speedup", "device_seconds": "device_seconds_ratio", "bytes": "bytes_ratio"}
_SIGNS = {"": "", "at least": "≥ ", "at most": "≤ ", "unclear": "? "}
_HEADS = ("strategy", "arrived", "time", "times faster", "device time", "bytes", "accuracy", "on slow devices' data")
_RATIO_HEADS = ("times faster", "times less device time", "times fewer bytes")

Summary = dict[str, Any]


def write_tables(directory: Path, baseline: str) -> None:
    """Writes them from `runs.parquet`."""
    rows = read_rows(directory / "runs.parquet")
    summary = summarise(Runs(rows), baseline)
    failures = [row for row in rows if row["status"] != "completed"]
    names = ("app", "fleet", "strategy", "tuned", "seed", "status", "reason")
    _write_csv(directory / "summary.csv", summary)
    _write_csv(directory / "failures.csv", [{name: row[name] for name in names} for row in failures], names)
    write_atomically(directory / "tables.md", _markdown(summary, failures, baseline).encode())


def summarise(runs: Runs, baseline: str) -> list[Summary]:
    """The rows of `summary.csv`."""
    reference = runs.variant(baseline)
    rows = []
    for fleet in runs.fleets:
        for strategy in runs.strategies:
            apps = [app for app in runs.apps if runs.of(app, fleet, strategy)]
            rows += [_summary(runs, app, [app], fleet, strategy, reference) for app in apps]
            if apps:
                rows.append(_summary(runs, ALL, apps, fleet, strategy, reference))
    return rows


def _summary(
    runs: Runs, app: str, apps: Sequence[str], fleet: str, strategy: tuple[str, bool], reference: tuple[str, bool]
) -> Summary:
    of = [run for each in apps for run in runs.of(each, fleet, strategy).values()]
    row: Summary = {
        "app": app,
        "fleet": fleet,
        "strategy": strategy[0],
        "tuned": strategy[1],
        "runs": len(of),
        "reached": sum(not math.isnan(run["seconds_to_target"]) for run in of),
        "failed": sum(run["status"] != "completed" for run in of),
        "reference": reference[0],
    }
    for measure, name in _RATIOS.items():
        row |= _columns(name, runs.speedup(strategy, reference, fleet, apps, measure), bound=True)
    if app == ALL:
        return row
    row |= {"target": of[0]["target"], "metric": of[0]["metric"]}
    for measure in MEASURES:
        row |= _columns(f"{measure}_to_target", runs.costs(app, fleet, strategy, measure), bound=True)
    for name in _ACCURACIES:
        row |= _columns(name, runs.mean(app, fleet, strategy, name))
    return row


def _columns(name: str, estimate: Estimate, *, bound: bool = False) -> Summary:
    columns: Summary = {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return {**columns, f"{name}_bound": estimate.bound} if bound else columns


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]], names: Sequence[str] = ()) -> None:
    names = names or list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: "" if _is_nan(value) else value for name, value in row.items()})
    write_atomically(path, text.getvalue().encode())


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


# ------------------------------------------------------------ for people


def label(row: Mapping[str, Any], summary: Sequence[Summary]) -> str:
    """A strategy's name; of one that has tuned runs too, with what its others are."""
    both = any(other["strategy"] == row["strategy"] and other["tuned"] and not row["tuned"] for other in summary)
    return f"{row['strategy']} (untuned)" if both else str(row["strategy"])


def _markdown(summary: Sequence[Summary], failures: Sequence[Mapping[str, Any]], baseline: str) -> str:
    lines = ["# Comparison", ""]
    apps = sorted({row["app"] for row in summary}, key=lambda name: (name == ALL, name))
    for fleet in sorted({row["fleet"] for row in summary}):
        lines += [f"## Fleet {fleet}", ""]
        for app in apps:
            rows = [row for row in summary if row["fleet"] == fleet and row["app"] == app]
            if not rows or (app == ALL and len(apps) == 2):
                continue
            if app == ALL:
                lines += [f"### All apps: geometric means of {baseline}'s cost over each strategy's", ""]
            else:
                metric = "" if rows[0]["metric"] == "accuracy" else " on slow devices' data"
                lines += [f"### {app}: to accuracy {rows[0]['target']:g}{metric}", ""]
            lines += _table(rows, summary)
    if failures:
        lines += ["## Runs that did not end well", ""]
        lines += _grid(
            ("app", "fleet", "strategy", "seed", "", "reason"),
            [
                (run["app"], run["fleet"], label(run, summary), str(run["seed"]), run["status"], run["reason"])
                for run in failures
            ],
        )
    lines += [
        "Times, ratios and accuracies are means over seeds, the first two geometric, with 95 % bootstrap intervals over",
        "seeds. ≥ and ≤ mark what is a bound, since runs did not arrive: they count as what they had spent at their end.",
        "",
    ]
    return "\n".join(lines)


def _best_first(rows: Iterable[Summary]) -> list[Summary]:
    return sorted(rows, key=lambda row: (_is_nan(row["speedup"]), -row["speedup"], row["strategy"], row["tuned"]))


def _table(rows: Sequence[Summary], summary: Sequence[Summary]) -> list[str]:
    heads = _HEADS if rows[0]["app"] != ALL else ("strategy", "arrived", *_RATIO_HEADS)
    cells = []
    for row in _best_first(rows):
        told = [label(row, summary), f"{row['reached']}/{row['runs']}"]
        if row["app"] == ALL:
            told += [_told(row, name) for name in _RATIOS.values()]
        else:
            told += [
                _with_sign(row, "seconds_to_target", told_seconds),
                _told(row, "speedup"),
                _with_sign(row, "device_seconds_to_target", told_seconds),
                _with_sign(row, "bytes_to_target", _told_bytes),
                *(_percent(row, name) for name in _ACCURACIES),
            ]
        cells.append(told)
    return _grid(heads, cells)


def _grid(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in (heads, ["---"] * len(heads), *escaped)] + [""]


def _with_sign(row: Summary, name: str, told: Any) -> str:
    value = row[name]
    return "" if _is_nan(value) else f"{_SIGNS[row[f'{name}_bound']]}{told(value)}"


def _told(row: Summary, name: str) -> str:
    """A ratio and its interval."""
    value, low, high = row[name], row[f"{name}_low"], row[f"{name}_high"]
    if _is_nan(value):
        return ""
    interval = "" if _is_nan(low) else f" ({low:.2f} to {high:.2f})"
    return f"{_SIGNS[row[f'{name}_bound']]}{value:.2f}{interval}"


def _percent(row: Summary, name: str) -> str:
    value, low, high = row[name], row[f"{name}_low"], row[f"{name}_high"]
    if _is_nan(value):
        return ""
    return f"{value:.3f}" if _is_nan(low) else f"{value:.3f} ({low:.3f} to {high:.3f})"


def _told_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def summary_table(directory: Path) -> Table:
    """What a terminal shows: all apps together."""
    table = Table("fleet", "strategy", "arrived", *_RATIO_HEADS)
    with (directory / "summary.csv").open(newline="") as file:
        rows: list[Summary] = [_numbers(row) for row in csv.DictReader(file)]
    for row in sorted(_best_first(row for row in rows if row["app"] == ALL), key=lambda row: row["fleet"]):
        table.add_row(
            row["fleet"],
            label(row, rows),
            f"{row['reached']}/{row['runs']}",
            *(_told(row, name) for name in _RATIOS.values()),
        )
    return table


def _numbers(row: Mapping[str, str]) -> Summary:
    plain: Summary = {**row, "tuned": row["tuned"] == "True"}
    for name in _RATIOS.values():
        for column in (name, f"{name}_low", f"{name}_high"):
            plain[column] = float(row[column] or "nan")
    return plain
