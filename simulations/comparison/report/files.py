"""The files of a comparison as the report reads them: scenes (an app on a fleet), their entries (strategies), their runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpace.errors import ConfigError
from fedpace.simulations.comparison.results import read_rows
from fedpace.simulations.comparison.runs import run_folder
from fedpace.simulations.comparison.statistics import Floats, Row

COSTS = ("virtual_seconds", "device_seconds", "bytes")
"""What accuracy is shown over; names of `Run.evaluations`."""


@dataclass(frozen=True)
class Gantt:
    """The first tasks of up to a hundred devices, an element a task: when it was sent, when it ended, and how."""

    device: NDArray[np.int64]  # 0 is the fastest of those shown
    start: Floats  # virtual seconds
    end: Floats
    outcome: NDArray[np.str_]


@dataclass(frozen=True)
class Details:
    """What a run noted of its devices and updates; `details.npz`. Any array may be empty."""

    tasks: Floats  # per device
    speed: Floats  # per device, relative
    staleness: Floats  # per folded update, in versions
    weights: Floats  # per folded update
    weight_speed: Floats  # per folded update: its device's speed
    gantt: Gantt


@dataclass(frozen=True)
class Run:
    """One seed of one entry: its row of `runs.parquet`, its evaluations by version, and the folder it wrote."""

    row: Row
    evaluations: Mapping[str, Floats]
    folder: Path

    @property
    def completed(self) -> bool:
        return bool(self.row["status"] == "completed")

    def read_details(self) -> Details | None:
        """None for a run that left none, as one that failed early does."""
        path = self.folder / "details.npz"
        if not path.is_file():
            return None
        with np.load(path, allow_pickle=False) as file:
            floats = ("tasks_per_device", "device_speed", "staleness", "weights", "weight_speed")
            gantt = Gantt(
                file["gantt_device"].astype(np.int64),
                file["gantt_start"].astype(np.float64),
                file["gantt_end"].astype(np.float64),
                file["gantt_outcome"].astype(np.str_),
            )
            tasks, speed, staleness, weights, of_update = (file[name].astype(np.float64) for name in floats)
        return Details(tasks, speed, staleness, weights, of_update, gantt)


@dataclass(frozen=True)
class Entry:
    """A strategy in a scene, with all its seeds. `style` is its place among all strategies: its colour everywhere."""

    strategy: str
    tuned: bool
    label: str
    style: str
    runs: Sequence[Run]

    @property
    def completed(self) -> list[Run]:
        return [run for run in self.runs if run.completed]

    def read_details(self) -> list[Details]:
        """Of the completed runs; large, so not kept."""
        return [details for run in self.completed if (details := run.read_details()) is not None]


@dataclass(frozen=True)
class Scene:
    """An app on a fleet."""

    app: str
    fleet: str
    entries: Sequence[Entry]

    @property
    def title(self) -> str:
        return f"{self.app} on {self.fleet}"

    @property
    def metric(self) -> str:
        """The accuracy that the target is of: "accuracy" or "slow_accuracy"."""
        return str(self.entries[0].runs[0].row["metric"])

    @property
    def target(self) -> float:
        return float(self.entries[0].runs[0].row["target"])

    @property
    def has_slow(self) -> bool:
        return any(np.isfinite(run.evaluations["slow_accuracy"]).any() for entry in self.entries for run in entry.runs)


def read_scenes(directory: Path) -> list[Scene]:
    """The scenes of a comparison, sorted by app and fleet.

    Raises ConfigError where a table is missing or holds no run.
    """
    runs = read_table(directory, "runs")
    if not runs:
        raise ConfigError(f"{directory / 'runs.parquet'} holds no run: let `fedpace compare` finish at least one.")
    evaluations: dict[tuple[Any, ...], list[Row]] = {}
    for row in read_table(directory, "results"):
        evaluations.setdefault(_run_key(row), []).append(row)
    names = sorted({run["strategy"] for run in runs}, key=str.casefold)
    both = {name for name in names if len({run["tuned"] for run in runs if run["strategy"] == name}) == 2}
    scenes = []
    for (app, fleet), of_scene in groupby(sorted(runs, key=_run_key), lambda row: (row["app"], row["fleet"])):
        entries = []
        for (name, tuned), rows in groupby(of_scene, lambda row: (row["strategy"], row["tuned"])):
            untuned = name in both and not tuned
            found = [_run(directory, row, evaluations.get(_run_key(row), [])) for row in rows]
            style = f"s{names.index(name)}" + "u" * untuned
            entries.append(Entry(name, tuned, name + " (untuned)" * untuned, style, found))
        scenes.append(Scene(app, fleet, entries))
    return scenes


def read_description(directory: Path) -> str:
    """What the scenario says of itself; nothing where it is not there."""
    path = directory / "scenario.json"
    return str(json.loads(path.read_text(encoding="utf-8")).get("description", "")) if path.is_file() else ""


def read_table(directory: Path, name: str) -> list[dict[str, Any]]:
    """The rows of `NAME.parquet`. Raises ConfigError where there is none."""
    path = directory / f"{name}.parquet"
    if not path.is_file():
        raise ConfigError(f"{path} is missing: {directory} is no folder that `fedpace compare` finished.")
    return read_rows(path)


def _run_key(row: Row) -> tuple[Any, ...]:
    """A run's place: tuned before untuned."""
    return (row["app"], row["fleet"], row["strategy"].casefold(), row["strategy"], not row["tuned"], row["seed"])


def _run(directory: Path, row: Row, rows: Sequence[Row]) -> Run:
    rows = sorted(rows, key=lambda row: row["version"])
    names = ("version", "virtual_seconds", "device_seconds", "accuracy", "slow_accuracy")
    columns = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in names}
    columns["bytes"] = np.array([row["bytes_up"] + row["bytes_down"] for row in rows], dtype=np.float64)
    names = ("app", "fleet", "strategy", "tuned", "seed")
    return Run(row, columns, run_folder(directory, *(row[name] for name in names)))
