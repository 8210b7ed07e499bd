"""Who a certificate says its holder is, and a certificate folder checked before it is used."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import verification

from fedpace.errors import CertificateError, ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_URI = re.compile(rf"fedpace://(device|operator|admin|server)/({_NAME.pattern})")
_LISTED = 20  # names shown in a message


def check_name(name: str) -> None:
    """Raise ConfigError unless `name` is 1 to 64 of A-Z a-z 0-9 . _ - and begins with a letter or digit."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name[:100]!r} is not a name for a certificate: "
            "use 1 to 64 of A-Z a-z 0-9 . _ - and begin with a letter or a digit"
        )


@functools.lru_cache(maxsize=4096)
def node_id(name: str) -> int:
    """The node id of the device called `name`: the first 63 bits of SHA-256 of its UTF-8 bytes."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Caller:
    """What a certificate's URI `fedpace://ROLE/NAME` says; `role` is device, operator, admin or server."""

    role: str
    name: str

    @property
    def node_id(self) -> int:
        return node_id(self.name)

    @property
    def uri(self) -> str:
        return f"fedpace://{self.role}/{self.name}"


def parse_uri(uri: str) -> Caller | None:
    """The caller that `uri` names, or None where it is not exactly `fedpace://ROLE/NAME`."""
    match = _URI.fullmatch(uri)
    return Caller(match[1], match[2]) if match else None


def caller_from_sans(sans: Iterable[bytes]) -> Caller | None:
    """The caller among a certificate's subject alternative names, given as gRPC gives them (kinds not told apart).

    None unless exactly one begins with `fedpace://` and that one is well formed: who is two is nobody.
    """
    ours = [san for san in sans if san.startswith(b"fedpace://")]
    return parse_uri(ours[0].decode("ascii", "replace")) if len(ours) == 1 else None


@dataclass(frozen=True)
class Identity:
    """A checked certificate with its key (PKCS #8) and its authority's certificate, all PEM; `not_after` is in UTC."""

    caller: Caller
    ca: bytes = field(repr=False)
    cert: bytes = field(repr=False)
    key: bytes = field(repr=False)
    not_after: datetime


def load_identity(directory: Path, *, expect_role: str, name: str | None = None) -> Identity:
    """Read a certificate folder, and check all of it before any of it is used.

    `directory` holds ca.pem, cert.pem and key.pem, or is an authority's, in which case the folder `server`,
    `operator` or `devices/NAME` in it is taken; a device's `name` may be left out where there is only one.

    Raises CertificateError, naming the file, where something is missing, malformed, expired, not valid yet, of
    another authority, of another role or name; ConfigError where `name` must be given.
    """
    try:
        folder = _identity_folder(directory, expect_role, name)
    except OSError as error:
        raise CertificateError(f"cannot read the certificate folder {directory}: {error.strerror}") from error
    ca = read_certificate(folder / "ca.pem")
    cert_path = folder / "cert.pem"
    cert = read_certificate(cert_path)
    key = read_key(folder / "key.pem", cert, cert_path)
    caller = _caller(cert, cert_path)
    if caller.role != expect_role:
        raise CertificateError(
            f"{cert_path} is the certificate of {_whose(caller)}, but the one of a {expect_role} is needed here: "
            "point --certs at the right folder"
        )
    if name is not None and caller.name != name:
        raise CertificateError(
            f"{cert_path} is the certificate of {_whose(caller)}, not of {name!r}: "
            f"leave the name out, or point --certs at the folder of {name!r}"
        )
    _check_chain(caller, cert, cert_path, ca, folder / "ca.pem")
    return Identity(
        caller=caller,
        # Written anew, so that what is used is what was checked and nothing else that the files may hold.
        ca=ca.public_bytes(serialization.Encoding.PEM),
        cert=cert.public_bytes(serialization.Encoding.PEM),
        key=private_pem(key),
        not_after=min(cert.not_valid_after_utc, ca.not_valid_after_utc),
    )


def device_names(authority: Path) -> list[str]:
    """The names of the devices whose certificates lie in an authority's folder, sorted."""
    devices = authority / "devices"
    return sorted(path.name for path in devices.iterdir() if _NAME.fullmatch(path.name)) if devices.is_dir() else []


def host_names(certificate: x509.Certificate) -> list[str]:
    """The DNS names and IP addresses a server's certificate is valid for, in its order."""
    names = [san for san in _sans(certificate) if isinstance(san, x509.DNSName | x509.IPAddress)]
    return [str(name.value) for name in names]


def read_certificate(path: Path) -> x509.Certificate:
    """The one PEM certificate in `path`; raises CertificateError."""
    try:
        certificates = x509.load_pem_x509_certificates(_read(path))
        if len(certificates) == 1:
            _sans(certificates[0])  # extensions are parsed on first use: a malformed one is to be found here
            return certificates[0]
    except (ValueError, UnsupportedAlgorithm) as error:
        raise CertificateError(
            f"{path} is not a certificate in PEM form (damaged or cut short?): copy it again from where it was made"
        ) from error
    raise CertificateError(f"{path} holds {len(certificates)} certificates where one is expected: keep the right one")


