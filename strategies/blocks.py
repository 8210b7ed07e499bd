"""Vectors a cache's worth at a time: several operations on one block, then the next, read memory once and not each time."""

from __future__ import annotations

from collections.abc import Iterator

BLOCK = 32_768
"""Numbers a block: 128 kB of float32, which the second level of cache holds beside another one."""


def blocks(size: int) -> Iterator[slice]:
    """Slices that together are `range(size)`, in order."""
    for start in range(0, size, BLOCK):
        yield slice(start, min(start + BLOCK, size))
