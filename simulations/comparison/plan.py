"""From a scenario to the specs of its runs."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedpace.hosting.app import load_app_folder
from fedpace.simulations.comparison.runs import RunSpec
from fedpace.simulations.comparison.scenario import App, Fleet, Scenario, Strategy, with_values
from fedpace.simulations.fleets.reading import read_settings


def spec_of(
    scenario: Scenario,
    app: App,
    fleet: Fleet,
    strategy: Strategy,
    seed: int,
    values: Mapping[str, Any] | None = None,
    *,
    trial: int | None = None,
) -> RunSpec:
    """One run. `values` are what a search found for the strategy's dimensions, by name; without them it is untuned. A
    `trial` for the time to the target ends there."""
    settings = scenario.settings_of(strategy)
    if values:
        settings = with_values(settings, {tuple(name.split(".")): value for name, value in values.items()})
    limits = app.limits(fleet.name)
    path, digest = _fleet_digest(fleet.fleet)
    return RunSpec(
        app=app.name,
        fleet=fleet.name,
        strategy=strategy.name,
        tuned=values is not None,
        seed=seed,
        trial=trial,
        folder=app.folder,
        app_sha256=_app_digest(app.folder),
        devices=app.devices,
        executor=app.executor,
        steps=app.steps,
        config=dict(app.config),
        fleet_file=path,
        fleet_sha256=digest,
        preset=strategy.preset,
        settings=settings,
        virtual_seconds=limits.virtual_seconds,
        versions=limits.versions,
        evaluations=scenario.evaluations,
        metric=app.metric,
        stop_at=limits.target if trial is not None and scenario.tuning.objective == "seconds" else None,
        wall_seconds=scenario.wall_seconds,
    )


@functools.cache
def _app_digest(folder: str) -> str:
    return load_app_folder(Path(folder)).sha256


@functools.cache
def _fleet_digest(name_or_path: str) -> tuple[str, str]:
    """A fleet's name or file, and a digest of that file and of those it names."""
    path, settings = read_settings(name_or_path)
    found = hashlib.sha256(path.read_bytes())
    for name in (settings.compute.file, settings.availability.file):
        if name:
            found.update((path.parent / Path(name).expanduser()).read_bytes())
    return name_or_path, found.hexdigest()
