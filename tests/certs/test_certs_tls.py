"""Certificates under real TLS: OpenSSL at its strictest, and gRPC."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from fedpace.certs.authority import init_authority, issue_device
from fedpace.certs.identity import Caller, Identity, caller_from_sans, load_identity
from fedpace.certs.probe import explain_failure

WHO = "/test/Who"
TIMEOUT = 5.0  # seconds


# OpenSSL


@pytest.mark.parametrize("folder", ["devices/edge-1", "operator"])
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1", "fleet.example", "192.0.2.7"])
def test_openssl_takes_both_ends_strictly(authority: Path, folder: str, host: str) -> None:
    server = strict_context(ssl.PROTOCOL_TLS_SERVER, authority / "server")
    client = strict_context(ssl.PROTOCOL_TLS_CLIENT, authority / folder)
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, futures.ThreadPoolExecutor(1) as pool:
        listener.settimeout(TIMEOUT)
        subject = pool.submit(greet, listener, server)
        with (
            socket.create_connection(listener.getsockname(), TIMEOUT) as connection,
            client.wrap_socket(connection, server_hostname=host) as channel,
        ):
            assert channel.version() == "TLSv1.3"
            assert channel.recv(5) == b"hello"
        role, name = folder.split("/") if "/" in folder else (folder, "admin")
        assert ("URI", f"fedpace://{role.rstrip('s')}/{name}") in subject.result(TIMEOUT)


def test_openssl_refuses_another_host(authority: Path) -> None:
    server = strict_context(ssl.PROTOCOL_TLS_SERVER, authority / "server")
    client = strict_context(ssl.PROTOCOL_TLS_CLIENT, authority / "operator")
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake_in_memory(client, server, "elsewhere.example")


def test_a_device_cannot_pose_as_the_server(authority: Path) -> None:
    server = strict_context(ssl.PROTOCOL_TLS_SERVER, authority / "devices" / "edge-1")
    client = strict_context(ssl.PROTOCOL_TLS_CLIENT, authority / "devices" / "edge-2")
    client.check_hostname = False
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        handshake_in_memory(client, server, None)


def strict_context(protocol: int, folder: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.load_verify_locations(folder / "ca.pem")
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context


def greet(listener: socket.socket, context: ssl.SSLContext) -> Any:
    connection, _ = listener.accept()
    connection.settimeout(TIMEOUT)
    with context.wrap_socket(connection, server_side=True) as channel:
        channel.sendall(b"hello")
        certificate = channel.getpeercert()
        assert certificate is not None
        return certificate["subjectAltName"]


def handshake_in_memory(client: ssl.SSLContext, server: ssl.SSLContext, host: str | None) -> None:
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(down, up, server_hostname=host), server.wrap_bio(up, down, server_side=True)]
    while ends:
        try:
            ends[0].do_handshake()
            ends.pop(0)
        except ssl.SSLWantReadError:
            ends.reverse()


# gRPC


class Who(grpc.GenericRpcHandler):
    """Answers every call with the URI of its caller, as the server hears it."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        return grpc.unary_unary_rpc_method_handler(self.answer)

    @staticmethod
    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        sans: Any = context.auth_context()["x509_subject_alternative_name"]  # a list, whatever the stubs say
        caller = caller_from_sans(sans)
        return caller.uri.encode() if caller else b"nobody"


