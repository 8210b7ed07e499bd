"""Memory that processes share: files in memory without a name, handed over as descriptors, nothing left behind."""

from __future__ import annotations

import mmap
import os
import pickle
import tempfile
import weakref
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

_PAGE = 1 << 16
_ALIGNED = 64
_FREE = 4
"""Blocks that are kept for later; memory that was in use already costs nothing to take again."""


class Block:
    """Shared memory of `size` bytes. `descriptor` is its file's, closed with this object; `memory` outlives it."""

    def __init__(self, number: int, size: int) -> None:
        """Raises OSError where the system has no more memory, or no more descriptors, for it."""
        self.number = number
        self.size = size
        self.descriptor = file_in_memory()
        self._finalizer = weakref.finalize(self, os.close, self.descriptor)
        os.ftruncate(self.descriptor, size)
        self.memory = mmap.mmap(self.descriptor, size)


class Blocks:
    """Blocks for matrices that come and go. A block is free again when nobody holds an array in it any more."""

    def __init__(self) -> None:
        self._free: list[Block] = []
        self._used: dict[int, Block] = {}
        self._next = 0

    def matrix(self, rows: int, columns: int) -> NDArray[np.float32]:
        """float32 of shape (rows, columns), with whatever numbers were there before."""
        size = -(-max(1, rows * columns * 4) // _PAGE) * _PAGE
        fitting = [block for block in self._free if size <= block.size]
        if fitting:
            block = min(fitting, key=lambda block: block.size)
            self._free.remove(block)
        else:
            block = Block(self._next, size)
            self._next += 1
        # The array that owns the memory: every view of it keeps it, and with the last one it goes.
        whole = np.frombuffer(block.memory, np.float32)
        self._used[id(whole)] = block
        weakref.finalize(whole, self._give_back, id(whole))
        return whole[: rows * columns].reshape(rows, columns)

    def block_of(self, matrix: NDArray[np.float32]) -> Block:
        """Where a matrix lies."""
        return self._used[id(matrix.base)]

    def numbers(self) -> set[int]:
        """Of the blocks that there are."""
        return {block.number for block in (*self._free, *self._used.values())}

    def _give_back(self, key: int) -> None:
        self._free.append(self._used.pop(key))
        self._free.sort(key=lambda block: block.size)
        del self._free[:-_FREE]


def mapped(descriptor: int, size: int) -> mmap.mmap:
    """The memory behind a descriptor that another process handed over; closes it."""
    try:
        return mmap.mmap(descriptor, size)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class Shared:
    """A value whose arrays lie in a block, in pieces of these sizes in bytes, each at a multiple of 64."""

    pickled: bytes
    sizes: tuple[int, ...]

    def value(self, memory: mmap.mmap) -> Any:
        """The value, with its arrays where they lie, writable by mistake only: nobody may change them."""
        view, starts = memoryview(memory), _starts(self.sizes)
        pieces = [view[start : start + size] for start, size in zip(starts, self.sizes, strict=False)]
        return pickle.loads(self.pickled, buffers=pieces)


def share(value: Any) -> tuple[Shared, Block]:
    """A value for other processes of this program, its arrays (contiguous ones) in shared memory."""
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    sizes = tuple(view.nbytes for view in views)
    starts = _starts(sizes)
    block = Block(0, max(1, starts[-1]))
    for start, view in zip(starts, views, strict=False):
        block.memory[start : start + view.nbytes] = view
    return Shared(pickled, sizes), block


def _starts(sizes: tuple[int, ...]) -> list[int]:
    return list(accumulate((-(-size // _ALIGNED) * _ALIGNED for size in sizes), initial=0))


def file_in_memory() -> int:
    """A descriptor of a file without a name: in memory where the system offers that, else where temporary files are."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("fedpace")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
