"""Certificates made wrong on purpose, with cryptography alone, so that no test believes the code it tests."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

import fedpace  # noqa: F401  (before grpc: it narrows the TLS versions grpc offers)
from fedpace.certs.authority import init_authority, issue_device

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True)
class Forger:
    """An authority that issues whatever it is asked for; `write` makes an identity folder of it."""

    root: Path
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def make(cls, root: Path, *, name: str = "forger", starts: float = -1, ends: float = 30, ca: bool = True) -> Forger:
        """`starts` and `ends` are days from now."""
        key = ec.generate_private_key(ec.SECP256R1())
        builder = (
            _builder(_name(name), _name(name), key, starts, ends)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(_usage(ca=ca), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        return cls(root, key, builder.sign(key, hashes.SHA256()))

    def write(
        self,
        folder: str,
        *,
        uris: Sequence[str] = ("fedpace://device/a",),
        hosts: Sequence[str] = (),
        starts: float = -1,
        ends: float = 30,
        server: bool = False,
        key: Key | None = None,
    ) -> Path:
        key = key or ec.generate_private_key(ec.SECP256R1())
        sans = [
            *(_host(host) for host in hosts),
            *(x509.UniformResourceIdentifier(uri) for uri in uris),
        ]
        usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = (
            _builder(_name(folder), self.certificate.subject, key, starts, ends)
            .add_extension(_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        if sans:
            builder = builder.add_extension(x509.SubjectAlternativeName(sans), critical=False)
        path = self.root / folder
        path.mkdir(parents=True)
        pem = serialization.Encoding.PEM
        (path / "ca.pem").write_bytes(self.certificate.public_bytes(pem))
        (path / "cert.pem").write_bytes(builder.sign(self.key, hashes.SHA256()).public_bytes(pem))
        (path / "key.pem").write_bytes(
            key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
        return path


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _host(text: str) -> x509.GeneralName:
    return x509.IPAddress(ipaddress.ip_address(text)) if text[0].isdigit() else x509.DNSName(text)


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(not ca, False, False, False, False, ca, ca, False, False)


def _builder(subject: x509.Name, issuer: x509.Name, key: Key, starts: float, ends: float) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=starts))
        .not_valid_after(now + timedelta(days=ends))
    )


@pytest.fixture
def forger(tmp_path: Path) -> Forger:
    return Forger.make(tmp_path / "forged")


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real authority with the devices `edge-1` and `edge-2`; tests read it and leave it as it is."""
    directory = tmp_path_factory.mktemp("authority") / "certs"
    init_authority(directory, hosts=["fleet.example", "192.0.2.7"])
    issue_device(directory, "edge-1")
    issue_device(directory, "edge-2")
    return directory
