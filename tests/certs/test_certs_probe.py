"""One real server on loopback for each thing that can be wrong."""

from __future__ import annotations

import contextlib
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fedpace.certs import probe
from fedpace.certs.identity import Identity, load_identity
from fedpace.certs.probe import explain_failure

if TYPE_CHECKING:
    from tests.certs.conftest import Forger

Behaviour = Callable[[socket.socket], None]


@contextlib.contextmanager
def server(behaviour: Behaviour) -> Iterator[int]:
    """Gives each connection to `behaviour` until the context ends; yields the port."""
    listener = socket.create_server(("127.0.0.1", 0))
    closing = threading.Event()

    def serve() -> None:
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                if closing.is_set():
                    return
                connection.settimeout(5)
                behaviour(connection)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        closing.set()
        socket.create_connection(listener.getsockname(), 5).close()
        thread.join(5)
        listener.close()
        assert not thread.is_alive()


def tls(
    folder: Path, *, trusts: Path | None = None, alpn: str = "h2", greeting: bytes = b"settings", silence: float = 0
) -> Behaviour:
    """A TLS server with the certificate in `folder` that requires a client's by the authority in `trusts`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols([alpn])
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    context.load_verify_locations((trusts or folder) / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED

    def behaviour(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as channel:
            time.sleep(silence)
            channel.sendall(greeting)

    return behaviour


def explain(behaviour: Behaviour, identity: Identity, *, host: str = "localhost", timeout: float = 3) -> str:
    with server(behaviour) as port:
        started = time.monotonic()
        sentence = explain_failure(host, port, identity, timeout=timeout)
        assert time.monotonic() - started < 3 * timeout + 1
    assert sentence is None or f"{host}:{port}" in sentence
    return sentence or "all is well"


@pytest.fixture
def device(authority: Path) -> Identity:
    return load_identity(authority, expect_role="device", name="edge-1")


@pytest.fixture
def forged_device(forger: Forger) -> Identity:
    return load_identity(forger.write("a"), expect_role="device")


def forged_server(forger: Forger, *, starts: float = -1, ends: float = 30, host: str = "localhost") -> Path:
    return forger.write(
        "server", uris=["fedpace://server/s"], hosts=[host], starts=starts, ends=ends, server=host != "unfit"
    )


# Before TLS


def test_all_is_well(authority: Path, device: Identity) -> None:
    assert explain(tls(authority / "server"), device) == "all is well"


def test_nothing_listens(device: Identity) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, and never listening: nobody else can take the port meanwhile
        port = unused.getsockname()[1]
        assert explain_failure("127.0.0.1", port, device) == (
            f"nothing listens at 127.0.0.1:{port}: start the server, or check the address"
        )


def test_an_ipv6_address_is_told_from_its_port(device: Identity) -> None:
    assert "[::1]:1" in (explain_failure("::1", 1, device) or "")


@pytest.mark.parametrize("host", ["two..dots", "x" * 64 + ".example"])
def test_no_such_host(device: Identity, host: str) -> None:
    assert f"the host name of {host}:1 cannot be resolved" in (explain_failure(host, 1, device) or "")


def test_an_address_that_does_not_answer(device: Identity) -> None:
    """A listener whose queue is full drops what comes, as a firewall does."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, contextlib.ExitStack() as stack:
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        sentence = explain_failure("127.0.0.1", listener.getsockname()[1], device, timeout=0.2)
    assert "did not answer in 0.2 s" in (sentence or "")


# Not our TLS


def test_not_tls(device: Identity) -> None:
    assert "does not speak TLS" in explain(lambda connection: connection.sendall(b"SSH-2.0-server\r\n"), device)


def test_closes_at_once(device: Identity) -> None:
    assert "does not speak TLS" in explain(lambda connection: None, device)


def test_says_nothing(device: Identity) -> None:
    assert "did not answer TLS in 0.2 s" in explain(lambda connection: time.sleep(0.5), device, timeout=0.2)


