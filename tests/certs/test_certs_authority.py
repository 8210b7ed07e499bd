from __future__ import annotations

import os
import socket
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from fedpace.certs import authority as module
from fedpace.certs.authority import default_directory, init_authority, issue_device
from fedpace.certs.identity import host_names, load_identity, node_id
from fedpace.errors import CertificateError, ConfigError


def read(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def everything(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_the_layout_and_its_modes(authority: Path) -> None:
    identity = {"ca.pem", "cert.pem", "key.pem"}
    folders = ["server", "operator", "devices/edge-1", "devices/edge-2"]
    assert set(everything(authority)) == {"ca.pem", "ca.key"} | {f"{a}/{b}" for a in folders for b in identity}
    for path in [authority, *authority.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.is_dir():
            assert mode == 0o700, path
        elif path.suffix == ".key" or path.name == "key.pem":
            assert mode == 0o600, path
        if path.name == "ca.pem":
            assert path.read_bytes() == (authority / "ca.pem").read_bytes()
        if path.is_file() and path.name != "ca.key":
            assert path.read_bytes() != (authority / "ca.key").read_bytes()


def test_what_the_certificates_say(authority: Path) -> None:
    ca = read(authority / "ca.pem")
    constraints = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical and constraints.value == x509.BasicConstraints(ca=True, path_length=0)
    for folder, usage, uri in [
        ("server", ExtendedKeyUsageOID.SERVER_AUTH, None),
        ("operator", ExtendedKeyUsageOID.CLIENT_AUTH, "fedpace://operator/admin"),
        ("devices/edge-1", ExtendedKeyUsageOID.CLIENT_AUTH, "fedpace://device/edge-1"),
    ]:
        certificate = read(authority / folder / "cert.pem")
        certificate.verify_directly_issued_by(ca)
        assert list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [usage]
        uris = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(
            x509.UniformResourceIdentifier
        )
        assert uris == [uri] if uri else uris[0].startswith("fedpace://server/")
        assert certificate.not_valid_before_utc < datetime.now(UTC) - timedelta(minutes=2)


def test_the_servers_names(authority: Path) -> None:
    names = host_names(read(authority / "server" / "cert.pem"))
    assert names[:3] == ["localhost", "127.0.0.1", "::1"]
    assert names[-2:] == ["fleet.example", "192.0.2.7"]
    assert socket.gethostname().lower() in names
    assert host_names(read(authority / "devices" / "edge-1" / "cert.pem")) == []


@pytest.mark.parametrize("machine", ["under_score", "two words", "x" * 70, "10.1"])
def test_any_machine_name_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: machine)
    init_authority(tmp_path / "certs")
    assert load_identity(tmp_path / "certs", expect_role="server").caller.name in (machine, "server")
    assert set(host_names(read(tmp_path / "certs" / "server" / "cert.pem"))) <= {
        *("localhost", "127.0.0.1", "::1"),
        machine,
    }


def test_a_host_given_twice_is_there_once(tmp_path: Path) -> None:
    init_authority(tmp_path, hosts=["LOCALHOST", "localhost", "0:0::1"])
    assert host_names(read(tmp_path / "server" / "cert.pem")).count("localhost") == 1
    assert host_names(read(tmp_path / "server" / "cert.pem")).count("::1") == 1


@pytest.mark.parametrize(
    "host",
    ["", "a b", "https://a", "a:443", "[::1]", "*.a", "a..b", "-a", "1.2.3.4.5", "999.1.1.1", "ü.de", "a\n", "a" * 300],
)
def test_an_impossible_host(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="neither a DNS name nor an IP address"):
        init_authority(tmp_path / "certs", hosts=[host])
    assert not (tmp_path / "certs").exists()


@pytest.mark.parametrize("days", [0, -1, 36_501, 10**9])
def test_impossible_days(authority: Path, tmp_path: Path, days: int) -> None:
    for attempt in (
        lambda: init_authority(tmp_path / "certs", days=days),
        lambda: init_authority(tmp_path / "certs", authority_days=days),
        lambda: issue_device(authority, "late", days=days),
    ):
        with pytest.raises(ConfigError, match="cannot be valid for"):
            attempt()


def test_no_certificate_outlives_its_authority(tmp_path: Path) -> None:
    init_authority(tmp_path, days=3, authority_days=2)
    issue_device(tmp_path, "a", days=30)
    end = read(tmp_path / "ca.pem").not_valid_after_utc
    assert abs(end - datetime.now(UTC) - timedelta(days=2)) < timedelta(minutes=1)
    for folder in ("server", "operator", "devices/a"):
        assert read(tmp_path / folder / "cert.pem").not_valid_after_utc == end
    issue_device(tmp_path, "b", days=1)
    assert read(tmp_path / "devices/b/cert.pem").not_valid_after_utc < end


@pytest.mark.parametrize("entry", ["ca.key", "ca.pem", "server", "operator", "devices", "cert.pem"])
def test_nothing_is_overwritten(tmp_path: Path, entry: str) -> None:
    (tmp_path / entry).mkdir() if "." not in entry else (tmp_path / entry).write_text("precious")
    before = everything(tmp_path)
    with pytest.raises(CertificateError, match=r"already holds certificates .* move this one away"):
        init_authority(tmp_path)
    assert everything(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == [entry]


def test_other_files_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "README").write_text("mine")
    init_authority(tmp_path)
    assert (tmp_path / "README").read_text() == "mine"
    assert load_identity(tmp_path, expect_role="server")


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.fsync, [0]

    def fsync(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] == 7:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(CertificateError, match=r"cannot write certificates in .*: No space left"):
            init_authority(tmp_path / "certs")
    assert list((tmp_path / "certs").iterdir()) == []
    init_authority(tmp_path / "certs")


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CertificateError, match="cannot write certificates in"):
        init_authority(tmp_path / "file")


def test_a_second_certificate_of_one_name(authority: Path) -> None:
    before = everything(authority)
    with pytest.raises(CertificateError, match=r"device 'edge-1' already has a certificate in .*move it away"):
        issue_device(authority, "edge-1")
    assert everything(authority) == before


def test_one_of_many_at_once_wins(tmp_path: Path) -> None:
    init_authority(tmp_path)

    def attempt(_: int) -> Path | None:
        try:
            return issue_device(tmp_path, "a")
        except CertificateError:
            return None

    with ThreadPoolExecutor(8) as pool:
        made = [folder for folder in pool.map(attempt, range(8)) if folder]
    assert made == [tmp_path / "devices" / "a"]
    assert load_identity(made[0], expect_role="device").caller.name == "a"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ca.key", "ca.pem", "devices", "operator", "server"]


@pytest.mark.parametrize("name", ["", "../a", "a b", "-a", "a" * 65])
def test_an_impossible_name(authority: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="is not a name"):
        issue_device(authority, name)


@pytest.mark.parametrize("reserved", [0, 1])
def test_a_reserved_node_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reserved: int) -> None:
    init_authority(tmp_path)
    monkeypatch.setattr(module, "node_id", lambda name: reserved)
    with pytest.raises(CertificateError, match=f"reserved node id, {reserved}: choose another name"):
        issue_device(tmp_path, "a")
    assert not (tmp_path / "devices").exists()


