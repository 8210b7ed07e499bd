"""A file is there as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedpace.hosting.files import write_atomically


@pytest.mark.parametrize("sync", [True, False])
def test_bytes_and_parts_are_written(tmp_path: Path, sync: bool) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"one", sync=sync)
    assert path.read_bytes() == b"one"
    write_atomically(path, [b"two", b"", b" parts"], sync=sync)
    assert path.read_bytes() == b"two parts"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


class Torn(list[bytes]):
    """Parts, the second of which cannot be had; by then the first is written."""

    def __iter__(self) -> Iterator[bytes]:
        yield b"half"
        raise KeyboardInterrupt


def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, Torn())
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_sync_or_rename_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "file", b"new")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path / "folder", b"new", sync=False)
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_what_is_synced_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, bool]] = []
    path = tmp_path / "file"

    def fsync(descriptor: int) -> None:
        seen.append((os.fstat(descriptor).st_size, path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomically(path, [b"123", b"45"])
    write_atomically(path, b"not", sync=False)
    assert seen == [(5, False)]
