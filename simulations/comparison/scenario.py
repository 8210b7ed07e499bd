"""What a scenario says: a dataclass a table of its TOML file, each field with what is allowed. docs/comparison.md explains
them; `reading` makes them of a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedpace.simulations.tomlfile import (
    LARGE,
    Range,
    flag,
    free,
    number,
    one_of,
    positive,
    tables,
    text,
    texts,
    whole,
    wholes,
)

MOST_SEEDS = 2**32 - 1
ENDLESS = 10**9
"""Versions that no run makes: where a scenario names no number, time alone ends runs."""


@dataclass(frozen=True, slots=True)
class Limits:
    """When a run ends, whichever is first, and the accuracy that it is to reach."""

    virtual_seconds: float = positive(LARGE)
    versions: int = whole(ENDLESS, 1, ENDLESS)
    target: float = number(1.0, 0)


@dataclass(frozen=True, slots=True)
class App:
    """`[[apps]]`: the folder of an app, and how it is run."""

    name: str = text()
    folder: str = text()
    devices: int = whole(100, 1, 1_000_000)
    virtual_seconds: float = positive(LARGE)
    versions: int = whole(ENDLESS, 1, ENDLESS)
    target: float = number(1.0, 0)
    metric: str = one_of("accuracy", "slow_accuracy")
    executor: str = one_of("auto", "fused", "inline")
    steps: float = number(10.0, 0)
    config: Mapping[str, Any] = free()
    on: Mapping[str, Any] = free()

    def limits(self, fleet: str) -> Limits:
        """What holds on a fleet."""
        limits = Limits(self.virtual_seconds, self.versions, self.target)
        return dataclasses.replace(limits, **self.on.get(fleet, {}))


@dataclass(frozen=True, slots=True)
class Fleet:
    """`[[fleets]]`: a preset or a file."""

    name: str = text()
    fleet: str = text()


@dataclass(frozen=True, slots=True)
class Strategy:
    """`[[strategies]]`: a preset with settings, any of which may be a part by name."""

    name: str = text()
    preset: str = text()
    settings: Mapping[str, Any] = free()
    search: Mapping[str, Any] = free()
    tune: bool = flag(True)
    untuned: bool = flag(False)


@dataclass(frozen=True, slots=True)
class Tuning:
    """`[tuning]`: the search that every strategy gets alike."""

    seeds: tuple[int, ...] = wholes(0, MOST_SEEDS, "seeds")
    trials: int = whole(12, 1, 10_000)
    objective: str = one_of("seconds", "accuracy")
    fleets: tuple[str, ...] = texts("names of fleets")


@dataclass(frozen=True, slots=True)
class Quick:
    """`[quick]`: what of all this `--quick` runs; nothing named is everything, but of seeds the first five."""

    apps: tuple[str, ...] = texts("names of apps")
    fleets: tuple[str, ...] = texts("names of fleets")
    strategies: tuple[str, ...] = texts("names of strategies")
    seeds: tuple[int, ...] = wholes(0, MOST_SEEDS, "seeds")


@dataclass(frozen=True, slots=True)
class Scenario:
    """A scenario: apps x fleets x strategies x seeds."""

    description: str = text()
    seeds: tuple[int, ...] = wholes(0, MOST_SEEDS, "seeds")
    baseline: str = text()
    evaluations: int = whole(100, 1, 100_000)
    wall_seconds: float = positive(3600.0)
    settings: Mapping[str, Any] = free()
    search: Mapping[str, Any] = free()
    apps: tuple[App, ...] = tables(App)
    fleets: tuple[Fleet, ...] = tables(Fleet)
    strategies: tuple[Strategy, ...] = tables(Strategy)
    tuning: Tuning = field(default_factory=Tuning)
    quick: Quick = field(default_factory=Quick)

    def settings_of(self, strategy: Strategy) -> dict[str, Any]:
        """A strategy's settings before any tuning."""
        return _over(self.settings, strategy.settings)

    def space_of(self, strategy: Strategy) -> dict[str, Dimension]:
        """What is searched for a strategy, by the dotted name of the setting; nothing where it is not tuned."""
        return dimensions(_over(self.search, strategy.search)) if strategy.tune else {}

    @property
    def searched_fleets(self) -> tuple[Fleet, ...]:
        """The fleets that settings are searched on; what is found on the first of them is for all others."""
        return tuple(fleet for fleet in self.fleets if fleet.name in self.tuning.fleets) or self.fleets

    def shortened(self) -> Scenario:
        """The part of it that `--quick` runs."""
        quick = self.quick
        return dataclasses.replace(
            self,
            apps=_named(self.apps, quick.apps),
            fleets=_named(self.fleets, quick.fleets),
            strategies=_named(self.strategies, quick.strategies),
            seeds=quick.seeds or self.seeds[:5],
        )


