"""Why a TLS connection to a server fails, in one sentence: gRPC tells neither side."""

from __future__ import annotations

import os
import socket
import ssl
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from fedpace.certs.identity import Identity, host_names, show_time

# What OpenSSL calls a failed check of the server's certificate (X509_V_ERR_*).
_FOREIGN = frozenset({7, 18, 19, 20, 21, 30})
_NOT_YET_VALID, _EXPIRED, _UNFIT = 9, 10, 26
_OTHER_HOST = frozenset({62, 64})

# The alerts with which a server turns a client's certificate down, by a part of OpenSSL's name for each.
_ALERTS = {
    "UNKNOWN_CA": "it was issued by another authority than the server's; have one made by the server's authority",
    "CERTIFICATE_EXPIRED": "by the server's clock it expired or is not valid yet; check both clocks and its dates",
    "CERTIFICATE_REQUIRED": "it did not arrive; the server asks for one",
    "CERTIFICATE_REVOKED": "it was revoked; have a new one made",
    "BAD_CERTIFICATE": "it is malformed, or not signed by the authority it names; have one made by the server's",
    "UNSUPPORTED_CERTIFICATE": "it is not one for a client; use a device's or an operator's",
    "CERTIFICATE_UNKNOWN": "of something else about it; see the server's log",
    "ACCESS_DENIED": "its holder is not let in; ask the server's operator",
}


def explain_failure(host: str, port: int, identity: Identity, *, timeout: float = 3.0) -> str | None:
    """Dial a server as gRPC would, and say in one sentence what is wrong and what to do; None where all is well.

    `host` is a name or an IP address, without brackets. Blocks for at most a few times `timeout` seconds, beside
    what the system takes to look up the host's name. Sends nothing above TLS.
    Raises OSError where no temporary file can be written.
    """
    where = _where(host, port)
    context = _context(identity)
    try:
        connection = socket.create_connection((host, port), timeout)
    except (OSError, UnicodeError) as error:
        return _explain_dial(where, error, timeout)
    with connection:
        try:
            channel = context.wrap_socket(connection, server_hostname=host, do_handshake_on_connect=False)
        except (OSError, ValueError) as error:
            return f"{where} cannot be spoken to over TLS: {error}; check the address"
        with channel:
            return _explain_channel(channel, host, port, identity, timeout)


