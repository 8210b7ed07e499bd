"""`--run-config` and `--node-config`: keys and TOML values, as Flower's command line takes them."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedpace.errors import ConfigError

Config = dict[str, bool | int | float | str]
"""Flower's UserConfig: flat, nested tables joined with dots."""

_PAIR = re.compile(r"""\s*([^\s=]+)\s*=\s*("(?:[^"\\]|\\.)*"|'[^']*'|\S+)\s*""")


def flatten(table: Mapping[str, Any], prefix: str = "") -> Config:
    """Joins the keys of nested tables with dots. Raises ValueError for a value Flower does not take."""
    flat: Config = {}
    for key, value in table.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= flatten(value, f"{name}.")
        elif isinstance(value, bool | int | float | str):
            flat[name] = value
        else:
            kind = type(value).__name__
            raise ValueError(f"{name} is a {kind}; a config takes numbers, text, true and false")  # noqa: TRY004 - a value in a file
    return flat


def parse_config(text: str, option: str) -> Config:
    """Reads `'lr=0.1 name="x"'`, or the name of a .toml file. Raises ConfigError that names the option."""
    text = text.strip()
    if text.endswith(".toml") and "=" not in text:
        return _parse_file(Path(text).expanduser(), option)
    config: Config = {}
    position = 0
    while position < len(text):
        match = _PAIR.match(text, position)
        if match is None:
            raise ConfigError(f"{option}: cannot read {text[position:]!r}; write key=value, apart by blanks")
        key, value = match.groups()
        try:
            found = flatten(tomllib.loads(f"{key} = {value}"))
        except (tomllib.TOMLDecodeError, ValueError):
            hint = f'; text goes in quotes: {key}="{value}"' if re.fullmatch(r"[\w./-]+", value) else ""
            raise ConfigError(f"{option}: {key}={value} is not a TOML value{hint}") from None
        if twice := config.keys() & found.keys():
            raise ConfigError(f"{option}: {twice.pop()!r} is there twice")
        config |= found
        position = match.end()
    return config


def _parse_file(path: Path, option: str) -> Config:
    try:
        return flatten(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"{option}: {path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # not TOML, not UTF-8, or no value of a config
        raise ConfigError(f"{option}: {path}: {error}") from None


def merge_config(defaults: Config, overrides: Config, option: str) -> Config:
    """The app's defaults with what the command line says. Raises ConfigError for a key the app does not have."""
    for key in overrides:
        if key not in defaults:
            known = ", ".join(sorted(defaults)) or "none"
            raise ConfigError(f"{option}: the app has no key {key!r} in [tool.flwr.app.config]; it has {known}")
    return defaults | overrides
