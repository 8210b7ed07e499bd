from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fedpace.certs.commands import app
from fedpace.certs.identity import host_names, load_identity, node_id, read_certificate
from fedpace.errors import CertificateError, ConfigError


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "300"})


def test_init_then_devices_in_the_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDPACE_HOME", str(tmp_path))
    made = run("init", "--host", "fleet.example", "--host", "192.0.2.7", "--days", "9")
    assert made.exit_code == 0, made.output
    directory = tmp_path / "certs"
    for said in (str(directory / "ca.key"), str(directory / "server"), "fleet.example, 192.0.2.7", "certs device NAME"):
        assert said in made.stdout
    names = host_names(read_certificate(directory / "server" / "cert.pem"))
    assert names[-2:] == ["fleet.example", "192.0.2.7"]

    device = run("device", "edge-1", "--days", "3")
    assert device.exit_code == 0, device.output
    identity = load_identity(directory, expect_role="device")
    assert identity.caller.name == "edge-1"
    assert identity.not_after < load_identity(directory, expect_role="server").not_after
    for said in (str(directory / "devices" / "edge-1"), str(node_id("edge-1")), f"{identity.not_after:%Y-%m-%d}"):
        assert said in device.stdout


def test_another_folder(tmp_path: Path) -> None:
    assert run("init", "--dir", str(tmp_path / "x")).exit_code == 0
    assert run("device", "a", "--dir", str(tmp_path / "x")).exit_code == 0
    assert load_identity(tmp_path / "x", expect_role="device").caller.name == "a"


def test_errors_are_left_to_the_caller(tmp_path: Path) -> None:
    assert isinstance(run("device", "a", "--dir", str(tmp_path)).exception, CertificateError)
    assert isinstance(run("device", "../a", "--dir", str(tmp_path)).exception, ConfigError)
    assert isinstance(run("init", "--dir", str(tmp_path), "--days", "0").exception, ConfigError)
