"""Wrong usage of the command line: exit code 2 and one clear line, before anything is started or dialled."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedpace.certs.authority import init_authority, issue_device
from tests.certs.conftest import Forger
from tests.fleets import copy_app
from tests.raw_device import SECONDS


@dataclass(frozen=True)
class Shell:
    """Runs fedpace with a home of its own, which holds an authority, and an app."""

    home: Path
    app: Path

    @property
    def certs(self) -> Path:
        return self.home / "certs"

    def run(self, *arguments: str | Path, seconds: float = SECONDS) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "fedpace", *map(str, arguments)],
            env={"PATH": "/usr/bin:/bin", "FEDPACE_HOME": str(self.home), "COLUMNS": "200"},
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def refuses(self, *arguments: str | Path) -> str:
        """What is said of a command that ends with exit code 2 and one line."""
        done = self.run(*arguments)
        assert done.returncode == 2, f"exit code {done.returncode}: {done.stderr}"
        assert not done.stdout and "Traceback" not in done.stderr
        (line,) = done.stderr.splitlines()
        assert line.startswith("fedpace: ")
        return line.removeprefix("fedpace: ")

    def server(self, *options: str | Path, app: Path | None = None) -> list[str | Path]:
        out: list[str | Path] = ["--address", "127.0.0.1:0", "--out", self.home / "out"]
        return ["server", "--app", app or self.app, *out, *options]

    def client(self, *options: str | Path, app: Path | None = None) -> list[str | Path]:
        return ["client", "--app", app or self.app, "--server", "127.0.0.1:1", *options]


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    home = tmp_path_factory.mktemp("home")
    init_authority(home / "certs")
    issue_device(home / "certs", "edge-1")
    return Shell(home, copy_app(home / "app"))


# Apps


def test_a_folder_that_is_no_app(shell: Shell, tmp_path: Path) -> None:
    for command in (shell.server, shell.client):
        assert f"{tmp_path} has no pyproject.toml" in shell.refuses(*command(app=tmp_path))
        assert f"{tmp_path}/nowhere is no folder" in shell.refuses(*command(app=tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("[project]", "[project", "is not valid TOML"),
        ("[tool.flwr.app.components]", "[tool.flwr.app.parts]", "has no table [tool.flwr.app.components]"),
        ('version = "1.0.0"', "", "[project] has no 'version'"),
        ('"puppet:app"', '"puppet"', "serverapp = 'puppet' is not of the form 'module:object'"),
        (
            "[tool.fedpace.server]",
            "[tool.fedpace.server]\nlost-after = 1",
            "[tool.fedpace.server] lost-after is unknown",
        ),
        ("[tool.fedpace.server]", "[tool.fedpace.server]\nattempts = 0.5", "attempts = 0.5 is not a whole number"),
        ("[tool.fedpace.server]", "[tool.fedpace.server]\nheartbeat-seconds = -1", "heartbeat-seconds = -1"),
    ],
)
def test_an_app_with_a_fault_in_its_pyproject(shell: Shell, tmp_path: Path, old: str, new: str, reason: str) -> None:
    app = copy_app(tmp_path / "app", change=("pyproject.toml", old, new))
    assert reason in shell.refuses(*shell.server(app=app))


def test_a_server_app_that_cannot_be_loaded(shell: Shell, tmp_path: Path) -> None:
    """The run fails: its ServerApp is loaded in a process of its own, once the server listens.

    What it left behind is not overwritten by the next.
    """
    app = copy_app(tmp_path / "app", change=("puppet.py", "import numpy as np", "import no_such_module"))
    command = shell.server("--out", tmp_path / "out", app=app)
    done = shell.run(*command)
    assert done.returncode == 1
    assert "the run failed: ModuleNotFoundError: No module named 'no_such_module'" in done.stderr
    assert f"--out: {tmp_path / 'out'} holds the result of another run" in shell.refuses(*command)


# Configuration


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("rounds=3", "--run-config: the app has no key 'rounds' in [tool.flwr.app.config]; it has port"),
        ("port=three", '--run-config: port=three is not a TOML value; text goes in quotes: port="three"'),
        ("port=[1]", "--run-config: port=[1] is not a TOML value"),
        ("port", "--run-config: cannot read 'port'; write key=value, apart by blanks"),
        ("port=1 port=2", "--run-config: 'port' is there twice"),
        ("no-such-file.toml", "no-such-file.toml"),
    ],
)
def test_a_wrong_run_config(shell: Shell, value: str, reason: str) -> None:
    assert reason in shell.refuses(*shell.server("--run-config", value))


def test_a_wrong_node_config(shell: Shell) -> None:
    assert "--node-config: x=y is not a TOML value" in shell.refuses(*shell.client("--node-config", "x=y"))


def test_an_initial_model_that_is_none(shell: Shell, tmp_path: Path) -> None:
    assert "there is no file" in shell.refuses(*shell.server("--initial-model", tmp_path / "nothing"))


@pytest.mark.parametrize(
    "address", ["nonsense", "127.0.0.1", "127.0.0.1:", ":9092", "127.0.0.1:65536", "127.0.0.1:-1", "127.0.0.1:9o92"]
)
def test_a_bad_address(shell: Shell, address: str) -> None:
    assert f"--address: {address!r} is not HOST:PORT" in shell.refuses(*shell.server("--address", address))


@pytest.mark.parametrize("address", ["0.0.0.0:0", "192.0.2.1:9092", "[::]:0"])
def test_insecure_beyond_loopback(shell: Shell, address: str) -> None:
    for command in (shell.server("--insecure", "--address", address), shell.client("--insecure", "--server", address)):
        assert "--insecure works on loopback addresses only" in shell.refuses(*command)


def test_insecure_with_certificates(shell: Shell) -> None:
    assert "exclude each other" in shell.refuses(*shell.server("--insecure", "--certs", shell.certs))


def test_a_busy_port(shell: Shell) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert f"cannot listen on {address}: is the port taken?" in shell.refuses(*shell.server("--address", address))


def test_an_address_of_another_machine(shell: Shell) -> None:
    assert "cannot listen on 192.0.2.1:9092" in shell.refuses(*shell.server("--address", "192.0.2.1:9092"))


# Certificates


def test_no_certificates(shell: Shell, tmp_path: Path) -> None:
    for command in (shell.server, shell.client):
        assert f"there are no certificates in {tmp_path}/none" in shell.refuses(*command("--certs", tmp_path / "none"))


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


@pytest.mark.parametrize("file", ["key.pem", "cert.pem", "ca.pem"])
def test_a_missing_file(shell: Shell, tmp_path: Path, file: str) -> None:
    for command, folder in ((shell.server, "server"), (shell.client, "devices/edge-1")):
        copy = copied(shell.certs / folder, tmp_path / folder)
        (copy / file).unlink()
        assert f"{copy / file} does not exist" in shell.refuses(*command("--certs", copy))


def test_a_certificate_of_another_authority(shell: Shell, tmp_path: Path) -> None:
    """Its own chain does not hold: that is seen before anybody is dialled."""
    init_authority(tmp_path / "other")
    for command, folder in ((shell.server, "server"), (shell.client, "devices/edge-1")):
        copy = copied(shell.certs / folder, tmp_path / folder)
        shutil.copy(tmp_path / "other" / "ca.pem", copy / "ca.pem")
        assert "was not issued by the authority in" in shell.refuses(*command("--certs", copy))


@pytest.mark.parametrize(
    ("days", "reason"), [((-10, -1), "expired on"), ((1, 10), "is not valid before")], ids=["expired", "early"]
)
def test_a_certificate_out_of_its_time(shell: Shell, tmp_path: Path, days: tuple[float, float], reason: str) -> None:
    forger = Forger.make(tmp_path)
    server = forger.write(
        "s", uris=["fedpace://server/s"], hosts=["127.0.0.1"], starts=days[0], ends=days[1], server=True
    )
    device = forger.write("d", uris=["fedpace://device/d"], starts=days[0], ends=days[1])
    for command, folder in ((shell.server, server), (shell.client, device)):
        said = shell.refuses(*command("--certs", folder))
        assert reason in said and "this machine's clock, which reads" in said


def test_a_certificate_for_something_else(shell: Shell) -> None:
    said = shell.refuses(*shell.client("--certs", shell.certs / "operator"))
    assert "is the certificate of the operator 'admin', but the one of a device is needed here" in said
    said = shell.refuses(*shell.client("--certs", shell.certs / "devices" / "edge-1", "--name", "edge-2"))
    assert "is the certificate of the device 'edge-1', not of 'edge-2'" in said


# Devices


def test_devices_of_no_server(shell: Shell) -> None:
    """That is no wrong usage: exit code 1."""
    done = shell.run("devices", "--server", "127.0.0.1:1")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert "127.0.0.1:1" in line


def test_devices_is_not_for_devices(shell: Shell) -> None:
    said = shell.refuses("devices", "--server", "127.0.0.1:1", "--certs", shell.certs / "devices" / "edge-1")
    assert "but the one of a operator is needed here" in said


# Demo


def test_a_demo_of_no_strategy(shell: Shell) -> None:
    said = shell.refuses("demo", "--strategy", "FedPaced")
    assert "'FedPaced' is none of FedAvg," in said and "flwr:FedMedian" in said
