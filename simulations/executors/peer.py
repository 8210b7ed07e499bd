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
_CLOSE_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


class Peer:
    """One end, used by one thread. What is sent lies in `arena`; what the other end sent is read from `mapped`."""

    def __init__(self, connection: socket.socket, arena: Arena) -> None:
        self.mapped = Mapped()
        self._socket = connection
        self._arena = arena
        self._known: set[int] = set()

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, parts: Parts, blobs: Iterable[pb.Blob] = ()) -> None:
        """Sends three strings of bytes that speak of some blobs. Raises OSError where the other end is gone."""
        gone = self._known - self._arena.live.keys()
        new = [self._arena.live[number] for number in sorted({place(blob)[0] for blob in blobs} - self._known)]
        while len(new) > _MOST_DESCRIPTORS:
            self._send((b"", b"", b""), new[:_MOST_DESCRIPTORS], set())
            new = new[_MOST_DESCRIPTORS:]
        self._send(parts, new, gone)

    def _send(self, parts: Parts, new: list[Segment], gone: set[int]) -> None:
        numbers = struct.pack(f"<{len(new) + len(gone)}Q", *(segment.number for segment in new), *gone)
        data = b"".join((_HEAD.pack(len(new), len(gone), *map(len, parts)), numbers, *parts))
        rights = array.array("i", [segment.descriptor for segment in new])
        sent = self._socket.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else [])
        self._socket.sendall(memoryview(data)[sent:])
        self._known.update(segment.number for segment in new)
        self._known -= gone

    def receive(self) -> Parts | None:
        """What was sent next, or None when the other end is gone. Waits for it."""
        while (parts := self._receive()) == (b"", b"", b""):
            pass
        return parts

    def _receive(self) -> Parts | None:
        descriptors: list[int] = []
        try:
            head = self._read_head(descriptors)
            if head is None:
                return None
            new, gone, *sizes = head
            body = self._read(8 * (new + gone) + sum(sizes))
            if body is None or len(descriptors) != new:
                return None
            numbers = struct.unpack_from(f"<{new + gone}Q", body)
            for number in numbers[:new]:
                self.mapped.add(number, descriptors.pop(0))
            self.mapped.forget(numbers[new:])
        except ConnectionError:
            return None
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        start = 8 * len(numbers)
        first, second = start + sizes[0], start + sizes[0] + sizes[1]
        return body[start:first], body[first:second], body[second:]

    def _read_head(self, descriptors: list[int]) -> tuple[int, ...] | None:
        """The descriptors come with the first byte."""
        head = b""
        while len(head) < _HEAD.size:
            data, ancillary, _, _ = self._socket.recvmsg(
                _HEAD.size - len(head), socket.CMSG_SPACE(4 * _MOST_DESCRIPTORS), _CLOSE_ON_EXEC
            )
            for level, kind, rights in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    descriptors += array.array("i", rights[: len(rights) // 4 * 4])
            if not data:
                return None
            head += data
        return _HEAD.unpack(head)

    def _read(self, size: int) -> bytes | None:
        data = b""
        while len(data) < size:
            more = self._socket.recv(size - len(data), socket.MSG_WAITALL)
            if not more:
                return None
            data += more
        return data

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
