"""Shared memory between a pool and its workers: who writes fills segments, who reads maps them.

A segment is a file in memory without a name, handed over as a descriptor: nothing is left behind, however a process ends.
What was written is never written over, so what was read stays as it is for as long as anybody looks at it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.payloads import padding
from fedpace.protocol.records import Buffers
from fedpace.simulations.executors.blocks import file_in_memory

SEGMENT_BYTES = 16 << 20
"""Size of a segment; only what is written takes memory. What is larger gets one of its own."""

_PAGED_BYTES = 256 << 10
_MADV_POPULATE_WRITE = 23  # of Linux's mman.h; Python has no name for it

_NAME = struct.Struct("<QQ")
_EMPTY = memoryview(b"")


@dataclass
class Segment:
    """`users` are the blobs in it that somebody may still ask for."""

    number: int
    descriptor: int
    memory: mmap.mmap
    end: int = 0
    users: int = 0
    _paged: int = 0

    def page_in(self, end: int) -> None:
        """Takes the pages up to `end` and some more from the system in one go, which costs half of what it does one by one,
        as they are first written to."""
        if end <= self._paged or sys.platform != "linux":
            return
        start, self._paged = self._paged, min(end + -end % _PAGED_BYTES, len(self.memory))
        with contextlib.suppress(OSError):  # before Linux 5.14
            self.memory.madvise(_MADV_POPULATE_WRITE, start, self._paged - start)

    def close(self) -> None:
        """Views of it stay readable."""
        os.close(self.descriptor)


def place(blob: pb.Blob) -> tuple[int, int]:
    """The segment a blob lies in, and where it starts there."""
    number, start = _NAME.unpack(blob.name)
    return number, start


class Arena:
    """What this process has written. Its segments are numbered from `first`."""

    def __init__(self, first: int = 0) -> None:
        self.live: dict[int, Segment] = {}
        self._next = first
        self._current: Segment | None = None

    def __contains__(self, blob: pb.Blob) -> bool:
        return place(blob)[0] in self.live

    def put(self, buffers: Buffers) -> pb.Blob:
        """Writes the concatenation of some buffers, to be asked for until it is released.

        Raises OSError where the system has no more memory, or no more descriptors, for it.
        """
        size = sum(map(len, buffers))
        segment = self._with_room(size)
        start = position = segment.end
        segment.page_in(start + size)
        for buffer in buffers:
            segment.memory[position : position + len(buffer)] = buffer
            position += len(buffer)
        segment.end = position + padding(position)
        segment.users += 1
        return pb.Blob(name=_NAME.pack(segment.number, start), size=size)

    def get(self, blob: pb.Blob) -> memoryview:
        number, start = place(blob)
        return memoryview(self.live[number].memory)[start : start + blob.size].toreadonly()

    def release(self, blobs: Iterable[pb.Blob]) -> None:
        """Nobody will ask for these any more."""
        for blob in blobs:
            segment = self.live[place(blob)[0]]
            segment.users -= 1
            self._drop_unused(segment)

    def close(self) -> None:
        for segment in self.live.values():
            segment.close()
        self.live.clear()
        self._current = None

    def _with_room(self, size: int) -> Segment:
        if size > SEGMENT_BYTES:
            return self._make(size)
        if self._current is None or self._current.end + size > SEGMENT_BYTES:
            full, self._current = self._current, self._make(SEGMENT_BYTES)
            if full is not None:
                self._drop_unused(full)
        return self._current

    def _make(self, size: int) -> Segment:
        descriptor = file_in_memory()
        try:
            os.ftruncate(descriptor, size)
            segment = Segment(self._next, descriptor, mmap.mmap(descriptor, size))
        except BaseException:
            os.close(descriptor)
            raise
        self._next += 1
        self.live[segment.number] = segment
        return segment

    def _drop_unused(self, segment: Segment) -> None:
        if segment.users == 0 and segment is not self._current:
            del self.live[segment.number]
            segment.close()


class Mapped:
    """What another process has written."""

    def __init__(self) -> None:
        self._views: dict[int, memoryview] = {}

    def add(self, number: int, descriptor: int) -> None:
        """Maps a segment, and closes its descriptor."""
        try:
            self._views[number] = memoryview(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ))
        finally:
            os.close(descriptor)

    def get(self, blob: pb.Blob) -> memoryview:
        if not blob.size:
            return _EMPTY
        number, start = place(blob)
        return self._views[number][start : start + blob.size]

    def forget(self, numbers: Iterable[int]) -> None:
        """No more will be asked for of these; views of them stay readable."""
        for number in numbers:
            self._views.pop(number, None)
