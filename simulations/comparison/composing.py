"""Strategies that a scenario writes out: a preset's name, its settings, and parts by name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from fedpace.errors import ConfigError
from fedpace.strategies import PRESETS, compensators, folders, gates, optimisers, planners, selectors, weighers
from fedpace.strategies.presets import Preset, Settings

_MODULES: tuple[ModuleType, ...] = (selectors, planners, gates, weighers, compensators, folders, optimisers)
_OURS = {
    "evaluate_every": "the scenario's `evaluations` says when models are evaluated",
    "seed": "the scenario's `seeds` are those of runs",
    "directory": "the comparison keeps what it needs",
    "validation_fn": "a function cannot be written in a file",
}
"""Settings that a scenario may not name, and why."""


def _parts() -> dict[str, type]:
    found: dict[str, type] = {}
    for module in _MODULES:
        for name, part in vars(module).items():
            if inspect.isclass(part) and part.__module__.startswith(module.__name__) and dataclasses.is_dataclass(part):
                found[name] = part
    return found


PARTS: dict[str, type] = _parts()
"""Every part by name."""

ROLES = ("selector", "planner", "gate", "weighers", "compensators", "folder", "optimiser")


def check_setting(preset: str, key: str) -> None:
    """Raises ConfigError for a setting that the preset does not have, or that is not the scenario's to make."""
    if key in _OURS:
        raise ConfigError(f"not in a comparison: {_OURS[key]}")
    own = [name for name in inspect.signature(PRESETS[preset]).parameters if name != "settings"]
    known = [*own, *(name for name in Settings.__annotations__ if name not in _OURS)]
    if key not in known:
        raise ConfigError(f"{preset} has no such setting; there are {', '.join(known)}")


def defaults_of(preset: str) -> dict[str, Any]:
    """A preset's own arguments as it has them by itself."""
    parameters = inspect.signature(PRESETS[preset]).parameters.values()
    return {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}


def make_strategy(preset: str, settings: Mapping[str, Any]) -> Preset:
    """The strategy; devices evaluate nothing unless the settings say so. Raises ConfigError for what cannot be."""
    made = {key: _made(value) if key in ROLES else value for key, value in settings.items()}
    try:
        return PRESETS[preset](**{"fraction_evaluate": 0.0, **made})
    except (TypeError, ValueError) as error:  # a text where a number belongs
        raise ConfigError(str(error)) from None


def _made(value: Any) -> Any:
    """A part of what is written: its name, or a table with its name as `part`; a list of parts as a tuple."""
    if isinstance(value, str):
        return _part(value, {})
    if isinstance(value, list | tuple):
        return tuple(_made(item) for item in value)
    if not isinstance(value, Mapping) or "part" not in value:
        raise ConfigError('write a part by name, "Uniform", or with its numbers, { part = "Arrivals", k = 4 }')
    given = {key: item for key, item in value.items() if key != "part"}
    return _part(value["part"], given)


def _part(name: Any, given: Mapping[str, Any]) -> Any:
    if name not in PARTS:
        raise ConfigError(f"there is no part {name!r}; there are {', '.join(sorted(PARTS))}")
    kind: Any = PARTS[name]
    known = [each.name for each in dataclasses.fields(kind) if each.init]
    if unknown := given.keys() - known:
        raise ConfigError(f"{name} has no {min(unknown)!r}; it has {', '.join(known) or 'nothing to set'}")
    inner = {key: _made(item) if isinstance(item, Mapping) and "part" in item else item for key, item in given.items()}
    if name == "Absolute" and isinstance(inner.get("weigher"), str):
        inner["weigher"] = _made(inner["weigher"])
    try:
        return kind(**inner)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: {error}") from None
