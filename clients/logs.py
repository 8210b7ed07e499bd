"""What a ClientApp prints: shown here, and passed on to the server in small bundles, within a limit."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from fedpace.protocol import fleet_pb2 as pb

log = logging.getLogger("fedpace.client")

_FLUSH_SECONDS = 0.1
_LINES = 200
_LINE_CHARACTERS = 4096


class LogBuffer:
    """Collects lines and sends them every tenth of a second; above 200 at a time they are counted, not shown.

    `send` says whether there was a connection to send them on; they wait until there is.
    """

    def __init__(self, send: Callable[[pb.Log], bool]) -> None:
        self._send = send
        self._entry = pb.Log()
        self._task: asyncio.Task[None] | None = None

    def add(self, task_id: int, line: str) -> None:
        if len(self._entry.lines) < _LINES:
            log.info("| %s", line[:_LINE_CHARACTERS])
            self._entry.task_id = task_id
            self._entry.lines.append(line[:_LINE_CHARACTERS])
        else:
            self._entry.dropped += 1

    def start(self) -> None:
        self._task = asyncio.create_task(self._flush_regularly())

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
        self.flush()

    def flush(self) -> None:
        if self._entry.lines and self._send(self._entry):
            if self._entry.dropped:
                log.info("| (%d more lines left out)", self._entry.dropped)
            self._entry = pb.Log()

    async def _flush_regularly(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH_SECONDS)
            self.flush()
