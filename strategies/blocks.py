"""Vectors a cache's worth at a time: several operations on one block, then the next, read memory once and not each time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

_T = TypeVar("_T")

BLOCK = 32_768
"""Numbers a block: 128 kB of float32, which the second level of cache holds beside another one."""

THREADS = 2
"""How many work on blocks at once, where the machine has as many processors. Memory is no faster for many more."""


def blocks(size: int) -> Iterator[slice]:
    """Slices that together are `range(size)`, in order."""
    for start in range(0, size, BLOCK):
        yield slice(start, min(start + BLOCK, size))


def flat_of(array: NDArray[Any]) -> Any:
    """An array whose slices are parts of it in the order of rows, of shape (n,): views, or, where it does not lie in
    that order, copies of that part alone."""
    return array.reshape(-1) if array.flags.c_contiguous else array.flat


def all_finite(array: NDArray[Any]) -> bool:
    """Whether no number is NaN or infinite. Takes memory for one block."""
    flat = flat_of(array)
    return all(np.isfinite(flat[block]).all() for block in blocks(array.size))


def threads() -> int:
    """How many threads are worth starting here."""
    return min(THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def each(pieces: Iterable[_T], work: Callable[[Iterator[_T]], None], count: int) -> None:
    """Has `work` done on all pieces by `count` threads, each of which takes the next piece that nobody has taken.

    Which thread takes which is left to chance, so pieces may have nothing to do with one another. Raises what `work`
    raises first, once all threads have ended.
    """
    shared = iter(list(pieces))  # of a list: `next` is atomic
    if count < 2:
        work(shared)
        return
    with ThreadPoolExecutor(count - 1, thread_name_prefix="fold") as pool:
        others = [pool.submit(work, shared) for _ in range(count - 1)]
        work(shared)
        for other in others:
            other.result()
