"""Files that have served are written over: their pages are in memory already.

The pages of a new file have to be found first and, on a virtual machine that gives free memory back, fetched from its
host: writing 100 MB into a new file takes two to four times as long as over an old one.

A file in use has a second name, outside this folder, or is mapped by somebody who holds a shared lock on it, as
`blobs.read_blob` does; one with neither is free. Removing a file elsewhere is therefore all it takes to give it back,
and what is mapped never changes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from collections.abc import Callable
from io import FileIO
from pathlib import Path


class SpareFiles:
    """Up to `limit` files in a folder that one process writes to. They take no more of the disk than once was in use."""

    def __init__(self, directory: Path, limit: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._limit = limit
        self._files = list(directory.iterdir())  # those that an earlier process left are as good
        while len(self._files) > limit:
            self._files.pop().unlink(missing_ok=True)

    def create(self, path: Path, prepare: Callable[[FileIO], None] | None = None) -> FileIO:
        """A file at `path`, to write from its start: one that has served, with what it holds, or a new one, empty.

        `prepare` is called with one that has served before it gets its name. Raises FileExistsError where there is a
        file already.
        """
        for spare in self._files:  # the first that is free: what is written over and over may never reach the disk
            if (file := _open_free(spare)) is None:
                continue
            try:
                if prepare is not None:
                    prepare(file)
                path.hardlink_to(spare)
            except BaseException:
                file.close()
                raise
            fcntl.flock(file, fcntl.LOCK_UN)
            return file
        file = path.open("x+b", buffering=0)
        if len(self._files) < self._limit:
            spare = self._directory / secrets.token_hex(8)
            with contextlib.suppress(OSError):  # a file system without second names
                spare.hardlink_to(path)
                self._files.append(spare)
        return file


def _open_free(spare: Path) -> FileIO | None:
    """Opens and locks a file that has no other name and that nobody has mapped."""
    with contextlib.suppress(OSError):
        if spare.stat().st_nlink > 1:
            return None  # a lock, even for a moment, would turn away who wants to map it
        file = spare.open("r+b", buffering=0)
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(file.fileno()).st_nlink == 1:
                return file
        file.close()
    return None
