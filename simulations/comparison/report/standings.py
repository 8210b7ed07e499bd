"""How entries stand in a scene: the rows of `summary.csv`, which `tables` makes, soonest at the target first."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedpace.errors import ConfigError
from fedpace.simulations.comparison.report.files import Entry, Scene
from fedpace.simulations.comparison.statistics import MEASURES, Estimate
from fedpace.simulations.comparison.tables import ALL

Row = Mapping[str, str]


@dataclass(frozen=True)
class Standing:
    """Of an entry in a scene; of all apps together, where `costs` and the accuracies are empty."""

    entry: Entry
    reached: int
    runs: int
    costs: Mapping[str, Estimate]  # until the target: seconds, device_seconds, bytes
    speedup: Estimate  # times sooner at the target than the reference
    accuracy: Estimate
    slow_accuracy: Estimate


class Standings:
    """`summary.csv`."""

    def __init__(self, directory: Path) -> None:
        """Raises ConfigError where there is none."""
        path = directory / "summary.csv"
        if not path.is_file():
            raise ConfigError(f"{path} is missing: {directory} is no folder that `fedpace compare` finished.")
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        self._rows = {(row["app"], row["fleet"], row["strategy"], row["tuned"] == "True"): row for row in rows}
        self.reference = rows[0]["reference"] if rows else ""

    def of(self, scene: Scene) -> list[Standing]:
        """Soonest first; those that never arrived last, the more accurate before."""
        found = self._find(scene.app, scene.fleet, scene.entries)
        return sorted(found, key=lambda standing: (standing.reached == 0, _place(standing)))

    def of_all_apps(self, fleet: str, entries: Sequence[Entry]) -> list[Standing]:
        """Geometric means over apps, in the order given."""
        return self._find(ALL, fleet, entries)

    def _find(self, app: str, fleet: str, entries: Sequence[Entry]) -> list[Standing]:
        keys = [(entry, (app, fleet, entry.strategy, entry.tuned)) for entry in entries]
        return [_standing(entry, self._rows[key]) for entry, key in keys if key in self._rows]


def _standing(entry: Entry, row: Row) -> Standing:
    return Standing(
        entry,
        int(row["reached"]),
        int(row["runs"]),
        {measure: _estimate(row, f"{measure}_to_target") for measure in MEASURES},
        _estimate(row, "speedup"),
        _estimate(row, "final_accuracy"),
        _estimate(row, "final_slow_accuracy"),
    )


def _estimate(row: Row, name: str) -> Estimate:
    value, low, high = (float(row.get(column) or math.nan) for column in (name, f"{name}_low", f"{name}_high"))
    return Estimate(value, low, high, row.get(f"{name}_bound", ""))


def _place(standing: Standing) -> float:
    """Less is better."""
    place = standing.costs["seconds"].value if standing.reached else -standing.accuracy.value
    return math.inf if math.isnan(place) else place
