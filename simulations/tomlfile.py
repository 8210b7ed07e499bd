"""TOML files that become checked dataclasses: what is wrong is named with its file, its line and its key.

A dataclass says with `number`, `whole`, `one_of` and the others below what each of its fields may be.
"""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedpace.errors import ConfigError

INF = math.inf
LARGE = 1e12
"""What no finite number in a file exceeds."""

_HEADER = re.compile(r"\s*(\[\[?)([^\]]+)\]")
_KEY = re.compile(r"\s*([\w\-.\"' ]+?)\s*=")

Place = tuple[str | int, ...]
"""Where something is in a document: keys, and from 0 on the numbers of an array's tables."""


# ------------------------------------------------------------ what a field may be


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`, both included; `low` itself is not if `above_low`. An infinite `high` allows `inf`."""

    low: float
    high: float
    above_low: bool = False

    def __contains__(self, number: float) -> bool:
        above = self.low < number if self.above_low else self.low <= number
        return above and (number <= min(self.high, LARGE) or number == self.high)

    def __str__(self) -> str:
        low = f"{'more than' if self.above_low else 'at least'} {self.low:g}"
        return f"a number, {low}, at most {min(self.high, LARGE):g}{', or inf' if math.isinf(self.high) else ''}"


@dataclass(frozen=True, slots=True)
class ListOf:
    """A list of such values, each once."""

    item: Any
    named: str


def number(default: float, low: float, high: float = LARGE, models: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"allowed": Range(low, high), "models": models})


def positive(default: float, high: float = LARGE, models: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"allowed": Range(0, high, above_low=True), "models": models})


def whole(default: int, low: int, high: int, models: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"allowed": range(low, high + 1), "models": models})


def one_of(*names: str) -> Any:
    """One of these names, by default the first."""
    return field(default=names[0], metadata={"allowed": names})


def text(models: tuple[str, ...] = ()) -> Any:
    return field(default="", metadata={"allowed": str, "models": models})


def flag(default: bool) -> Any:
    return field(default=default, metadata={"allowed": bool})


def texts(named: str) -> Any:
    return field(default=(), metadata={"allowed": ListOf(str, named)})


def wholes(low: int, high: int, named: str) -> Any:
    return field(default=(), metadata={"allowed": ListOf(range(low, high + 1), named)})


def tables(kind: type, models: tuple[str, ...] = ()) -> Any:
    """An array of tables, `[[...]]`, each a `kind`."""
    return field(default=(), metadata={"allowed": kind, "models": models})


def free() -> Any:
    """A table whose keys are somebody else's."""
    return field(default_factory=dict, metadata={"allowed": dict})


# ------------------------------------------------------------ the file


@dataclass(frozen=True)
class TomlFile:
    """A TOML file as it was read: complaints say where in it."""

    path: Path
    text: str
    document: Mapping[str, Any]

    def complain(self, place: Place, sentence: str) -> ConfigError:
        """An error that names the file, the line where the place can be found, and the key."""
        line = self.line(place)
        name = "".join(f"[{part + 1}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
        return ConfigError(f"{self.path}{f':{line}' if line else ''}: {name}: {sentence}")

    def line(self, wanted: Place) -> int | None:
        """Where a key is, or the first within it; else the last line of what should hold it."""
        counts: dict[Place, int] = {}
        table: Place = ()
        holder, depth = None, 0
        for number, line in enumerate(self.text.splitlines(), 1):
            if header := _HEADER.match(line):
                table = _numbered(_parts(header[2]), counts, new=header[1] == "[[")
                here = table
            elif key := _KEY.match(line):
                here = (*table, *_parts(key[1]))
            else:
                continue
            if here[: len(wanted)] == wanted:
                return number
            if depth <= len(here) < len(wanted) and wanted[: len(here)] == here:
                holder, depth = number, len(here)
        return holder


def _numbered(names: Place, counts: dict[Place, int], *, new: bool) -> Place:
    """The place that a header names; a `new` table of an array is counted."""
    place: Place = ()
    for depth, name in enumerate(names, 1):
        place = (*place, name)
        if new and depth == len(names):
            counts[place] = counts.get(place, -1) + 1
        if place in counts:
            place = (*place, counts[place])
    return place


def _parts(dotted: str) -> Place:
    """A dotted key of TOML, without spaces and quotes around its parts."""
    return tuple(part.strip(" \t\"'") for part in dotted.split("."))


def read_toml(path: Path) -> TomlFile:
    """Raises ConfigError for a file that cannot be read, or is not TOML."""
    try:
        content = path.read_text(encoding="utf-8")
        return TomlFile(path, content, tomllib.loads(content))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # not TOML, or not UTF-8
        raise ConfigError(f"{path}: {error}") from None


def fill(file: TomlFile, place: Place, table: Mapping[str, Any], kind: type, sections: Mapping[str, type]) -> Any:
    """A `kind` of what a table says. `sections` are tables within it that are dataclasses too.

    Raises ConfigError for an unknown key, and a value that may not be.
    """
    fields = {each.name: each for each in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        here = (*place, key)
        if key not in fields:
            raise file.complain(here, f"unknown key; known here: {', '.join(fields)}")
        if not place and key in sections:
            if not isinstance(value, dict):
                raise file.complain(here, f"is {kind_of(value)}; write a table, [{key}]")
            values[key] = fill(file, here, value, sections[key], {})
            continue
        allowed = fields[key].metadata["allowed"]
        if isinstance(allowed, type) and dataclasses.is_dataclass(allowed):
            if not isinstance(value, list) or not value or not all(isinstance(entry, dict) for entry in value):
                name = ".".join(str(part) for part in here if isinstance(part, str))
                raise file.complain(here, f"is not an array of tables; write [[{name}]] for each")
            values[key] = tuple(fill(file, (*here, n), entry, allowed, {}) for n, entry in enumerate(value))
        elif sentence := refusal(value, allowed):
            raise file.complain(here, sentence)
        else:
            values[key] = _taken(value, allowed)
    model = values.get("model", fields["model"].default if "model" in fields else None)
    for key in values:
        if (models := fields[key].metadata.get("models")) and model not in models:
            raise file.complain((*place, key), f"model is {model!r}; this key is for {' or '.join(models)}")
    return kind(**values)


def _taken(value: Any, allowed: Any) -> Any:
    if isinstance(allowed, Range):
        return float(value)
    return tuple(value) if isinstance(allowed, ListOf) else value


def refusal(value: Any, allowed: Any) -> str | None:
    """What is wrong with a value, and what is allowed; None if it is fine."""
    if allowed is str:
        return None if isinstance(value, str) else f"is {kind_of(value)}; write text in quotes"
    if allowed is bool:
        return None if isinstance(value, bool) else f"is {kind_of(value)}; write true or false"
    if allowed is dict:
        return None if isinstance(value, dict) else f"is {kind_of(value)}; write a table"
    if isinstance(allowed, ListOf):
        return _refused_list(value, allowed)
    if isinstance(allowed, tuple):
        return None if value in allowed else f"is {value!r}; allowed: {', '.join(allowed)}"
    if isinstance(allowed, range):
        right = isinstance(value, int) and not isinstance(value, bool)
        wanted = f"a whole number from {allowed.start} to {allowed.stop - 1}"
    else:
        right = isinstance(value, int | float) and not isinstance(value, bool)
        wanted = str(allowed)
    if not right:
        return f"is {kind_of(value)}; allowed: {wanted}"
    return None if value in allowed else f"is {value}; allowed: {wanted}"


def _refused_list(value: Any, allowed: ListOf) -> str | None:
    if not isinstance(value, list) or not value:
        return f"is {kind_of(value) if value != [] else 'empty'}; write a list of {allowed.named}, [...]"
    for number, item in enumerate(value, 1):
        if sentence := refusal(item, allowed.item):
            return f"entry {number} {sentence}"
        if item in value[: number - 1]:
            return f"entry {number}: {item!r} is there twice"
    return None


def kind_of(value: object) -> str:
    """What a value is called in a sentence."""
    names: dict[type, str] = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
    return names.get(type(value), "a table" if isinstance(value, dict) else "a list or a date")
