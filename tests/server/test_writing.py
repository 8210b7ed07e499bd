"""Chunks that threads write: in order, a few behind, and what goes wrong reaches whoever brings the next."""

from __future__ import annotations

import asyncio
import random
import threading
from pathlib import Path

import pytest

from fedpace.errors import PayloadError
from fedpace.protocol.blobs import BlobStore, IncomingBlob, digest
from fedpace.server.writing import Writers

SECONDS = 20.0


def incoming(folder: Path, data: bytes) -> IncomingBlob:
    return BlobStore(folder).incoming(digest([data]), len(data))


def test_side_by_side_each_transfer_is_written_in_order(tmp_path: Path) -> None:
    rng = random.Random(0)
    contents = [rng.randbytes(200_000) for _ in range(8)]
    writers = Writers(threads=2)

    async def move(data: bytes) -> None:
        blob = incoming(tmp_path, data)
        async with writers.open(blob) as writer:
            for start in range(0, len(data), 3_000):
                await writer.write(data[start : start + 3_000])
                if start % 7 == 0:
                    await asyncio.sleep(0)
            await writer.flush()
            assert blob.offset == len(data)
            blob.finish()

    async def scene() -> None:
        async with asyncio.timeout(SECONDS):
            await asyncio.gather(*map(move, contents))

    asyncio.run(scene())
    for data in contents:
        assert (tmp_path / digest([data]).hex()).read_bytes() == data


def test_a_chunk_that_cannot_be_written_ends_the_transfer_and_no_other(tmp_path: Path) -> None:
    async def scene() -> None:
        writers = Writers(threads=1)
        async with asyncio.timeout(SECONDS):
            with pytest.raises(PayloadError, match="more than the 4 bytes announced"):
                async with writers.open(incoming(tmp_path / "long", b"four")) as writer:
                    for _ in range(100):
                        await writer.write(b"three")
                    await writer.flush()
            async with writers.open(incoming(tmp_path / "good", b"four")) as writer:
                await writer.write(b"four")
                await writer.flush()

    asyncio.run(scene())


def test_whoever_brings_chunks_faster_than_they_are_written_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    written = []

    def slowly(self: IncomingBlob, data: bytes) -> None:
        go.wait(SECONDS)
        written.append(data)

    monkeypatch.setattr(IncomingBlob, "write", slowly)

    async def scene() -> None:
        async with Writers(threads=1).open(incoming(tmp_path, bytes(10))) as writer:
            taken = 0
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    for _ in range(10):
                        await writer.write(b"x")
                        taken += 1
            assert taken == 2
            go.set()
            async with asyncio.timeout(SECONDS):
                await writer.write(b"y")
                await writer.flush()
            assert written == [b"x"] * 2 + [b"y"]

    asyncio.run(scene())


def test_a_transfer_that_breaks_off_leaves_its_thread_to_the_next(tmp_path: Path) -> None:
    async def scene() -> None:
        writers = Writers(threads=1)
        async with asyncio.timeout(SECONDS):
            async with writers.open(incoming(tmp_path / "broken", bytes(100))) as writer:
                for _ in range(4):
                    await writer.write(bytes(10))
            async with writers.open(incoming(tmp_path / "whole", bytes(10))) as writer:
                await writer.write(bytes(10))
                await writer.flush()

    asyncio.run(scene())
    assert (tmp_path / "broken" / f"{digest([bytes(100)]).hex()}.part").stat().st_size <= 40
