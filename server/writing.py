"""Bytes that arrive, hashed and written by a few threads, so that the event loop goes on meanwhile.

A chunk is handed over without a future of its own and without waking the loop when it is done: with a hundred chunks a
transfer that would cost as much as receiving them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from queue import SimpleQueue
from typing import Self

from fedpace.protocol.blobs import IncomingBlob
from fedpace.protocol.chunks import Bytes

_THREADS = 3
_BEHIND = 2  # chunks of a transfer that may wait to be written


class Writers:
    """The threads. A transfer keeps to one of them, which writes its chunks in order."""

    def __init__(self, threads: int = _THREADS) -> None:
        queues = [SimpleQueue[tuple[Writer, Bytes]]() for _ in range(threads)]
        for queue in queues:
            threading.Thread(target=_write, args=(queue,), name="writer", daemon=True).start()
        self._queues = itertools.cycle(queues)

    def open(self, incoming: IncomingBlob) -> Writer:
        return Writer(incoming, next(self._queues))


def _write(queue: SimpleQueue[tuple[Writer, Bytes]]) -> None:
    while True:
        writer, data = queue.get()
        writer.write_now(data)
        del writer, data


class Writer:
    """Takes the chunks of one transfer. The end of its block closes the transfer, whatever is still unwritten."""

    def __init__(self, incoming: IncomingBlob, queue: SimpleQueue[tuple[Writer, Bytes]]) -> None:
        self._incoming = incoming
        self._queue = queue
        self._loop = asyncio.get_running_loop()
        self._taken = 0
        self._written = 0
        self._error: Exception | None = None
        self._waiting: asyncio.Event | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._incoming.close()

    async def write(self, data: Bytes) -> None:
        """Raises PayloadError for an earlier chunk."""
        await self._until_behind(_BEHIND - 1)
        self._taken += 1
        self._queue.put((self, data))

    async def flush(self) -> None:
        """Returns when all is written. Raises PayloadError where it could not be."""
        await self._until_behind(0)

    async def _until_behind(self, chunks: int) -> None:
        while self._taken - self._written > chunks:
            self._waiting = asyncio.Event()
            if self._taken - self._written > chunks:  # else its thread may not have seen that somebody waits
                await self._waiting.wait()
            self._waiting = None
        if self._error is not None:
            raise self._error

    def write_now(self, data: Bytes) -> None:
        """In its thread: writes a chunk, unless one before it could not be written."""
        try:
            if self._error is None:
                self._incoming.write(data)
        except Exception as error:  # noqa: BLE001 - raised where the next chunk is handed over
            self._error = error
        self._written += 1
        if (waiting := self._waiting) is not None:
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody waits any more
                self._loop.call_soon_threadsafe(waiting.set)