def test_a_node_id_of_another_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init_authority(tmp_path)
    issue_device(tmp_path, "a")
    issue_device(tmp_path, "b")
    monkeypatch.setattr(module, "node_id", lambda name: node_id("b" if name == "c" else name))
    with pytest.raises(CertificateError, match="the name 'c' gives the node id of device 'b'"):
        issue_device(tmp_path, "c")


def test_a_name_issued_again_keeps_its_node_id(tmp_path: Path) -> None:
    init_authority(tmp_path / "certs")
    first = load_identity(issue_device(tmp_path / "certs", "a"), expect_role="device")
    (tmp_path / "certs" / "devices" / "a").rename(tmp_path / "old")
    second = load_identity(issue_device(tmp_path / "certs", "a"), expect_role="device")
    assert first.caller.node_id == second.caller.node_id and first.key != second.key


def test_no_authority(tmp_path: Path, authority: Path) -> None:
    with pytest.raises(CertificateError, match=r"there is no folder .*nowhere"):
        issue_device(tmp_path / "nowhere", "a")
    with pytest.raises(CertificateError, match="holds no authority"):
        issue_device(tmp_path, "a")
    with pytest.raises(CertificateError, match="holds no authority"):
        issue_device(authority / "server", "a")
    assert list(tmp_path.iterdir()) == []


def test_a_broken_authority(tmp_path: Path) -> None:
    init_authority(tmp_path / "one")
    init_authority(tmp_path / "two")
    (tmp_path / "one" / "ca.key").write_bytes((tmp_path / "two" / "ca.key").read_bytes())
    with pytest.raises(CertificateError, match=r"ca.key is not the key of .*ca.pem"):
        issue_device(tmp_path / "one", "a")
    (tmp_path / "one" / "ca.key").write_bytes(b"-----BEGIN")
    with pytest.raises(CertificateError, match=r"ca.key is not an unencrypted private key"):
        issue_device(tmp_path / "one", "a")


def test_two_authorities_are_told_apart_by_name(tmp_path: Path) -> None:
    init_authority(tmp_path / "one")
    init_authority(tmp_path / "two")
    assert read(tmp_path / "one" / "ca.pem").subject != read(tmp_path / "two" / "ca.pem").subject


def test_the_default_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDPACE_HOME", str(tmp_path))
    assert default_directory() == tmp_path / "certs"
    monkeypatch.delenv("FEDPACE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert default_directory() == tmp_path / "me" / ".fedpace" / "certs"
