"""One device's control stream, seen from the coordinator: what waits to be written, and what it was sent before."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from fedpace.hosting.settings import ServerSettings
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.limits import MEASURED_BYTES
from fedpace.server.registry import Device

_REMEMBERED = 64
_UNREAD = 1000
_LINE_CHARACTERS = 4096


def one_line(text: str) -> str:
    """What a device says, as it may stand in a log: one line of bounded length, nothing a terminal obeys."""
    text = text[:_LINE_CHARACTERS]
    return text if text.isprintable() else "".join(c if c.isprintable() or c == "\t" else repr(c)[1:-1] for c in text)


class Session:
    """Lives as long as the stream. `closed` says that the stream is to end, `reason` why."""

    device: Device

    def __init__(self, name: str, node_id: int, instance: bytes) -> None:
        self.name = name
        self.node_id = node_id
        self.instance = instance
        self.left = ""
        self.reason = ""
        self.closed = False
        self.outbox: asyncio.Queue[pb.ServerMessage | None] = asyncio.Queue()
        self._sent: OrderedDict[bytes, None] = OrderedDict()
        self._measured = False
        self._lines = 0.0
        self._lines_at = 0.0

    def bind(self, device: Device) -> None:
        self.device = device

    def send(self, message: pb.ServerMessage) -> None:
        """Queues a message. A device that leaves too many unread is let go, before they fill the memory."""
        if self.closed:
            return
        if self.outbox.qsize() >= _UNREAD:
            self.close("it does not read what it is sent")
        else:
            self.outbox.put_nowait(message)

    def refuse(self, reason: str, *, final: bool) -> None:
        """Tells the device why it may not stay, and ends the stream."""
        self.send(pb.ServerMessage(refused=pb.Refused(reason=reason, final=final)))
        self.close(reason)

    def close(self, reason: str) -> None:
        """Ends the stream once what waits has been written."""
        if not self.closed:
            self.reason = reason
            self.outbox.put_nowait(None)
            self.closed = True

    def needs(self, blob: pb.Blob) -> bool:
        """Whether a small blob is to ride along: not if it did lately on this stream.

        Nor does the first one of some size, so that a transfer of its own measures the bandwidth.
        """
        name = blob.name
        if not self._measured and blob.size >= MEASURED_BYTES:
            self._measured = True
            return False
        if name in self._sent:
            self._sent.move_to_end(name)
            return False
        self._sent[name] = None
        if len(self._sent) > _REMEMBERED:
            self._sent.popitem(last=False)
        return True

    def allow_lines(self, wanted: int, now: float, settings: ServerSettings) -> int:
        """How many of so many log lines may pass now; unused ones add up to ten seconds' worth."""
        rate = settings.log_lines_per_second
        self._lines = min(10.0 * rate, self._lines + (now - self._lines_at) * rate) if self._lines_at else 10.0 * rate
        self._lines_at = now
        allowed = min(wanted, int(self._lines))
        self._lines -= allowed
        return allowed
