"""A Flower app folder: found, read and checked, without importing Flower or the app's code."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpace.errors import AppError
from fedpace.hosting.config import Config, flatten

_REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


@dataclass(frozen=True)
class AppFolder:
    """What an app's `pyproject.toml` says. `sha256` covers its Python files and the tables Flower reads."""

    directory: Path
    name: str
    version: str
    publisher: str
    serverapp: str
    clientapp: str
    config: Config
    sha256: str
    settings: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({self.sha256[:12]})"


def load_app_folder(directory: Path) -> AppFolder:
    """Reads an app folder. Raises AppError, naming the file and the key, where it is not one."""
    directory = directory.expanduser().absolute()
    path = directory / "pyproject.toml"
    if not directory.is_dir():
        raise AppError(f"{directory} is no folder; --app takes the folder of a Flower app")
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AppError(f"{directory} has no pyproject.toml; --app takes the folder of a Flower app") from None
    except OSError as error:
        raise AppError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise AppError(f"{path} is not valid TOML: {error}") from None
    project = _table(document, path, "project")
    flower = _table(document, path, "tool", "flwr", "app")
    components = _table(document, path, "tool", "flwr", "app", "components")
    return AppFolder(
        directory=directory,
        name=_text(project, path, "project", "name"),
        version=_text(project, path, "project", "version"),
        publisher=_text(flower, path, "tool.flwr.app", "publisher"),
        serverapp=_reference(components, path, "serverapp"),
        clientapp=_reference(components, path, "clientapp"),
        config=_config(flower, path),
        sha256=_hash(directory, {"project": project, "app": flower}),
        settings=_optional_table(document["tool"], path, "tool.fedpace"),
    )


def _table(document: Mapping[str, Any], path: Path, *keys: str) -> dict[str, Any]:
    table: Any = document
    for depth, key in enumerate(keys):
        table = table.get(key)
        if not isinstance(table, dict):
            raise AppError(f"{path} has no table [{'.'.join(keys[: depth + 1])}], which every Flower app has")
    return dict(table)


def _optional_table(table: Mapping[str, Any], path: Path, where: str) -> dict[str, Any]:
    found = table.get(where.rpartition(".")[2], {})
    if not isinstance(found, dict):
        raise AppError(f"{path}: [{where}] is not a table")
    return found


def _text(table: Mapping[str, Any], path: Path, where: str, key: str) -> str:
    value = table.get(key)
    if not isinstance(value, str) or not value:
        raise AppError(f"{path}: [{where}] has no {key!r}; give it as text")
    return value


def _reference(components: Mapping[str, Any], path: Path, key: str) -> str:
    value = _text(components, path, "tool.flwr.app.components", key)
    if not _REFERENCE.fullmatch(value):
        raise AppError(f"{path}: {key} = {value!r} is not of the form 'module:object'")
    return value


def _config(flower: Mapping[str, Any], path: Path) -> Config:
    try:
        return flatten(_optional_table(flower, path, "tool.flwr.app.config"))
    except ValueError as error:
        raise AppError(f"{path}: [tool.flwr.app.config] {error}") from None


def _hash(directory: Path, tables: Mapping[str, Any]) -> str:
    found = hashlib.sha256(json.dumps(tables, sort_keys=True, default=str).encode())
    try:
        for path in sorted(_sources(directory, ())):
            data = path.read_bytes()
            found.update(f"\0{path.relative_to(directory).as_posix()}\0{len(data)}\0".encode())
            found.update(data)
    except OSError as error:
        raise AppError(f"{error.filename} cannot be read: {error.strerror}") from None
    return found.hexdigest()


def _sources(directory: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    here = directory.resolve()
    if here in above:  # a link to a folder that holds it
        return
    for path in directory.iterdir():
        if path.name.startswith(".") or path.name == "__pycache__":
            continue
        if path.is_dir() and not (path / "pyvenv.cfg").exists():
            yield from _sources(path, (*above, here))
        elif path.suffix == ".py" and path.is_file():
            yield path
