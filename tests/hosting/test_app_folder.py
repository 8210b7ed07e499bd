"""An app folder: what is read, what is refused and how that is said, and what its hash covers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedpace.errors import AppError
from fedpace.hosting.app import load_app_folder

PYPROJECT = """
[project]
name = "an-app"
version = "1.2.3"

[tool.flwr.app]
publisher = "somebody"

[tool.flwr.app.components]
serverapp = "an_app.server_app:app"
clientapp = "an_app.client_app:app"

[tool.flwr.app.config]
rounds = 3
lr = 0.1
name = "x"
on = true
nested.deep.key = 5

[tool.fedpace.server]
keep-versions = 2
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    folder = tmp_path / "app"
    (folder / "an_app" / "inner").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    for name in ("__init__.py", "server_app.py", "client_app.py", "inner/model.py"):
        (folder / "an_app" / name).write_text(f"# {name}\n")
    return folder


def test_an_app_folder_is_read(app: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(app.parent)
    found = load_app_folder(Path("app"))
    assert (found.directory, found.name, found.version, found.publisher) == (app, "an-app", "1.2.3", "somebody")
    assert (found.serverapp, found.clientapp) == ("an_app.server_app:app", "an_app.client_app:app")
    assert found.config == {"rounds": 3, "lr": 0.1, "name": "x", "on": True, "nested.deep.key": 5}
    assert found.settings == {"server": {"keep-versions": 2}}
    assert str(found) == f"an-app 1.2.3 ({found.sha256[:12]})" and len(found.sha256) == 64
    assert load_app_folder(app) == found


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[project]", "[projects]", r"no table \[project\], which every Flower app has"),
        ('name = "an-app"', "", r"\[project\] has no 'name'; give it as text"),
        ('version = "1.2.3"', "version = 1", r"\[project\] has no 'version'"),
        ('version = "1.2.3"', 'version = ""', r"\[project\] has no 'version'"),
        ('publisher = "somebody"', "", r"\[tool.flwr.app\] has no 'publisher'"),
        ("[tool.flwr.app.components]", "[tool.flwr.app.parts]", r"no table \[tool.flwr.app.components\]"),
        ("[tool.flwr.app]", "[tool.flower.app]", r"\[tool.flwr.app\] has no 'publisher'"),
        ('serverapp = "an_app.server_app:app"', "", r"\[tool.flwr.app.components\] has no 'serverapp'"),
        ('"an_app.server_app:app"', '"an_app.server_app"', "serverapp = 'an_app.server_app' is not of the form"),
        ('"an_app.client_app:app"', '"an_app/client_app.py:app"', "clientapp = .* is not of the form 'module:object'"),
        ('"an_app.client_app:app"', '"an_app.client_app:"', "is not of the form 'module:object'"),
        ("lr = 0.1", "lr = [0.1]", r"\[tool.flwr.app.config\] lr is a list; a config takes numbers, text"),
        ("lr = 0.1", "lr = 2020-01-01", r"\[tool.flwr.app.config\] lr is a date"),
        ("nested.deep.key = 5", "nested.deep.key = []", "nested.deep.key is a list"),
        ("rounds = 3", "rounds = ", r"pyproject.toml is not valid TOML: .*line 1[0-9]"),
        ("rounds = 3", "rounds = 3\nrounds = 4", "not valid TOML"),
    ],
)
def test_what_is_missing_or_wrong_is_named(app: Path, old: str, new: str, message: str) -> None:
    assert PYPROJECT.count(old) == 1
    (app / "pyproject.toml").write_text(PYPROJECT.replace(old, new))
    with pytest.raises(AppError, match=message) as raised:
        load_app_folder(app)
    assert str(app / "pyproject.toml") in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tool = 3\n" + PYPROJECT.partition("[tool.flwr.app]")[0], r"no table \[tool\]"),
        (
            PYPROJECT.replace("[tool.fedpace.server]", "[tool]\nfedpace = 3\n[other]"),
            r"\[tool.fedpace\] is not a table",
        ),
        (
            PYPROJECT.partition("[tool.flwr.app.config]")[0].replace('"somebody"', '"somebody"\nconfig = 3'),
            r"\[tool.flwr.app.config\] is not a table",
        ),
    ],
)
def test_values_where_tables_belong_are_named(app: Path, text: str, message: str) -> None:
    (app / "pyproject.toml").write_text(text)
    with pytest.raises(AppError, match=message):
        load_app_folder(app)


