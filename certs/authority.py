"""A fleet's certificate authority: a folder of P-256 keys and X.509 certificates.

    DIR/ca.pem  DIR/ca.key                          the authority; its key need not leave this machine
    DIR/server/          ca.pem cert.pem key.pem    each of these folders is complete: copy it to the
    DIR/operator/        ca.pem cert.pem key.pem    machine that needs it
    DIR/devices/NAME/    ca.pem cert.pem key.pem

Keys have mode 0600 and folders 0700. Everything is written and fsynced under a temporary name, then renamed.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedpace.certs.identity import (
    Caller,
    check_dates,
    check_name,
    device_names,
    node_id,
    private_pem,
    read_certificate,
    read_key,
)
from fedpace.errors import CertificateError, ConfigError

_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_DNS_NAME = re.compile(rf"(?=.{{1,253}}$)(?:{_LABEL}\.)*(?!\d+$){_LABEL}")  # the last label is never a number
_SKEW = timedelta(minutes=5)  # a device whose clock is this much behind accepts a new certificate all the same
_MAX_DAYS = 36_500
_RESERVED_NODE_IDS = frozenset({0, 1})  # Flower's own


@dataclass(frozen=True)
class _Signer:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def default_directory() -> Path:
    """Where certificates lie unless told otherwise: $FEDPACE_HOME/certs, which is ~/.fedpace/certs by default."""
    return Path(os.environ.get("FEDPACE_HOME") or "~/.fedpace").expanduser() / "certs"


def init_authority(directory: Path, *, hosts: Sequence[str] = (), days: int = 365, authority_days: int = 3650) -> None:
    """Make a new authority in `directory`, with a server's and an operator's certificate.

    The server's certificate is valid for localhost, 127.0.0.1, ::1, this machine's host name, and `hosts` (DNS names
    or IP addresses). `days` is the life of the two certificates, at most the rest of the authority's.

    Raises ConfigError for a host or a number of days that cannot be, CertificateError where the directory already
    holds an authority or certificates, or cannot be written.
    """
    names = _server_names(hosts)
    _check_days(days)
    _check_days(authority_days)
    with _staging(directory) as staging:
        for entry in ("ca.key", "ca.pem", "server", "operator", "devices", "cert.pem", "key.pem"):
            if (directory / entry).exists():
                raise CertificateError(
                    f"{directory} already holds certificates ({entry}): add a device to them with "
                    "`fedpace certs device NAME`; for a new authority choose another --dir, or move this one away "
                    "(certificates of the old one will not be accepted by the new one)"
                )
        signer = _new_authority(authority_days)
        server = Caller("server", _server_name())
        _write_identity(staging / "server", signer, server, days, names)
        _write_identity(staging / "operator", signer, Caller("operator", "admin"), days)
        _write(staging / "ca.pem", signer.certificate.public_bytes(Encoding.PEM), 0o644)
        _write(staging / "ca.key", private_pem(signer.key), 0o600)
        for entry in ("server", "operator", "ca.pem", "ca.key"):
            (staging / entry).rename(directory / entry)
        _sync(directory)


def issue_device(directory: Path, name: str, *, days: int = 365) -> Path:
    """Make the certificate of the device called `name`, and return its folder, `directory`/devices/`name`.

    `days` is its life, at most the rest of the authority's. Raises ConfigError for an impossible name or number of
    days, CertificateError where `directory` is not a working authority's or cannot be written, where the name has a
    certificate already, or where its node id is reserved or another device's.
    """
    check_name(name)
    _check_days(days)
    if not directory.is_dir():
        raise CertificateError(f"there is no folder {directory}: make an authority with `fedpace certs init`")
    folder = directory / "devices" / name
    with _staging(directory) as staging:
        signer = _read_authority(directory)
        issued = device_names(directory)
        if name in issued or folder.exists():  # the second where the file system does not tell case apart
            raise CertificateError(
                f"device {name!r} already has a certificate in {folder}: copy that folder to the device, "
                "or move it away first to have a new one (the node id stays the same)"
            )
        if node_id(name) in _RESERVED_NODE_IDS:
            raise CertificateError(f"the name {name!r} gives a reserved node id, {node_id(name)}: choose another name")
        for other in issued:
            if node_id(other) == node_id(name):
                raise CertificateError(f"the name {name!r} gives the node id of device {other!r}: choose another name")
        _write_identity(staging / name, signer, Caller("device", name), days)
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        (staging / name).rename(folder)
        _sync(folder.parent)
    return folder


def _read_authority(directory: Path) -> _Signer:
    path = directory / "ca.pem"
    if not (directory / "ca.key").exists():
        raise CertificateError(
            f"{directory} holds no authority (no ca.key): make one with `fedpace certs init`, "
            "or name its folder with --dir"
        )
    certificate = read_certificate(path)
    key = read_key(directory / "ca.key", certificate, path)
    check_dates(certificate, path)
    return _Signer(certificate, key)


def _new_authority(days: int) -> _Signer:
    key = ec.generate_private_key(ec.SECP256R1())
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    # The name is the authority's own, so that a foreign certificate is told by its issuer and not by its signature.
    name = _common_name(f"fedpace authority {identifier.digest[:4].hex()}")
    now = datetime.now(UTC)
    builder = (
        _builder(name, name, key.public_key(), now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(identifier, critical=False)
    )
    return _Signer(builder.sign(key, hashes.SHA256()), key)


def _write_identity(
    folder: Path, signer: _Signer, caller: Caller, days: int, hosts: Sequence[x509.GeneralName] = ()
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    usage = ExtendedKeyUsageOID.SERVER_AUTH if caller.role == "server" else ExtendedKeyUsageOID.CLIENT_AUTH
    ends = min(datetime.now(UTC) + timedelta(days=days), signer.certificate.not_valid_after_utc)
    builder = (
        _builder(_common_name(caller.name), signer.certificate.subject, key.public_key(), ends)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([*hosts, x509.UniformResourceIdentifier(caller.uri)]), critical=False
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key()), critical=False)
    )
    folder.mkdir(mode=0o700)
    _write(folder / "ca.pem", signer.certificate.public_bytes(Encoding.PEM), 0o644)
    _write(folder / "cert.pem", builder.sign(signer.key, hashes.SHA256()).public_bytes(Encoding.PEM), 0o644)
    _write(folder / "key.pem", private_pem(key), 0o600)
    _sync(folder)


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, ends: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - _SKEW)
        .not_valid_after(ends)
    )


def _common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _server_name() -> str:
    """The server's name in its certificate: the machine's, where that can be one."""
    try:
        check_name(socket.gethostname())
    except ConfigError:
        return "server"
    return socket.gethostname()


def _server_names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    machine = socket.gethostname()
    own = ["localhost", "127.0.0.1", "::1", *([machine] if _DNS_NAME.fullmatch(machine) else [])]
    return list(dict.fromkeys(_general_name(host) for host in [*own, *hosts]))


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if _DNS_NAME.fullmatch(host):
            return x509.DNSName(host.lower())
    raise ConfigError(
        f"{host[:300]!r} is neither a DNS name nor an IP address: give --host without scheme, port, brackets or *"
    )


def _check_days(days: int) -> None:
    if not 1 <= days <= _MAX_DAYS:
        raise ConfigError(f"a certificate cannot be valid for {days} days: choose from 1 to {_MAX_DAYS}")


@contextmanager
def _staging(directory: Path) -> Iterator[Path]:
    """A folder in `directory` (made where missing) in which to write what is then renamed into place."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=directory) as staging:
            yield Path(staging)
    except OSError as error:
        raise CertificateError(f"cannot write certificates in {directory}: {error.strerror}") from error


def _write(path: Path, data: bytes, mode: int) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