def test_tls_1_2(authority: Path, device: Identity) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(authority / "server" / "cert.pem", authority / "server" / "key.pem")
    sentence = explain(lambda connection: context.wrap_socket(connection, server_side=True).close(), device)
    assert "does not speak TLS 1.3" in sentence


def test_not_http_2(authority: Path, device: Identity) -> None:
    assert "not HTTP/2" in explain(tls(authority / "server", alpn="http/1.1"), device)


# The server's certificate


@pytest.mark.parametrize("name", ["forger", "fedpace authority 00000000"])
def test_a_server_of_another_authority(
    authority: Path, forged_device: Identity, forger: Forger, tmp_path: Path, name: str
) -> None:
    other = forger.make(tmp_path / "other", name=name)
    sentence = explain(tls(forged_server(other)), forged_device)
    assert f"is of another authority ({name!r}) than ours ('forger')" in sentence


def test_an_expired_server(forger: Forger, forged_device: Identity) -> None:
    sentence = explain(tls(forged_server(forger, starts=-9, ends=-2)), forged_device)
    assert "expired on 2" in sentence and "clock, which reads 2" in sentence


def test_a_server_not_yet_valid(forger: Forger, forged_device: Identity) -> None:
    sentence = explain(tls(forged_server(forger, starts=2, ends=9)), forged_device)
    assert "is not valid before 2" in sentence and "clock, which reads 2" in sentence


@pytest.mark.parametrize(("host", "names"), [("localhost", "192.0.2.7"), ("127.0.0.1", "fleet.example")])
def test_a_server_for_another_host(forger: Forger, forged_device: Identity, host: str, names: str) -> None:
    sentence = explain(tls(forged_server(forger, host=names)), forged_device, host=host)
    assert f"is not for that host, but for {names}: dial one of these" in sentence


def test_a_server_with_a_devices_certificate(forger: Forger, forged_device: Identity) -> None:
    assert "is not one for a server" in explain(tls(forged_server(forger, host="unfit")), forged_device)


# Ours


def test_the_server_does_not_know_our_authority(authority: Path, forger: Forger, forged_device: Identity) -> None:
    sentence = explain(tls(forged_server(forger), trusts=authority), forged_device)
    assert "refused our certificate (device 'a'): it was issued by another authority" in sentence


def test_the_server_finds_ours_expired(forger: Forger, forged_device: Identity) -> None:
    folder = forger.write("late", starts=-9, ends=-2)
    late = Identity(
        forged_device.caller,
        forged_device.ca,
        (folder / "cert.pem").read_bytes(),
        (folder / "key.pem").read_bytes(),
        forged_device.not_after,
    )
    sentence = explain(tls(forged_server(forger)), late)
    assert "refused our certificate (device 'a'): by the server's clock it expired" in sentence


def test_the_server_finds_ours_to_be_a_servers(forger: Forger) -> None:
    folder = forged_server(forger)
    sentence = explain(tls(folder), load_identity(folder, expect_role="server"))
    assert "refused our certificate (server 's'): it is not one for a client" in sentence


def test_our_certificate_does_not_arrive(
    forger: Forger, forged_device: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.set_alpn_protocols(["h2"])
    bare.load_verify_locations(cadata=forged_device.ca.decode())
    monkeypatch.setattr(probe, "_context", lambda identity: bare)
    assert "it did not arrive" in explain(tls(forged_server(forger)), forged_device)


def test_a_server_that_closes_without_a_word(authority: Path, device: Identity) -> None:
    sentence = explain(tls(authority / "server", greeting=b""), device)
    assert "closed the connection when it saw our certificate (device 'edge-1')" in sentence


def test_a_server_that_takes_us_and_hangs(authority: Path, device: Identity) -> None:
    sentence = explain(tls(authority / "server", silence=0.8), device, timeout=0.5)
    assert "said nothing for 0.5 s" in sentence


def test_no_key_stays_on_disk(
    authority: Path, device: Identity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert explain(tls(authority / "server"), device) == "all is well"
    assert list(tmp_path.iterdir()) == []