def test_a_config_and_settings_may_be_left_out(app: Path) -> None:
    (app / "pyproject.toml").write_text(PYPROJECT.partition("[tool.flwr.app.config]")[0])
    found = load_app_folder(app)
    assert (found.config, found.settings) == ({}, {})


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AppError, match=r"missing is no folder; --app takes the folder of a Flower app"):
        load_app_folder(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(AppError, match="file is no folder"):
        load_app_folder(tmp_path / "file")
    with pytest.raises(AppError, match=r"has no pyproject\.toml"):
        load_app_folder(tmp_path)


def test_a_file_that_cannot_be_read_is_named(app: Path) -> None:
    (app / "pyproject.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(AppError, match="not valid TOML"):
        load_app_folder(app)
    (app / "pyproject.toml").unlink()
    (app / "pyproject.toml").mkdir()
    with pytest.raises(AppError, match=r"pyproject\.toml cannot be read: Is a directory"):
        load_app_folder(app)


# ---------------------------------------------------------------- the hash


def replace(name: str, old: str, new: str) -> Callable[[Path], object]:
    def change(app: Path) -> None:
        path = app / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return change


def write(name: str, text: str = "x = 1\n") -> Callable[[Path], object]:
    def change(app: Path) -> None:
        (app / name).parent.mkdir(parents=True, exist_ok=True)
        (app / name).write_text(text)

    return change


def virtual_environment(app: Path) -> None:
    write("env/pyvenv.cfg", "home = /usr\n")(app)
    write("env/lib/module.py")(app)


def cycle(app: Path) -> None:
    (app / "an_app" / "again").symlink_to(app, target_is_directory=True)
    (app / "an_app" / "nowhere.py").symlink_to(app / "not there")


@pytest.mark.parametrize(
    "change",
    [
        write("an_app/server_app.py"),
        write("an_app/inner/new.py", ""),
        write("top.py"),
        lambda app: (app / "an_app" / "inner" / "model.py").unlink(),
        lambda app: (app / "an_app" / "inner" / "model.py").rename(app / "an_app" / "model.py"),
        replace("pyproject.toml", "1.2.3", "1.2.4"),
        replace("pyproject.toml", "rounds = 3", "rounds = 4"),
        replace("pyproject.toml", "somebody", "somebody-else"),
    ],
)
def test_the_hash_covers_code_and_what_flower_reads(app: Path, change: Callable[[Path], object]) -> None:
    before = load_app_folder(app).sha256
    change(app)
    assert load_app_folder(app).sha256 != before


@pytest.mark.parametrize(
    "change",
    [
        replace("pyproject.toml", "keep-versions = 2", "keep-versions = 3"),
        replace("pyproject.toml", "[project]", "# a comment\n[tool.other]\nkey = 1\n[project]"),
        write("an_app/__pycache__/server_app.cpython-311.py"),
        write(".venv/lib/module.py"),
        write(".hidden.py"),
        write("an_app/data.csv"),
        write("README.md"),
        virtual_environment,
        cycle,
    ],
)
def test_the_hash_does_not_cover_the_rest(app: Path, change: Callable[[Path], object]) -> None:
    before = load_app_folder(app).sha256
    change(app)
    assert load_app_folder(app).sha256 == before


def test_the_hash_is_the_same_wherever_the_folder_is(app: Path, tmp_path: Path) -> None:
    shutil.copytree(app, tmp_path / "elsewhere")
    assert load_app_folder(tmp_path / "elsewhere").sha256 == load_app_folder(app).sha256


def test_code_behind_a_link_counts(app: Path, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "code.py").write_text("a = 1\n")
    (app / "an_app" / "linked").symlink_to(tmp_path / "shared", target_is_directory=True)
    before = load_app_folder(app).sha256
    (tmp_path / "shared" / "code.py").write_text("a = 2\n")
    assert load_app_folder(app).sha256 != before


def test_code_that_cannot_be_read_is_named(app: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:  # as the system does, for all users but root
        if path.name == "server_app.py":
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(AppError, match=r"server_app\.py cannot be read: Permission denied"):
        load_app_folder(app)
