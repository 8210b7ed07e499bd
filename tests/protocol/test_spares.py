"""Files that have served are written over, but never while somebody may still read them."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
from io import FileIO
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.blobs import BlobStore, IncomingBlob, digest
from fedpace.protocol.spares import SpareFiles
from tests.generators import law


def store_in(folder: Path, limit: int = 2) -> BlobStore:
    return BlobStore(folder / "blobs", SpareFiles(folder / "spares", limit))


def inode(store: BlobStore, blob: pb.Blob) -> int:
    return store.path(blob.name).stat().st_ino


def arrive(store: BlobStore, data: bytes, chunk: int = 1000) -> pb.Blob:
    blob = pb.Blob(name=digest([data]), size=len(data))
    incoming = store.incoming(blob.name, blob.size)
    while incoming.offset < len(data):
        incoming.write(data[incoming.offset : incoming.offset + chunk])
    incoming.finish()
    return blob


def test_a_removed_blob_is_written_over(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    first = store.put([b"first, and longer than the others"])
    used = inode(store, first)
    store.remove(first.name)
    second = arrive(store, b"second")
    assert inode(store, second) == used and bytes(store.get(second)) == b"second"
    store.remove(second.name)
    third = store.put([b"the third one"])
    assert inode(store, third) == used and bytes(store.get(third)) == b"the third one"


def test_what_is_there_or_mapped_is_not_written_over(tmp_path: Path) -> None:
    store = store_in(tmp_path, limit=3)
    there, mapped = store.put([b"there"]), store.put([b"mapped"])
    view = store.get(mapped)
    part = view[2:4]
    del view
    store.remove(mapped.name)
    other = arrive(store, b"other.")
    assert len({inode(store, there), inode(store, other)}) == 2
    assert bytes(part) == b"pp" and bytes(store.get(there)) == b"there"
    (used,) = (path.stat().st_ino for path in (tmp_path / "spares").iterdir() if path.stat().st_nlink == 1)
    del part
    assert inode(store, store.put([b"now it is free"])) == used


def test_what_is_there_can_be_read_while_a_file_to_write_over_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = store_in(tmp_path, limit=3)
    there, gone = store.put([b"there"]), store.put([b"gone"])
    store.remove(gone.name)
    lock, read = fcntl.flock, []

    def lock_and_read(file: FileIO, how: int) -> None:
        lock(file, how)
        if how & fcntl.LOCK_EX:
            monkeypatch.undo()
            read.append(bytes(store.get(there)))

    monkeypatch.setattr(fcntl, "flock", lock_and_read)
    store.put([b"another"])
    assert read == [b"there"]


def test_there_are_no_more_spares_than_allowed(tmp_path: Path) -> None:
    store = store_in(tmp_path, limit=2)
    blobs = [store.put([bytes([number]) * 10]) for number in range(5)]
    for blob in blobs:
        store.remove(blob.name)
    assert len(list((tmp_path / "spares").iterdir())) == 2
    assert len(SpareFiles(tmp_path / "spares", 1)._files) == 1 == len(list((tmp_path / "spares").iterdir()))


def test_a_file_that_is_there_is_left_alone(tmp_path: Path) -> None:
    spares = SpareFiles(tmp_path / "spares", 2)
    for _ in range(2):  # with a new file, then with one that has served
        path = tmp_path / "file"
        path.write_bytes(b"content")
        with pytest.raises(FileExistsError):
            spares.create(path)
        assert path.read_bytes() == b"content"
        path.unlink()
        spares.create(path).close()
        path.unlink()


def test_where_files_have_one_name_only_they_are_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    store = store_in(tmp_path)
    for data in (b"first", b"second"):
        blob = arrive(store, data)
        assert bytes(store.get(blob)) == data
        store.remove(blob.name)


@law
@given(st.binary(min_size=1, max_size=300), st.integers(0, 400), st.lists(st.integers(0, 300), max_size=6))
def test_a_transfer_into_a_file_that_has_served_goes_on_from_wherever_it_broke_off(
    data: bytes, served: int, breaks: list[int]
) -> None:
    with TemporaryDirectory() as folder:
        store = store_in(Path(folder), limit=1)
        store.remove(store.put([b"\xaa" * served]).name)
        blob = pb.Blob(name=digest([data]), size=len(data))
        for stop in sorted(min(at, len(data)) for at in breaks):
            incoming = store.incoming(blob.name, blob.size)
            if incoming.offset < stop:
                incoming.write(data[incoming.offset : stop])
            incoming.close()
            assert store.incoming(blob.name, blob.size).offset == incoming.offset
        assert arrive(store, data, chunk=7) == blob and bytes(store.get(blob)) == data
        assert [path.name for path in store.directory.iterdir()] == [blob.name.hex()]


RECEIVE = """
import sys
from pathlib import Path
from tests.protocol.test_spares import store_in, begin
incoming = begin(store_in(Path(sys.argv[1])))
print("ready", flush=True)
sys.stdin.readline()
"""
CONTENT = bytes(range(256)) * 100


def begin(store: BlobStore) -> IncomingBlob:
    store.remove(store.put([b"\xaa" * 30_000]).name)
    incoming = store.incoming(digest([CONTENT]), len(CONTENT))
    incoming.write(CONTENT[:10_000])
    return incoming


def test_a_killed_process_leaves_what_has_arrived_and_no_more(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", RECEIVE, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL)
    store = store_in(tmp_path)
    assert store.incoming(digest([CONTENT]), len(CONTENT)).offset == 10_000
    assert bytes(store.get(arrive(store, CONTENT))) == CONTENT