def _where(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _explain_channel(channel: ssl.SSLSocket, host: str, port: int, identity: Identity, timeout: float) -> str | None:
    where = _where(host, port)
    try:
        channel.do_handshake()
    except ssl.SSLCertVerificationError as error:
        return _explain_server(where, error, _server_certificate(host, port, timeout), identity)
    except (OSError, ValueError) as error:
        return _explain_handshake(where, error, timeout)
    if channel.selected_alpn_protocol() != "h2":
        return f"{where} speaks TLS but not HTTP/2, so it is not a fedpace server: check the address"
    try:
        # In TLS 1.3 the client is done before the server has seen its certificate. A server that takes it sends
        # its HTTP/2 settings; one that does not sends an alert. (Writing first could lose the alert to a reset.)
        if channel.recv(1):
            return None
    except (OSError, ValueError) as error:
        return _explain_after(where, error, identity, timeout)
    return _explain_after(where, ssl.SSLEOFError(), identity, timeout)


def _explain_dial(where: str, error: OSError | UnicodeError, timeout: float) -> str:
    if isinstance(error, ConnectionRefusedError):
        return f"nothing listens at {where}: start the server, or check the address"
    if isinstance(error, socket.gaierror | UnicodeError):
        return f"the host name of {where} cannot be resolved ({error}): check the name, or use the IP address"
    if isinstance(error, TimeoutError):
        return f"{where} did not answer in {timeout:g} s: check the address, the network and firewalls between"
    return f"{where} cannot be reached ({error}): check the address and the network"


def _explain_handshake(where: str, error: Exception, timeout: float) -> str:
    reason = _reason(error)
    if isinstance(error, TimeoutError):
        return f"{where} takes connections but did not answer TLS in {timeout:g} s: it hangs, or does not speak TLS"
    if "PROTOCOL_VERSION" in reason or "UNSUPPORTED_PROTOCOL" in reason:
        return f"{where} does not speak TLS 1.3: a fedpace server does, so check the address and proxies between"
    if "ALPN" in reason or "APPLICATION_PROTOCOL" in reason:
        return f"{where} speaks TLS but not HTTP/2, so it is not a fedpace server: check the address"
    if "ALERT" in reason:
        return f"{where} refused the TLS handshake ({reason}): check that it is a fedpace server, and its certificate"
    return (
        f"{where} does not speak TLS ({reason}): check that it is a fedpace server and was not started with --insecure"
    )


def _explain_server(
    where: str, error: ssl.SSLCertVerificationError, certificate: x509.Certificate | None, identity: Identity
) -> str:
    code = error.verify_code
    clock = f"this machine's clock, which reads {show_time(datetime.now(UTC))}"
    if code in _FOREIGN:
        ours = _issuer(x509.load_pem_x509_certificate(identity.cert))
        theirs = _issuer(certificate) if certificate else "unknown"
        return (
            f"the certificate of {where} is of another authority ({theirs!r}) than ours ({ours!r}): "
            "check the address, or have a certificate made by the server's authority"
        )
    if code == _EXPIRED:
        since = f" on {show_time(certificate.not_valid_after_utc)}" if certificate else ""
        return f"the certificate of {where} expired{since}: the server needs a new one, unless {clock}, is wrong"
    if code == _NOT_YET_VALID:
        until = f" before {show_time(certificate.not_valid_before_utc)}" if certificate else " yet"
        return f"the certificate of {where} is not valid{until}: {clock}, may be wrong; set it"
    if code in _OTHER_HOST:
        names = ", ".join(host_names(certificate) if certificate else ()) or "none that is known"
        return (
            f"the certificate of {where} is not for that host, but for {names}: dial one of these, "
            "or make the server's certificate with `fedpace certs init --host NAME`"
        )
    if code == _UNFIT:
        return f"the certificate of {where} is not one for a server: give the server the authority's `server` folder"
    return f"the certificate of {where} does not hold ({error.verify_message}): make it with `fedpace certs init`"


def _explain_after(where: str, error: Exception, identity: Identity, timeout: float) -> str:
    if isinstance(error, TimeoutError):
        return f"{where} took our connection but said nothing for {timeout:g} s: it is overloaded, or hangs"
    ours = f"our certificate ({identity.caller.role} {identity.caller.name!r})"
    reason = _reason(error)
    for alert, cause in _ALERTS.items():
        if f"ALERT_{alert}" in reason:
            return f"{where} refused {ours}: {cause}"
    return (
        f"{where} closed the connection when it saw {ours} ({reason}): it is probably of another authority than "
        "the server's, or not valid by the server's clock"
    )


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLEOFError | ConnectionError):
        return "closed by the other side"
    return (isinstance(error, ssl.SSLError) and error.reason) or str(error)


def _context(identity: Identity | None) -> ssl.SSLContext:
    """TLS 1.3 and HTTP/2, as gRPC has it; with no identity one that takes any certificate and shows none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    if identity is None:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context
    context.load_verify_locations(cadata=identity.ca.decode("ascii"))
    with tempfile.TemporaryDirectory() as directory:  # ssl reads keys from files only
        path = Path(directory) / "identity.pem"
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(identity.cert + identity.key)
        context.load_cert_chain(path)
    return context


def _server_certificate(host: str, port: int, timeout: float) -> x509.Certificate | None:
    """What the server shows, unchecked, to say what is wrong with it; None where it cannot be had."""
    try:
        with (
            socket.create_connection((host, port), timeout) as connection,
            _context(None).wrap_socket(connection) as channel,
        ):
            return x509.load_der_x509_certificate(channel.getpeercert(binary_form=True) or b"")
    except (OSError, ValueError):
        return None


def _issuer(certificate: x509.Certificate) -> str:
    try:
        return certificate.issuer.rfc4514_string().removeprefix("CN=")[:100]
    except ValueError:  # anybody's certificate: its parts are parsed on first use
        return "unknown"
