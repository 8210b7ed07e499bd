from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st

from fedpace.certs.identity import (
    Caller,
    caller_from_sans,
    check_name,
    load_identity,
    node_id,
    parse_uri,
)
from fedpace.errors import CertificateError, ConfigError

if TYPE_CHECKING:
    from tests.certs.conftest import Forger, Key

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
NAMES = st.builds(str.__add__, st.sampled_from(LETTERS), st.text(LETTERS + "._-", max_size=63))
ROLES = st.sampled_from(["device", "operator", "admin", "server"])


def is_name(text: str) -> bool:
    """The rule of names, written a second way."""
    return 1 <= len(text) <= 64 and set(text) <= set(LETTERS + "._-") and text[0] in LETTERS


# Names, node ids, URIs


@given(NAMES)
def test_node_id_is_the_first_63_bits_of_sha256(name: str) -> None:
    bits = "".join(f"{byte:08b}" for byte in hashlib.sha256(name.encode("utf-8")).digest())
    assert node_id(name) == int(bits[:63], 2) < 2**63


def test_node_id_never_changes() -> None:
    assert node_id("edge-1") == 0xDF594D71A145ABDC // 2  # as sha256sum has it; ids outlive a release


@given(st.one_of(NAMES, st.text(max_size=70), st.text(LETTERS + "._-/\n", max_size=70)))
def test_check_name_takes_names_and_nothing_else(text: str) -> None:
    if is_name(text):
        check_name(text)
    else:
        with pytest.raises(ConfigError, match="is not a name"):
            check_name(text)


@pytest.mark.parametrize("name", ["", ".", "..", "-a", "_a", "a/b", "a\n", "a b", "é", "a" * 65, "a\0"])
def test_check_name_refuses(name: str) -> None:
    with pytest.raises(ConfigError, match="is not a name"):
        check_name(name)


@given(ROLES, NAMES)
def test_a_callers_uri_names_it(role: str, name: str) -> None:
    caller = Caller(role, name)
    assert parse_uri(caller.uri) == caller
    assert caller.node_id == node_id(name)


@given(st.text(), NAMES)
def test_parse_uri_takes_nothing_else(text: str, name: str) -> None:
    for uri in (text, f"fedpace://{text}/{name}", f"fedpace://device/{text}", f"fedpace://device/{name}{text}"):
        caller = parse_uri(uri)
        assert caller is None or (caller.uri == uri and is_name(caller.name))


@pytest.mark.parametrize(
    "uri",
    [
        "fedpace://device/",
        "fedpace://device/a\n",
        "fedpace://device/a/b",
        "fedpace://device/a?x=1",
        "fedpace://device/%61",
        "fedpace://root/a",
        "FEDPACE://device/a",
        " fedpace://device/a",
        "https://device/a",
    ],
)
def test_parse_uri_refuses(uri: str) -> None:
    assert parse_uri(uri) is None


@given(st.lists(st.binary(max_size=20).filter(lambda san: not san.startswith(b"fedpace://"))), NAMES, st.randoms())
def test_one_caller_among_other_names(others: list[bytes], name: str, random: Random) -> None:
    sans = [*others, f"fedpace://device/{name}".encode()]
    random.shuffle(sans)
    assert caller_from_sans(sans) == Caller("device", name)
    assert caller_from_sans(others) is None


@given(st.binary(), NAMES)
def test_two_callers_are_nobody(tail: bytes, name: str) -> None:
    uri = f"fedpace://device/{name}".encode()
    assert caller_from_sans([uri, b"fedpace://" + tail]) is None
    assert caller_from_sans([uri, uri]) is None


def test_an_unreadable_uri_is_nobody() -> None:
    assert caller_from_sans([b"fedpace://device/\xff"]) is None


# Loading


def test_every_folder_of_an_authority_is_found(authority: Path) -> None:
    assert load_identity(authority, expect_role="server").caller.role == "server"
    assert load_identity(authority, expect_role="operator").caller == Caller("operator", "admin")
    device = load_identity(authority, expect_role="device", name="edge-2")
    assert device.caller == Caller("device", "edge-2")
    assert device.ca == (authority / "ca.pem").read_bytes()
    assert device == load_identity(authority / "devices" / "edge-2", expect_role="device")


def test_the_only_device_needs_no_name(authority: Path, tmp_path: Path) -> None:
    shutil.copytree(authority / "devices" / "edge-1", tmp_path / "devices" / "edge-1")
    assert load_identity(tmp_path, expect_role="device").caller.name == "edge-1"


def test_one_of_several_devices_must_be_named(authority: Path) -> None:
    with pytest.raises(ConfigError, match=r"choose with --name \(edge-1, edge-2\)"):
        load_identity(authority, expect_role="device")


def test_no_key_shows_in_a_log(authority: Path) -> None:
    assert "PRIVATE" not in repr(load_identity(authority, expect_role="server"))


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match=r"no certificate folder .*nowhere"):
        load_identity(tmp_path / "nowhere", expect_role="device")


def test_no_device(tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match="holds no device's certificate"):
        load_identity(tmp_path, expect_role="device")


def test_a_name_cannot_leave_the_folder(authority: Path) -> None:
    with pytest.raises(ConfigError, match="is not a name"):
        load_identity(authority, expect_role="device", name="../../server")


