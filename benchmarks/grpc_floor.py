"""The floor under any gRPC transport: the same bytes over bare bidirectional streams, mTLS, to peer processes and back.

A peer takes all the chunks of an exchange, then returns them as they came; nothing is parsed, stored or computed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

# Before grpc: the package narrows the cipher list, here as in the fleet.
from fedpace.certs.authority import init_authority, issue_device
from fedpace.certs.identity import load_identity
from fedpace.errors import RunError

import grpc  # isort: skip

ROOT = Path(__file__).resolve().parents[1]
CHUNK = 1 << 20
ENVELOPE = 1024  # bytes of names, shapes and metrics beside the arrays of a message
START_SECONDS = 60.0
EXCHANGE_SECONDS = 300.0

Stream = Any  # either end of grpc.aio's, whose stubs are generic in types that are not so at run time


def echo_ms(certs: Path, rounds: int, peers: int, model_bytes: int) -> list[float]:
    """Milliseconds of each round: one message of a model to every peer and back, twice (train, evaluate)."""
    payload = [os.urandom(model_bytes + ENVELOPE)]
    return [1e3 * seconds for seconds in asyncio.run(measure(certs, payload, peers, rounds, exchanges=2))]


def fan_out_seconds(certs: Path, repetitions: int, peers: int, model_bytes: int) -> list[float]:
    """Seconds of each repetition: `model_bytes` from memory to every peer in chunks of 1 MiB, and back."""
    payload = [os.urandom(min(CHUNK, model_bytes - offset)) for offset in range(0, model_bytes, CHUNK)]
    return asyncio.run(measure(certs, payload, peers, repetitions, exchanges=1))


def make_certificates(certs: Path, peers: int) -> None:
    """An authority in `certs`, with a server certificate and devices device-0, device-1, ..."""
    init_authority(certs)
    for index in range(peers):
        issue_device(certs, f"device-{index}")


async def measure(certs: Path, payload: list[bytes], peers: int, repetitions: int, exchanges: int) -> list[float]:
    """Seconds of each repetition of `exchanges` exchanges of `payload`, after one that is not counted."""
    seconds = []
    async with streams_to(certs, peers, len(payload)) as streams:
        for _ in range(repetitions + 1):
            start = time.perf_counter()
            for _ in range(exchanges):
                async with time_limit(EXCHANGE_SECONDS, f"{peers} peers did not return what they were sent"):
                    await asyncio.gather(*(exchange(stream, payload) for stream in streams))
            seconds.append(time.perf_counter() - start)
    return seconds[1:]


@contextlib.asynccontextmanager
async def time_limit(seconds: float, what: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise RunError(f"{what} within {seconds:.0f} s on the gRPC floor") from error


async def exchange(stream: Stream, payload: list[bytes]) -> None:
    """Send all chunks down one stream, then count the same number of bytes back."""
    for chunk in payload:
        await stream.write(chunk)
    for chunk in payload:
        if len(await stream.read()) != len(chunk):
            raise RunError("a peer of the gRPC floor broke off, or returned another number of bytes than it was sent")


@contextlib.asynccontextmanager
async def streams_to(certs: Path, peers: int, chunks: int) -> AsyncIterator[list[Stream]]:
    """One open stream to each of `peers` new processes; they end with the block."""
    streams: list[Stream] = []
    arrived, finished = asyncio.Event(), asyncio.Event()

    async def accept(_: Any, stream: Stream) -> None:
        streams.append(stream)
        if len(streams) == peers:
            arrived.set()
        await finished.wait()

    identity = load_identity(certs, expect_role="server")
    server = grpc.aio.server()
    handlers: dict[str, Any] = {"Exchange": grpc.stream_stream_rpc_method_handler(accept)}
    server.add_registered_method_handlers("floor.Floor", handlers)
    credentials = grpc.ssl_server_credentials([(identity.key, identity.cert)], identity.ca, require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    with peer_processes(certs, port, peers, chunks):
        try:
            async with time_limit(START_SECONDS, f"{peers} peers did not connect"):
                await arrived.wait()
            yield streams
        finally:
            finished.set()
            await server.stop(grace=1.0)


@contextlib.contextmanager
def peer_processes(certs: Path, port: int, peers: int, chunks: int) -> Iterator[None]:
    command = [sys.executable, "-m", "benchmarks.grpc_floor", str(port), str(chunks)]
    started = []
    try:
        for index in range(peers):
            folder = certs / "devices" / f"device-{index}"
            started.append(subprocess.Popen([*command, str(folder)], cwd=ROOT))
        yield
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait()


async def peer(port: int, chunks: int, folder: Path) -> None:
    """Return every `chunks` messages as they came, once they are all here, until the server ends the stream."""
    identity = load_identity(folder, expect_role="device")
    credentials = grpc.ssl_channel_credentials(identity.ca, identity.key, identity.cert)
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials) as channel:
        stream: Stream = channel.stream_stream("/floor.Floor/Exchange")()
        while True:
            received = [await stream.read() for _ in range(chunks)]
            if received[-1] is grpc.aio.EOF:
                return
            for chunk in received:
                await stream.write(chunk)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One peer of the floor; the benchmarks start it.")
    parser.add_argument("port", type=int)
    parser.add_argument("chunks", type=int)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    asyncio.run(peer(options.port, options.chunks, options.folder))
