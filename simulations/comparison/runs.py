"""Runs of a comparison: what each is, where it lies, and what became of it.

A run is a folder, `runs/APP/FLEET/STRATEGY[-untuned]/SEED/`, that is there as a whole or not at all. Its `run.json` holds
the `RunSpec` it was made by: a run of another spec is not the same run, and is made again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from fedpace.hosting.outputs import to_json
from fedpace.simulations.comparison.reading import UNTUNED

PARTIAL = ".partial"
"""The folder within a comparison's where runs are until they are whole."""

COLUMNS: dict[str, type] = {
    "version": int,
    "virtual_seconds": float,
    "device_seconds": float,
    "bytes_up": int,
    "bytes_down": int,
    "folded": int,
    "accuracy": float,
    "loss": float,
    "slow_accuracy": float,
}
"""Of each evaluation."""


@dataclass(frozen=True, slots=True)
class RunSpec:
    """All that a run is determined by; plain values. `trial` is its number in a search, None for a result.

    With `stop_at` it ends once `metric` is as high.
    """

    app: str
    fleet: str
    strategy: str
    tuned: bool
    seed: int
    trial: int | None
    folder: str
    app_sha256: str
    devices: int
    executor: str
    steps: float
    config: Mapping[str, Any]
    fleet_file: str
    fleet_sha256: str
    preset: str
    settings: Mapping[str, Any]
    virtual_seconds: float
    versions: int
    evaluations: int
    metric: str
    stop_at: float | None
    wall_seconds: float

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Self:
        return cls(**plain)

    def to_plain(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def identity(self) -> str:
        """Equal for runs that are the same."""
        return json.dumps({**self.to_plain(), "wall_seconds": 0}, sort_keys=True)

    @property
    def app_key(self) -> str:
        """Equal for runs that can share a process with the app prepared."""
        return json.dumps(
            [self.folder, self.devices, self.executor, self.steps, self.config, self.seed], sort_keys=True
        )

    def where(self, directory: Path) -> Path:
        """Its folder."""
        if self.trial is None:
            return run_folder(directory, self.app, self.fleet, self.strategy, self.tuned, self.seed)
        return directory / "trials" / self.app / self.fleet / self.strategy / f"{self.trial:04d}" / str(self.seed)

    def __str__(self) -> str:
        trial = "" if self.trial is None else f" trial {self.trial}"
        kind = self.strategy if self.tuned or self.trial is not None else f"{self.strategy}{UNTUNED}"
        return f"{self.app} {self.fleet} {kind}{trial} seed {self.seed}"


def run_folder(directory: Path, app: str, fleet: str, strategy: str, tuned: bool, seed: int) -> Path:
    """Where a run of a result lies."""
    return directory / "runs" / app / fleet / (strategy if tuned else f"{strategy}{UNTUNED}") / str(seed)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a run. `status` is completed, diverged or failed; `evaluations` a list a name of `COLUMNS`.

    Seconds of devices and bytes are all that were spent; `lost` tasks failed or expired, `given_up` ones were called off.
    """

    status: str
    reason: str = ""
    virtual_seconds: float = 0.0
    device_seconds: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    folded: int = 0
    discarded: int = 0
    lost: int = 0
    given_up: int = 0
    wall_seconds: float = 0.0
    evaluations: Mapping[str, Sequence[Any]] = field(default_factory=lambda: {name: [] for name in COLUMNS})

    def first_reaching(self, metric: str, target: float) -> int | None:
        """Which evaluation is the first with as much; None if none is."""
        return next((n for n, value in enumerate(self.evaluations[metric]) if value >= target), None)

    def final(self, metric: str) -> float:
        """The mean over the last tenth of the run's time, or the last value; NaN without evaluations."""
        values, times = self.evaluations[metric], self.evaluations["virtual_seconds"]
        if not values:
            return math.nan
        late = [value for value, at in zip(values, times, strict=True) if at >= 0.9 * self.virtual_seconds]
        late = [value for value in late if not math.isnan(value)] or [values[-1]]
        return math.fsum(late) / len(late)


@dataclass(frozen=True, slots=True)
class Run:
    """A run of a result, and the accuracy that it was to reach."""

    spec: RunSpec
    outcome: Outcome
    target: float


def write_run(folder: Path, spec: RunSpec, outcome: Outcome) -> None:
    """Writes `run.json`."""
    plain = {"spec": spec.to_plain(), **dataclasses.asdict(outcome)}
    (folder / "run.json").write_text(to_json(plain) + "\n")


def read_run(directory: Path, spec: RunSpec) -> Outcome | None:
    """What became of a run; None if it has not been made, or as something else."""
    try:
        plain = json.loads((spec.where(directory) / "run.json").read_text())
        made = RunSpec.from_plain(plain.pop("spec"))
    except (FileNotFoundError, NotADirectoryError, TypeError, KeyError, ValueError):
        return None
    if made.identity != spec.identity:
        return None
    evaluations = plain["evaluations"]
    for name, kind in COLUMNS.items():
        if kind is float:
            evaluations[name] = [math.nan if value is None else float(value) for value in evaluations[name]]
    return Outcome(**plain)


def partial_folder(directory: Path, spec: RunSpec) -> Path:
    """An empty folder for a run that is still to be whole."""
    path = directory / PARTIAL / hashlib.sha256(spec.identity.encode()).hexdigest()[:16]
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def keep(partial: Path, directory: Path, spec: RunSpec) -> None:
    """Makes a whole run of a folder, in the place of what was there."""
    final = spec.where(directory)
    final.parent.mkdir(parents=True, exist_ok=True)
    for path in partial.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if final.exists():
        old = partial.with_name(f"{partial.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        partial.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        partial.rename(final)
