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
    """Collects lines and sends them a tenth of a second after the first; above 200 at a time they are counted, not shown.

    `send` says whether there was a connection to send them on; they wait until there is.
    """

    def __init__(self, send: Callable[[pb.Log], bool]) -> None:
        self._send = send
        self._entry = pb.Log()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None

    def add(self, task_id: int, line: str) -> None:
        if len(self._entry.lines) < _LINES:
            log.info("| %s", line[:_LINE_CHARACTERS])
            self._entry.task_id = task_id
            self._entry.lines.append(line[:_LINE_CHARACTERS])
        else:
            self._entry.dropped += 1
        self._flush_soon()

    def start(self) -> None:
        """From now until `stop`, lines are sent by themselves, by the running loop."""
        self._loop = asyncio.get_running_loop()
        self._flush_soon()

    def stop(self) -> None:
        self._loop = None
        if self._timer is not None:
            self._timer.cancel()
        self.flush()

    def flush(self) -> None:
        if self._entry.lines and self._send(self._entry):
            if self._entry.dropped:
                log.info("| (%d more lines left out)", self._entry.dropped)
            self._entry = pb.Log()

    def _flush_soon(self) -> None:
        if self._loop is not None and self._timer is None and self._entry.lines:
            self._timer = self._loop.call_later(_FLUSH_SECONDS, self._flush_now)

    def _flush_now(self) -> None:
        self._timer = None
        self.flush()
        self._flush_soon()