SECTIONS: dict[str, type] = {"tuning": Tuning, "quick": Quick}


def _named(entries: tuple[Any, ...], names: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(entry for entry in entries if not names or entry.name in names)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """One table over another; `config` is one table of both."""
    merged = {**below, **above}
    if "config" in below and "config" in above:
        merged["config"] = {**below["config"], **above["config"]}
    return merged


# ------------------------------------------------------------ search spaces


@dataclass(frozen=True, slots=True)
class Dimension:
    """One setting that is searched: `choices`, or numbers from `low` to `high`."""

    path: tuple[str, ...]
    choices: tuple[Any, ...] = ()
    low: float | int = 0
    high: float | int = 0
    log: bool = False
    step: float | int | None = None

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def extremes(self) -> tuple[Any, ...]:
        return self.choices or (self.low, self.high)


def dimensions(table: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[str, Dimension]:
    """The dimensions of a `search` table, whose leaves are lists of choices, and tables with `low` and `high`.

    Raises ValueError with the path and a sentence for what is neither.
    """
    found: dict[str, Dimension] = {}
    for key, value in table.items():
        here = (*path, key)
        if isinstance(value, list) and value:
            found[".".join(here)] = Dimension(here, tuple(value))
        elif isinstance(value, dict) and "low" in value:
            found[".".join(here)] = _numbers(here, value)
        elif isinstance(value, dict) and value:
            found |= dimensions(value, here)
        else:
            raise ValueError(here, "write a list of choices, or { low = ..., high = ... } with log = true or a step")
    return found


def _numbers(path: tuple[str, ...], table: Mapping[str, Any]) -> Dimension:
    anything = Range(-LARGE, LARGE)
    if unknown := table.keys() - {"low", "high", "log", "step"}:
        raise ValueError(path, f"unknown key {min(unknown)!r}; known here: low, high, log, step")
    for key in ("low", "high", "step"):
        value = table.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or value not in anything:
            raise ValueError(path, f"{key} is {value!r}; write a number")
    low, high, log, step = table["low"], table.get("high"), table.get("log", False), table.get("step")
    if high is None or not low < high:
        raise ValueError(path, f"low is {low}, high {high}; low must be less")
    if not isinstance(log, bool) or (log and (low <= 0 or step is not None)):
        raise ValueError(path, "log is for numbers above 0, and goes without a step")
    if step is not None and not 0 < step <= high - low:
        raise ValueError(path, f"step is {step}; choose more than 0, and at most high - low")
    return Dimension(path, (), low, high, log, step)


def with_values(settings: Mapping[str, Any], values: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Settings with others in some places; a number in a path counts a list's entries from 0."""
    changed: Any = _copied(settings)
    for path, value in values.items():
        inner = changed
        for key in path[:-1]:
            inner = inner[int(key)] if isinstance(inner, list) else inner.setdefault(key, {})
        if isinstance(inner, list):
            inner[int(path[-1])] = value
        else:
            inner[path[-1]] = value
    result: dict[str, Any] = changed
    return result


def value_at(settings: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """What settings say in a place; None where nothing."""
    inner: Any = settings
    for key in path:
        if isinstance(inner, list):
            inner = inner[int(key)] if int(key) < len(inner) else None
        elif isinstance(inner, Mapping):
            inner = inner.get(key)
        else:
            return None
    return inner


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list | tuple) else value


def folder_of(path: Path, name: str) -> Path:
    """A path in a scenario, from its file on."""
    return (path.parent / Path(name).expanduser()).absolute()
