"""Protobuf messages over a local socket: four bytes of length, then the message. Both ends are ours."""

from __future__ import annotations

import asyncio
import select
import socket
import struct
import threading
from typing import Protocol, TypeVar

from google.protobuf.message import DecodeError, Message

from fedpace.errors import PayloadError

_LENGTH = struct.Struct("<I")
LIMIT_BYTES = 1 << 30
"""A frame larger than this is a broken peer, not a message."""

M = TypeVar("M", bound=Message, covariant=True)  # noqa: PLC0105


class MessageType(Protocol[M]):
    """A generated message class."""

    def FromString(self, data: bytes) -> M: ...


def frame(message: Message) -> bytes:
    """A message as it goes on the socket."""
    data = message.SerializeToString()
    if len(data) > LIMIT_BYTES:
        raise PayloadError(f"a message of {len(data)} bytes is over the limit of {LIMIT_BYTES} between local processes")
    return _LENGTH.pack(len(data)) + data


class FrameSocket:
    """The blocking end, for processes that run user code. Sending is safe from any thread; one thread receives."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._file = connection.makefile("rb", buffering=1 << 16)
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        """Raises OSError where the other end is gone."""
        data = frame(message)
        with self._lock:
            self._socket.sendall(data)

    def receive(self, kind: MessageType[M]) -> M | None:
        """The next message, or None when the other end is gone or broken."""
        try:
            header = self._file.read(_LENGTH.size)
            if len(header) < _LENGTH.size or (size := _size(header)) is None:
                return None
            data = self._file.read(size)
            return kind.FromString(data) if len(data) == size else None
        except (OSError, DecodeError):
            return None

    def wait_gone(self) -> None:
        """Returns when the other end is gone; another thread may send and receive meanwhile."""
        poll = select.poll()
        poll.register(self._socket, 0)  # a hang-up is told in any case
        poll.poll()


def _size(header: bytes) -> int | None:
    """What a header announces; None where it is more than any message has."""
    (size,) = _LENGTH.unpack(header)
    return size if size <= LIMIT_BYTES else None


async def receive(reader: asyncio.StreamReader, kind: MessageType[M]) -> M | None:
    """The next message on an asyncio stream, or None when the other end is gone or broken."""
    try:
        size = _size(await reader.readexactly(_LENGTH.size))
        return None if size is None else kind.FromString(await reader.readexactly(size))
    except (asyncio.IncompleteReadError, OSError, DecodeError):
        return None
