"""From a preset's name or a TOML file to checked `FleetSettings`; and the files of one's own that it may name."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedpace.errors import ConfigError
from fedpace.simulations.fleets.settings import SECTIONS, FleetSettings
from fedpace.simulations.tomlfile import TomlFile, fill, read_toml

PRESETS = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    """The fleets that come with fedpace."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def read_settings(name_or_path: str) -> tuple[Path, FleetSettings]:
    """The file behind a preset's name or a path, and what it says. Raises ConfigError."""
    path = Path(name_or_path).expanduser()
    if name_or_path in preset_names():
        path = PRESETS / f"{name_or_path}.toml"
    elif path.suffix != ".toml":
        raise ConfigError(f"fleet {name_or_path!r}: name one of {', '.join(preset_names())}, or a .toml file")
    file = read_toml(path)
    settings: FleetSettings = fill(file, (), file.document, FleetSettings, SECTIONS)
    _check_together(file, settings)
    return path, settings


def _check_together(file: TomlFile, settings: FleetSettings) -> None:
    """What one key allows of another."""
    compute, network, battery = settings.compute, settings.network, settings.battery
    for section, model, key, wanted in (
        ("compute", "classes", "classes", "[[compute.classes]] tables"),
        ("network", "classes", "classes", "[[network.classes]] tables"),
        ("compute", "file", "file", 'file = "..."'),
        ("availability", "trace", "file", 'file = "..."'),
    ):
        part = getattr(settings, section)
        if part.model == model and not getattr(part, key):
            raise file.complain((section, "model"), f"{model!r} needs {wanted}")
    for section, classes in (("compute", compute.classes), ("network", network.classes)):
        if len(classes) > 255:
            raise file.complain((section, "classes"), f"{len(classes)} classes; at most 255")
    for section, low, high, first, second in (
        ("compute", "load_low", "load_high", compute.load_low, compute.load_high),
        ("battery", "start_low", "start_high", battery.start_low, battery.start_high),
        ("battery", "leave_below", "start_low", battery.leave_below, battery.start_low),
        ("battery", "leave_below", "return_above", battery.leave_below, battery.return_above),
    ):
        if first > second:
            raise file.complain((section, low), f"is {first:g}, more than {high} = {second:g}")
    if network.model == "normal" and network.least_mbit > min(network.down_mbit, network.up_mbit):
        raise file.complain(("network", "least_mbit"), "is more than the means, down_mbit and up_mbit")
    if battery.leave_below == battery.return_above:
        raise file.complain(("battery", "return_above"), "is the same as leave_below; make it more")
    if (lost := settings.faults.dropout + settings.faults.failure) > 1:
        raise file.complain(("faults", "dropout"), f"is {lost:g} together with failure; at most 1")


# ------------------------------------------------------------ files that a fleet names


def read_speeds(path: Path) -> NDArray[np.float32]:
    """Seconds a step of devices: a JSON list of numbers, or a CSV file with a column `seconds_per_step`.

    Raises ConfigError that names the file and the line or entry.
    """
    if path.suffix == ".json":
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from None
        if not isinstance(entries, list):
            raise ConfigError(f"{path}: is not a list; write [0.05, 0.2, ...], seconds a step")
        found = [(f"{path}: entry {number}", entry) for number, entry in enumerate(entries, 1)]
    else:
        found = [(where, row[0]) for where, row in _rows(path, ("seconds_per_step",))]
    seconds = [_seconds(where, "seconds_per_step", entry) for where, entry in found]
    for (where, _), value in zip(found, seconds, strict=True):
        if not 0 < value <= 1e12:
            raise ConfigError(f"{where}: seconds_per_step is {value:g}; allowed: more than 0, at most 1e12")
    if not seconds:
        raise ConfigError(f"{path}: has no devices")
    return np.array(seconds, dtype=np.float32)


def read_trace(path: Path) -> list[list[tuple[float, float]]]:
    """Sessions (start, end) in seconds of each device, in the order devices first appear: a CSV file with the columns
    `device`, `start` and `end`. They are sorted; those that touch or overlap are one.

    Raises ConfigError that names the file and the line.
    """
    devices: dict[str, list[tuple[float, float]]] = {}
    for where, (device, start_text, end_text) in _rows(path, ("device", "start", "end")):
        start, end = _seconds(where, "start", start_text), _seconds(where, "end", end_text)
        if not 0 <= start < end < math.inf:
            raise ConfigError(f"{where}: start is {start:g}, end {end:g}; allowed: 0 <= start < end")
        devices.setdefault(device, []).append((start, end))
    if not devices:
        raise ConfigError(f"{path}: has no sessions")
    return [_merged(sorted(sessions)) for sessions in devices.values()]


def _merged(sessions: list[tuple[float, float]]) -> list[tuple[float, float]]:
    merged = sessions[:1]
    for start, end in sessions[1:]:
        if start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Where each row of a CSV file is, and its values in these columns."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if missing := [column for column in columns if column not in (reader.fieldnames or ())]:
                raise ConfigError(f"{path}:1: has no column {missing[0]!r}; the first line names {', '.join(columns)}")
            for row in reader:
                where = f"{path}:{reader.line_num}"
                if any(row[column] is None for column in columns):
                    raise ConfigError(f"{where}: has too few values")
                yield where, tuple(row[column] for column in columns)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: {error}") from None


def _seconds(where: str, name: str, value: object) -> float:
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    raise ConfigError(f"{where}: {name} is {value!r}; write a number of seconds")
