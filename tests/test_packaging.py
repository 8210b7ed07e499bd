"""The rooms at the top of the repository, their links, the package map and a built wheel are one and the same list."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
DATA = {"py.typed"}
DATA_SUFFIXES = {".py", ".pyi", ".proto", ".toml", ".cpp", ".html", ".css"}

IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(*(name for name in ("torch", "flwr") if name in sys.modules))
"""


def rooms() -> set[str]:
    return {init.parent.name for init in ROOT.glob("*/__init__.py")} - {"fedpace"}


def linked() -> set[str]:
    """The rooms, and the examples, of which a package holds the demo's app and those that are compared."""
    return rooms() | {"examples"}


def package_files() -> Iterator[str]:
    """What `fedpace/` holds of its rooms, through its links, as paths in a wheel."""
    for folder, folders, files in os.walk(ROOT / "fedpace", followlinks=True):
        folders[:] = [name for name in folders if name not in {"__pycache__", "examples"}]
        for name in files:
            if name in DATA or Path(name).suffix in DATA_SUFFIXES:
                yield (Path(folder) / name).relative_to(ROOT).as_posix()


def app_files() -> set[str]:
    """The demo's app and those that are compared, as paths in a wheel."""
    examples = ROOT / "examples"
    paths = [path for name in ("digits", "compared") for path in (examples / name).rglob("*") if path.is_file()]
    return {f"fedpace/examples/{path.relative_to(examples)}" for path in paths if path.parent.name != "__pycache__"}


def run(*command: str) -> str:
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in a wheel built from a copy, so that the checkout is left as it was."""
    copy = tmp_path_factory.mktemp("source")
    for name in {"fedpace", *linked()}:
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]):
        shutil.copy(ROOT / name, copy)
    out = tmp_path_factory.mktemp("wheel")
    offline = ["--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation"]
    run(sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", str(out), str(copy))
    [path] = out.iterdir()
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def test_every_room_is_linked() -> None:
    links = {entry.name: entry.readlink().as_posix() for entry in (ROOT / "fedpace").iterdir() if entry.is_symlink()}
    assert links == {name: f"../{name}" for name in linked()}


def test_every_room_is_mapped() -> None:
    tools = PROJECT["tool"]["setuptools"]
    assert tools["package-dir"] == {"fedpace": "fedpace"} | {f"fedpace.{name}": name for name in linked()}
    packages = {Path(path).parent.as_posix().replace("/", ".") for path in package_files() if path.endswith(".py")}
    assert sorted(tools["packages"]) == sorted({*packages, "fedpace.examples"})


def test_the_wheel_holds_every_module_and_nothing_else(wheel: set[str]) -> None:
    metadata = {name for name in wheel if name.split("/")[0].endswith(".dist-info")}
    assert wheel - metadata == set(package_files()) | app_files()
    assert any(name.endswith("/licenses/LICENSE") for name in metadata)


def test_every_dependency_is_pinned_to_a_version_it_allows() -> None:
    pins: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, version = line.split("==")
            pins[canonicalize_name(name)] = version
    extras = PROJECT["project"]["optional-dependencies"]
    asked = [*PROJECT["project"]["dependencies"], *extras["demo"], *extras["compare"], *extras["datasets"]]
    asked += [*PROJECT["dependency-groups"]["dev"], *PROJECT["build-system"]["requires"]]
    for requirement in map(Requirement, asked):
        version = pins[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, f"constraints.txt pins {version}, pyproject.toml asks {requirement}"


def test_rooms_import_only_what_they_may() -> None:
    run(str(Path(sys.executable).with_name("lint-imports")), "--no-cache")


def test_the_agent_imports_neither_torch_nor_flower() -> None:
    """So a device with little memory, or without torch, can run one; only its worker loads the app's libraries."""
    paths = [path.relative_to(ROOT) for path in (ROOT / "clients").rglob("*.py") if path.name != "worker.py"]
    paths = [path for path in paths if not {"mods", "training"} & set(path.parts)]  # those are imported by apps
    names = [".".join(("fedpace", *path.with_suffix("").parts)).removesuffix(".__init__") for path in paths]
    assert run(sys.executable, "-c", IMPORT_ALL, *names).split() == []
