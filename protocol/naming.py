"""The names of blobs: SHA-256 over the size of one and the SHA-256 of each MiB of it, in order.

So a name is made by all processors of a machine at once, where one alone hashes 2 GB a second. The size, eight bytes in
little-endian order, comes first: it says how many pieces follow, and no two blobs are the same bytes to hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

PIECE_BYTES = 1 << 20
"""What is hashed by itself; also a chunk of a transfer, so that one is hashed as it comes."""


class BlobHash:
    """The name of a blob whose bytes come one after the other."""

    def __init__(self) -> None:
        self._size = 0
        self._names = bytearray()
        self._piece = hashlib.sha256()

    def update(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            part = view[: PIECE_BYTES - self._size % PIECE_BYTES]
            self._piece.update(part)
            self._size += len(part)
            if self._size % PIECE_BYTES == 0:
                self._names += self._piece.digest()
                self._piece = hashlib.sha256()
            view = view[len(part) :]

    def digest(self) -> bytes:
        """32 bytes, of all that has come so far."""
        rest = [self._piece.digest()] if self._size % PIECE_BYTES else []
        return name_of(self._size, [self._names, *rest])


def name_of(size: int, pieces: Iterable[bytes | bytearray]) -> bytes:
    """The name of a blob, 32 bytes, from its size and the SHA-256 of its pieces."""
    return hashlib.sha256(size.to_bytes(8, "little") + b"".join(pieces)).digest()


def digest(buffers: Iterable[bytes | memoryview]) -> bytes:
    """The name of the concatenation of some buffers, 32 bytes."""
    found = BlobHash()
    for buffer in buffers:
        found.update(buffer)
    return found.digest()


def pieces_of(buffers: Sequence[bytes | memoryview]) -> Iterator[list[memoryview]]:
    """The pieces of the concatenation of some buffers, each as the parts of buffers it consists of."""
    piece: list[memoryview] = []
    room = PIECE_BYTES
    for buffer in buffers:
        view = memoryview(buffer)
        while view:
            part = view[:room]
            piece.append(part)
            room -= len(part)
            if not room:
                yield piece
                piece, room = [], PIECE_BYTES
            view = view[len(part) :]
    if piece:
        yield piece
