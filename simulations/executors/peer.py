"""A local socket on which two processes hand each other messages, and the segments that these speak of."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from collections.abc import Iterable

from fedpace.protocol import fleet_pb2 as pb
from fedpace.simulations.executors.segments import Arena, Mapped, Segment, place

Parts = tuple[bytes, bytes, bytes]

_HEAD = struct.Struct("<IIIII")
_MOST_DESCRIPTORS = 250  # in one message; Linux takes 253
_READ_BYTES = 256 << 10
_CLOSE_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


class Peer:
    """One end, used by one thread. What is sent lies in `arena`; what the other end sent is read from `mapped`."""

    def __init__(self, connection: socket.socket, arena: Arena) -> None:
        self.mapped = Mapped()
        self._socket = connection
        self._arena = arena
        self._known: set[int] = set()
        self._written: list[bytes] = []
        self._lent: list[int] = []  # descriptors that go with what is written
        self._read = bytearray()
        self._got: list[int] = []  # descriptors that came with what was read, in the order of their messages

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, parts: Parts, blobs: Iterable[pb.Blob] = ()) -> None:
        """Sends three strings of bytes that speak of some blobs. Raises OSError where the other end is gone."""
        self.write(parts, blobs)
        self.flush()

    def write(self, parts: Parts, blobs: Iterable[pb.Blob] = ()) -> None:
        """`send`, once there is a `flush`: several messages cost one call of the system."""
        live = self._arena.live
        gone = self._known - live.keys()
        new = [live[number] for number in sorted({place(blob)[0] for blob in blobs} - self._known)]
        while len(new) > _MOST_DESCRIPTORS:
            self._write((b"", b"", b""), new[:_MOST_DESCRIPTORS], set())
            new = new[_MOST_DESCRIPTORS:]
        self._write(parts, new, gone)

    def _write(self, parts: Parts, new: list[Segment], gone: set[int]) -> None:
        if len(self._lent) + len(new) > _MOST_DESCRIPTORS:
            self.flush()
        numbers = [*(segment.number for segment in new), *gone]
        self._written += (_HEAD.pack(len(new), len(gone), *map(len, parts)), struct.pack(f"<{len(numbers)}Q", *numbers))
        self._written += parts
        self._lent += (segment.descriptor for segment in new)
        self._known.update(numbers)
        self._known -= gone

    def flush(self) -> None:
        """Sends what is written. Raises OSError where the other end is gone."""
        if not self._written:
            return
        data, rights = b"".join(self._written), array.array("i", self._lent)
        self._written, self._lent = [], []
        sent = self._socket.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else [])
        self._socket.sendall(memoryview(data)[sent:])

    def receive(self) -> Parts | None:
        """What was sent next, or None when the other end is gone. Waits for it."""
        while True:
            if (head := self._head()) is not None:
                if (parts := self._next(*head)) != (b"", b"", b""):
                    return parts
            elif not self._fill():
                return None

    @property
    def has_more(self) -> bool:
        """Whether `receive` need not wait, since another message came with the one before."""
        return self._head() is not None

    def _head(self) -> tuple[int, int, int, int, int] | None:
        """What the first message of those read begins with, if all of it is here."""
        if len(self._read) < _HEAD.size:
            return None
        new, gone, first, second, third = _HEAD.unpack_from(self._read)
        whole = len(self._read) >= _HEAD.size + 8 * (new + gone) + first + second + third
        return (new, gone, first, second, third) if whole else None

    def _next(self, new: int, gone: int, first: int, second: int, third: int) -> Parts | None:
        """The first message of those read; None where the descriptors that it speaks of have not come."""
        start = _HEAD.size + 8 * (new + gone)
        end = start + first + second + third
        body = bytes(self._read[:end])
        del self._read[:end]
        if new or gone:
            if len(self._got) < new:
                return None
            numbers = struct.unpack_from(f"<{new + gone}Q", body, _HEAD.size)
            for number in numbers[:new]:
                self.mapped.add(number, self._got.pop(0))
            self.mapped.forget(numbers[new:])
        return body[start : start + first], body[start + first : end - third], body[end - third : end]

    def _fill(self) -> bool:
        """Reads what is there, or waits for something. Descriptors come with their message's first byte, or before."""
        try:
            data, ancillary, _, _ = self._socket.recvmsg(
                _READ_BYTES, socket.CMSG_SPACE(4 * _MOST_DESCRIPTORS), _CLOSE_ON_EXEC
            )
        except ConnectionError:
            return False
        for level, kind, rights in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                self._got += array.array("i", rights[: len(rights) // 4 * 4])
        self._read += data
        return bool(data)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        while self._got:
            os.close(self._got.pop())