@pytest.mark.parametrize("file", ["ca.pem", "cert.pem", "key.pem"])
def test_a_missing_file(forger: Forger, file: str) -> None:
    folder = forger.write("device")
    (folder / file).unlink()
    refused(folder, f"{file} does not exist")


@pytest.mark.parametrize("file", ["ca.pem", "cert.pem", "key.pem"])
@pytest.mark.parametrize(
    "damage",
    [lambda pem: b"", lambda pem: pem[: len(pem) // 2], lambda pem: pem.replace(b"M", b"!"), lambda pem: b"\xff"],
)
def test_a_damaged_file(forger: Forger, file: str, damage: Callable[[bytes], bytes]) -> None:
    folder = forger.write("device")
    (folder / file).write_bytes(damage((folder / file).read_bytes()))
    refused(folder, f"{file} is not an? .* in PEM form")


@pytest.mark.parametrize("file", ["ca.pem", "cert.pem", "key.pem"])
def test_an_unreadable_file(forger: Forger, file: str) -> None:
    folder = forger.write("device")
    (folder / file).unlink()
    (folder / file).mkdir()
    refused(folder, f"cannot read .*{file}")


def test_two_certificates_in_one_file(forger: Forger) -> None:
    folder = forger.write("device")
    ca = (folder / "ca.pem").read_bytes()
    (folder / "ca.pem").write_bytes(ca + ca)
    refused(folder, "ca.pem holds 2 certificates where one is expected")


def test_another_certificates_key(forger: Forger) -> None:
    folder = forger.write("device")
    shutil.copy(forger.write("other") / "key.pem", folder / "key.pem")
    refused(folder, "key.pem is not the key of .*cert.pem")


@pytest.mark.parametrize(
    "key", [rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP384R1())], ids=["rsa", "p384"]
)
def test_another_kind_of_key(forger: Forger, key: Key) -> None:
    refused(forger.write("device", key=key), "key.pem is not a P-256 key")


def test_expired(forger: Forger) -> None:
    folder = forger.write("device", starts=-9, ends=-2)
    refused(folder, r"cert.pem expired on \d{4}-\d\d-\d\d .* clock, which reads \d{4}")


def test_not_yet_valid(forger: Forger) -> None:
    folder = forger.write("device", starts=2, ends=9)
    refused(folder, r"cert.pem is not valid before \d{4}-\d\d-\d\d .* clock, which reads \d{4}.*may be wrong")


def test_an_expired_authority(forger: Forger, tmp_path: Path) -> None:
    folder = forger.make(tmp_path / "old", starts=-9, ends=-2).write("device")
    refused(folder, "ca.pem expired on")


@pytest.mark.parametrize("name", ["forger", "somebody else"])
def test_another_authority(forger: Forger, tmp_path: Path, name: str) -> None:
    folder = forger.write("device")
    other = forger.make(tmp_path / "other", name=name).write("device")
    shutil.copy(other / "ca.pem", folder / "ca.pem")
    refused(folder, "cert.pem was not issued by the authority in .*ca.pem")


def test_an_authority_that_may_not_issue(forger: Forger, tmp_path: Path) -> None:
    refused(forger.make(tmp_path / "no-ca", ca=False).write("device"), "cert.pem does not hold against .*ca.pem")


def test_a_certificate_for_another_purpose(forger: Forger) -> None:
    refused(forger.write("device", server=True), "cert.pem does not hold against .*ca.pem")
    server = forger.write("server", uris=["fedpace://server/s"], hosts=["localhost"])
    refused(server, "cert.pem does not hold against .*ca.pem", role="server")


def test_a_server_of_no_host(forger: Forger) -> None:
    folder = forger.write("server", uris=["fedpace://server/s"], server=True)
    refused(folder, "cert.pem names no host", role="server")


@pytest.mark.parametrize("host", ["fleet.example", "192.0.2.7"])
def test_a_server_of_another_maker(forger: Forger, host: str) -> None:
    folder = forger.write("server", uris=["fedpace://server/s"], hosts=[host], server=True)
    assert load_identity(folder, expect_role="server").caller == Caller("server", "s")


def test_the_end_of_an_identity_is_the_earlier_of_two(forger: Forger, tmp_path: Path) -> None:
    early = forger.make(tmp_path / "early", ends=3)
    identity = load_identity(early.write("device", ends=9), expect_role="device")
    assert identity.not_after == early.certificate.not_valid_after_utc
    assert dataclasses.replace(identity, key=b"").caller == Caller("device", "a")


@pytest.mark.parametrize("uris", [(), ("https://a",), ("fedpace://device/a", "fedpace://device/b")])
def test_nobodys_certificate(forger: Forger, uris: tuple[str, ...]) -> None:
    refused(forger.write("device", uris=uris), "cert.pem does not say whose it is")


def test_another_role(authority: Path) -> None:
    refused(authority / "operator", "is the certificate of the operator 'admin', but the one of a device")


def test_another_name(authority: Path) -> None:
    with pytest.raises(CertificateError, match="is the certificate of the device 'edge-1', not of 'edge-2'"):
        load_identity(authority / "devices" / "edge-1", expect_role="device", name="edge-2")


def refused(folder: Path, message: str, role: str = "device") -> None:
    with pytest.raises(CertificateError, match=message) as caught:
        load_identity(folder, expect_role=role)
    assert re.search(re.escape(str(folder)), str(caught.value))
    assert "\n" not in str(caught.value)