def read_key(path: Path, certificate: x509.Certificate, certificate_path: Path) -> ec.EllipticCurvePrivateKey:
    """The unencrypted P-256 key in `path`, which must be the one of `certificate`; raises CertificateError."""
    try:
        key = serialization.load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise CertificateError(
            f"{path} is not an unencrypted private key in PEM form (damaged or cut short?): "
            "copy it again from where it was made"
        ) from error
    # An RSA key would let TLS 1.2 in again (see fedpace/__init__.py), and grpcio refuses Ed25519.
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise CertificateError(f"{path} is not a P-256 key: make certificate and key with `fedpace certs`")
    if key.public_key() != certificate.public_key():
        raise CertificateError(
            f"{path} is not the key of {certificate_path}: copy both from the same folder of the authority"
        )
    return key


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The key as unencrypted PKCS #8 in PEM form."""
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def show_time(moment: datetime) -> str:
    """A time in UTC as messages have it, to the second."""
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC")


def check_dates(certificate: x509.Certificate, path: Path) -> None:
    """Raise CertificateError unless the certificate is valid now, by this machine's clock."""
    now = datetime.now(UTC)
    clock = f"this machine's clock, which reads {show_time(now)}"
    if now < certificate.not_valid_before_utc:
        raise CertificateError(
            f"{path} is not valid before {show_time(certificate.not_valid_before_utc)}: {clock}, may be wrong; set it"
        )
    if now > certificate.not_valid_after_utc:
        raise CertificateError(
            f"{path} expired on {show_time(certificate.not_valid_after_utc)}: "
            f"have a new one made with `fedpace certs`, unless {clock}, is wrong"
        )


def _identity_folder(directory: Path, role: str, name: str | None) -> Path:
    if not directory.is_dir():
        raise CertificateError(
            f"there is no certificate folder {directory}: make an authority with `fedpace certs init`, "
            "copy the folder that was made for this machine, or name it with --certs"
        )
    if any((directory / file).exists() for file in ("cert.pem", "key.pem")):
        return directory
    if role != "device":
        return directory / role
    if name is not None:
        check_name(name)
        return directory / "devices" / name
    names = device_names(directory)
    if not names:
        raise CertificateError(f"{directory} holds no device's certificate: make one with `fedpace certs device NAME`")
    if len(names) > 1:
        listed = ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
        raise ConfigError(f"{directory} holds the certificates of {len(names)} devices: choose with --name ({listed})")
    return directory / "devices" / names[0]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise CertificateError(
            f"{path} does not exist: a certificate folder holds ca.pem, cert.pem and key.pem; copy the whole folder, "
            "or make one with `fedpace certs`"
        ) from error
    except OSError as error:
        raise CertificateError(f"cannot read {path}: {error.strerror}") from error


def _sans(certificate: x509.Certificate) -> list[x509.GeneralName]:
    try:
        return list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return []


def _caller(certificate: x509.Certificate, path: Path) -> Caller:
    uris = [san.value for san in _sans(certificate) if isinstance(san, x509.UniformResourceIdentifier)]
    caller = caller_from_sans(uri.encode() for uri in uris)
    if caller is None:
        raise CertificateError(
            f"{path} does not say whose it is (one name like fedpace://device/NAME): make it with `fedpace certs`"
        )
    return caller


def _whose(caller: Caller) -> str:
    return f"the {caller.role} {caller.name!r}"


def _check_chain(caller: Caller, cert: x509.Certificate, cert_path: Path, ca: x509.Certificate, ca_path: Path) -> None:
    """Issuer first, then dates, then all that path validation asks for, so that the commonest causes get own words."""
    try:
        cert.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise CertificateError(
            f"{cert_path} was not issued by the authority in {ca_path}: "
            "copy both from the same authority, never from two of them"
        ) from error
    check_dates(ca, ca_path)
    check_dates(cert, cert_path)
    policy = verification.PolicyBuilder().store(verification.Store([ca])).time(datetime.now(UTC))
    try:
        if caller.role == "server":
            hosts = [san for san in _sans(cert) if isinstance(san, x509.DNSName | x509.IPAddress)]
            if not hosts:
                raise CertificateError(f"{cert_path} names no host: make it with `fedpace certs init --host NAME`")
            policy.build_server_verifier(hosts[0]).verify(cert, [])
        else:
            policy.build_client_verifier().verify(cert, [])
    except (verification.VerificationError, ValueError) as error:
        raise CertificateError(
            f"{cert_path} does not hold against {ca_path}: {error}; make both with `fedpace certs`"
        ) from error
