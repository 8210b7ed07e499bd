"""From a scenario's file to a checked `Scenario`: all that can be wrong is found before anything runs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpace.errors import ConfigError, FedpaceError
from fedpace.hosting.app import load_app_folder
from fedpace.hosting.config import flatten, merge_config
from fedpace.simulations.comparison.composing import ROLES, check_setting, make_strategy
from fedpace.simulations.comparison.scenario import (
    SECTIONS,
    App,
    Fleet,
    Limits,
    Scenario,
    Strategy,
    dimensions,
    folder_of,
    with_values,
)
from fedpace.simulations.fleets import load_fleet, preset_names
from fedpace.simulations.tomlfile import Place, TomlFile, fill, kind_of, read_toml
from fedpace.strategies import PRESETS

_NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
UNTUNED = "-untuned"
"""What follows a strategy's name in the folders of its untuned runs."""


def read_scenario(path: Path) -> Scenario:
    """The scenario of a TOML file; the folders and fleets in it are absolute paths, or names of presets.

    Raises ConfigError with one line that names the file, the line and the key.
    """
    file = read_toml(path)
    scenario: Scenario = fill(file, (), file.document, Scenario, SECTIONS)
    for key in ("seeds", "apps", "fleets", "strategies"):
        if not getattr(scenario, key):
            raise file.complain((key,), f"a scenario needs {'a list of them' if key == 'seeds' else f'[[{key}]]'}")
        if key != "seeds":
            _check_names(file, key, getattr(scenario, key))
    fleets = tuple(_fleet(file, n, entry) for n, entry in enumerate(scenario.fleets))
    apps = tuple(_app(file, n, entry, fleets) for n, entry in enumerate(scenario.apps))
    _check_fleets(file, fleets, apps)
    strategies = tuple(_strategy(file, scenario, n, entry) for n, entry in enumerate(scenario.strategies))
    scenario = dataclasses.replace(scenario, apps=apps, fleets=fleets, strategies=strategies)
    _check_together(file, scenario)
    return scenario


def _check_names(file: TomlFile, key: str, entries: Sequence[Any]) -> None:
    names: list[str] = []
    for n, entry in enumerate(entries):
        place = (key, n, "name")
        if not _NAME.fullmatch(entry.name) or entry.name.endswith(UNTUNED):
            raise file.complain(
                place,
                f"is {entry.name!r}; write letters, digits and _ . + -, not {UNTUNED} at the end: it names folders",
            )
        if entry.name in names:
            raise file.complain(place, f"{entry.name!r} is there twice")
        names.append(entry.name)


# ------------------------------------------------------------ apps and fleets


def _fleet(file: TomlFile, n: int, entry: Fleet) -> Fleet:
    name = entry.fleet or entry.name
    if name not in preset_names():
        if not name.endswith(".toml"):
            known = ", ".join(preset_names())
            raise file.complain(("fleets", n, "fleet"), f"there is no fleet {name!r}; name {known}, or a .toml file")
        name = str(folder_of(file.path, name))
    return dataclasses.replace(entry, fleet=name)


def _app(file: TomlFile, n: int, entry: App, fleets: Sequence[Fleet]) -> App:
    place: Place = ("apps", n)
    if not entry.folder:
        raise file.complain(place, 'has no folder; write folder = "...", that of a Flower app')
    folder = folder_of(file.path, entry.folder)
    try:
        found = load_app_folder(folder)
    except FedpaceError as error:
        raise file.complain((*place, "folder"), str(error).replace("--app takes", "write")) from None
    try:
        config = flatten(entry.config)
        merge_config(found.config, config, "config")
    except (ConfigError, ValueError) as error:
        wrong = next((key for key in entry.config if key in str(error)), "")
        raise file.complain((*place, "config", wrong), str(error)) from None
    known = [fleet.name for fleet in fleets]
    on = {}
    for name, table in entry.on.items():
        here: Place = (*place, "on", name)
        if name not in known:
            raise file.complain(here, f"there is no fleet of that name; there are {', '.join(known)}")
        if not isinstance(table, dict):
            raise file.complain(here, f"is {kind_of(table)}; write a table")
        limits = fill(file, here, table, Limits, {})
        on[name] = {key: getattr(limits, key) for key in table}
    if not all(_ends(dataclasses.replace(entry, on=on).limits(name)) for name in known):
        raise file.complain(place, "its runs have no end; write virtual_seconds, or versions")
    return dataclasses.replace(entry, folder=str(folder), config=config, on=on)


def _ends(limits: Limits) -> bool:
    return limits != dataclasses.replace(Limits(), target=limits.target)