@pytest.fixture(scope="module")
def port(authority: Path) -> Iterator[int]:
    """A gRPC server that requires client certificates."""
    identity = load_identity(authority, expect_role="server")
    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers([Who()])
    credentials = grpc.ssl_server_credentials([(identity.key, identity.cert)], identity.ca, require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    yield port
    server.stop(None).wait(TIMEOUT)


def device(directory: Path, name: str = "edge-1") -> Identity:
    return load_identity(directory, expect_role="device", name=name)


def ask(port: int, credentials: grpc.ChannelCredentials) -> str:
    with grpc.secure_channel(f"localhost:{port}", credentials) as channel:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(WHO)
        return call(b"", timeout=TIMEOUT).decode()


def test_grpc_tells_who_calls(authority: Path, port: int) -> None:
    for identity in (
        device(authority, "edge-1"),
        device(authority, "edge-2"),
        load_identity(authority, expect_role="operator"),
    ):
        credentials = grpc.ssl_channel_credentials(identity.ca, identity.key, identity.cert)
        assert ask(port, credentials) == identity.caller.uri


def test_asyncio_grpc_tells_who_calls(authority: Path) -> None:
    identity, server_identity = device(authority), load_identity(authority, expect_role="server")

    async def answer(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        caller = caller_from_sans(context.auth_context()["x509_subject_alternative_name"])
        return str(caller and caller.node_id).encode()

    async def main() -> bytes:
        server = grpc.aio.server()
        handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {"Who": grpc.unary_unary_rpc_method_handler(answer)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
        port = server.add_secure_port(
            "127.0.0.1:0",
            grpc.ssl_server_credentials([(server_identity.key, server_identity.cert)], server_identity.ca, True),
        )
        await server.start()
        try:
            credentials = grpc.ssl_channel_credentials(identity.ca, identity.key, identity.cert)
            async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
                call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(WHO)
                return await call(b"", timeout=TIMEOUT)
        finally:
            await server.stop(None)

    assert int(asyncio.run(main())) == Caller("device", "edge-1").node_id


def test_grpc_refuses_those_of_another_authority(authority: Path, port: int, tmp_path: Path) -> None:
    init_authority(tmp_path)
    issue_device(tmp_path, "edge-1")
    own, foreign = device(authority), device(tmp_path)
    for credentials in (
        grpc.ssl_channel_credentials(foreign.ca, foreign.key, foreign.cert),  # each refuses the other
        grpc.ssl_channel_credentials(own.ca, foreign.key, foreign.cert),  # the server refuses the client
        grpc.ssl_channel_credentials(own.ca),  # no certificate at all
    ):
        with pytest.raises(grpc.RpcError) as caught:
            ask(port, credentials)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(("version", "taken"), [(ssl.TLSVersion.TLSv1_2, False), (ssl.TLSVersion.TLSv1_3, True)])
def test_grpc_speaks_tls_1_3_only(authority: Path, port: int, version: ssl.TLSVersion, taken: bool) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    folder = authority / "devices" / "edge-1"
    context.load_verify_locations(folder / "ca.pem")
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    with socket.create_connection(("127.0.0.1", port), TIMEOUT) as connection:
        if taken:
            with context.wrap_socket(connection, server_hostname="localhost") as channel:
                assert channel.version() == "TLSv1.3" and channel.recv(9)
        else:
            with pytest.raises((ssl.SSLError, ConnectionError)):
                context.wrap_socket(connection, server_hostname="localhost")


# The probe against gRPC


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_the_probe_finds_nothing_wrong(authority: Path, port: int, host: str) -> None:
    assert explain_failure(host, port, device(authority)) is None


def test_the_probe_names_the_servers_authority(port: int, tmp_path: Path) -> None:
    init_authority(tmp_path)
    issue_device(tmp_path, "edge-1")
    assert "is of another authority" in (explain_failure("localhost", port, device(tmp_path)) or "")


def test_the_probe_sees_that_grpc_refused(authority: Path, port: int, tmp_path: Path) -> None:
    """gRPC sends no alert: it closes."""
    init_authority(tmp_path)
    issue_device(tmp_path, "stranger")
    stranger, own = device(tmp_path, "stranger"), device(authority)
    mixed = Identity(stranger.caller, own.ca, stranger.cert, stranger.key, stranger.not_after)
    sentence = explain_failure("localhost", port, mixed) or ""
    assert "closed the connection when it saw our certificate (device 'stranger')" in sentence


def test_the_probe_tells_an_insecure_grpc_server(authority: Path) -> None:
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        sentence = explain_failure("localhost", port, device(authority)) or ""
    finally:
        server.stop(None).wait(TIMEOUT)
    assert "does not speak TLS" in sentence and "--insecure" in sentence