def _check_fleets(file: TomlFile, fleets: Sequence[Fleet], apps: Sequence[App]) -> None:
    for n, fleet in enumerate(fleets):
        for devices in {app.devices for app in apps}:
            try:
                load_fleet(fleet.fleet, devices, 0)
            except ConfigError as error:
                raise file.complain(
                    ("fleets", n, "fleet" if fleet.fleet != fleet.name else "name"), str(error)
                ) from None


# ------------------------------------------------------------ strategies


def _strategy(file: TomlFile, scenario: Scenario, n: int, entry: Strategy) -> Strategy:
    """The strategy with its preset named; built once as it is, and once with each extreme value that is searched."""
    preset = entry.preset or (entry.name if entry.name in PRESETS else "FedAvg")
    known = ", ".join(PRESETS)
    if preset not in PRESETS:
        raise file.complain(("strategies", n, "preset"), f"there is no preset {preset!r}; there are {known}")
    if not entry.preset and entry.name not in PRESETS and not entry.settings.keys() & set(ROLES):
        raise file.complain(
            ("strategies", n, "name"),
            f"{entry.name!r} is no preset, and no part of it is named; write preset = one of {known}, or parts in settings",
        )
    entry = dataclasses.replace(entry, preset=preset)
    for place, table in ((("settings",), scenario.settings), (("strategies", n, "settings"), entry.settings)):
        _check_settings(file, place, preset, table)
    settings = scenario.settings_of(entry)
    try:
        make_strategy(preset, settings)
    except ConfigError as error:
        raise file.complain(("strategies", n), str(error)) from None
    for place, table in ((("search",), scenario.search), (("strategies", n, "search"), entry.search)):
        _check_search(file, place, preset, settings, table)
    return entry


def _check_settings(file: TomlFile, place: Place, preset: str, settings: Mapping[str, Any]) -> None:
    """Each setting by itself, so that the one that is wrong is named."""
    for key, value in settings.items():
        try:
            check_setting(preset, key)
            make_strategy(preset, {key: value})
        except ConfigError as error:
            if "cannot go with the other parts" not in str(error):  # what needs company is looked at with it
                raise file.complain((*place, key), str(error)) from None


def _check_search(
    file: TomlFile, place: Place, preset: str, settings: Mapping[str, Any], table: Mapping[str, Any]
) -> None:
    """Each end of each dimension, on top of the settings."""
    try:
        space = dimensions(table)
    except ValueError as error:
        path, sentence = error.args
        raise file.complain((*place, *path), sentence) from None
    for dimension in space.values():
        here = (*place, *dimension.path)
        try:
            check_setting(preset, dimension.path[0])
        except ConfigError as error:
            raise file.complain(here, str(error)) from None
        for value in dimension.extremes:
            try:
                make_strategy(preset, with_values(settings, {dimension.path: value}))
            except (ConfigError, LookupError, ValueError, AttributeError) as error:
                raise file.complain(here, f"cannot be {value!r}: {error}") from None


# ------------------------------------------------------------ what one thing allows of another


def _check_together(file: TomlFile, scenario: Scenario) -> None:
    names = [strategy.name for strategy in scenario.strategies]
    if not scenario.baseline:
        raise file.complain(("baseline",), "a scenario needs it: the strategy that the others are compared with")
    if scenario.baseline not in names:
        raise file.complain(("baseline",), f"there is no strategy {scenario.baseline!r}; there are {', '.join(names)}")
    quick, tuning = scenario.quick, scenario.tuning
    for section, key, entries in (
        ("quick", "apps", scenario.apps),
        ("quick", "fleets", scenario.fleets),
        ("quick", "strategies", scenario.strategies),
        ("tuning", "fleets", scenario.fleets),
    ):
        known = [entry.name for entry in entries]
        for name in getattr(getattr(scenario, section), key):
            if name not in known:
                raise file.complain((section, key), f"there is no {name!r}; there are {', '.join(known)}")
    if quick.strategies and scenario.baseline not in quick.strategies:
        raise file.complain(("quick", "strategies"), f"leaves out the baseline, {scenario.baseline!r}")
    for n, strategy in enumerate(scenario.strategies):
        if scenario.space_of(strategy) and not tuning.seeds:
            place = ("strategies", n, "search") if strategy.search else ("search",)
            raise file.complain(place, f"{strategy.name} is to be tuned, on no seeds; write them into [tuning]")
    for seeds_of, of_results in ((("seeds",), scenario.seeds), (("quick", "seeds"), quick.seeds)):
        if both := sorted(set(of_results) & set(tuning.seeds)):
            sentence = f"seed {both[0]} is one of those that strategies are tuned on; results need others"
            raise file.complain(seeds_of, sentence)
