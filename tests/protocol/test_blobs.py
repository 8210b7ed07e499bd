"""Blobs: a name holds the bytes it promises, however they came and whoever else was at it."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpace.errors import PayloadError
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.blobs import BlobStore, IncomingBlob, SmallBlobs, digest, read_blob
from fedpace.protocol.spares import SpareFiles
from tests.generators import law


def blob_of(data: bytes) -> pb.Blob:
    return pb.Blob(name=digest([data]), size=len(data))


def names(store: BlobStore) -> list[str]:
    return sorted(path.name for path in store.directory.iterdir())


# ---------------------------------------------------------------- the store


@law
@given(st.lists(st.binary(max_size=100), max_size=5))
def test_what_is_put_is_there(buffers: list[bytes]) -> None:
    with TemporaryDirectory() as folder:
        store = BlobStore(Path(folder) / "deep" / "blobs")
        data = b"".join(buffers)
        assert not store.has(blob_of(data))
        blob = store.put(buffers)
        assert blob == blob_of(data) and digest(buffers) == blob.name
        assert store.has(blob) and store.get(blob) == data
        assert store.put([data]) == blob and names(store) == [blob.name.hex()]
        store.remove(blob.name)
        store.remove(blob.name)
        assert not store.has(blob)


def test_views_are_put_over_a_file_that_has_served(tmp_path: Path) -> None:
    data = os.urandom(2_000_000)
    view = memoryview(data)
    store = BlobStore(tmp_path, SpareFiles(tmp_path / "spares", 1))
    store.remove(store.put([data, data]).name)  # leaves a file that is longer
    blob = store.put([view[:7], view[7:1_333_333], b"", view[1_333_333:]])
    assert blob == blob_of(data) and store.get(blob) == data


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite

    def full(file: int, data: memoryview, offset: int) -> int:
        if offset >= 2_000_000:
            raise OSError(errno.ENOSPC, "no space left")
        return write(file, data[:100_000], offset)  # as where a limit is near

    monkeypatch.setattr(os, "pwrite", full)
    store = BlobStore(tmp_path)
    data = os.urandom(2_500_000)
    with pytest.raises(OSError, match="no space left"):
        store.put([data])
    assert names(store) == []
    assert store.get(store.put([data[:1_900_000]])) == data[:1_900_000]


def test_a_name_is_the_blake3_digest() -> None:
    """Input and digest are those of the test vectors that BLAKE3's authors publish (input_len 1025)."""
    vector = bytes(index % 251 for index in range(1025))
    known = "d00278ae47eb27b34faecf67b4fe263f82d5412916c1ffd97c8cb7fb814b8444"
    assert digest([vector]).hex() == digest([vector[:7], memoryview(vector)[7:], b""]).hex() == known
    assert digest([]).hex() == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"


def test_what_is_read_is_mapped_and_stays_readable(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    blob = store.put([bytes(range(256)) * 1000])
    view = store.get(blob)
    store.remove(blob.name)
    assert view.readonly and view == bytes(range(256)) * 1000


def test_a_blob_that_is_not_there_or_not_whole_is_an_error(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    blob = store.put([b"content"])
    with pytest.raises(PayloadError, match="has 7 bytes, not 8"):
        store.get(pb.Blob(name=blob.name, size=8))
    with pytest.raises(PayloadError, match="has 7 bytes, not 8"):
        read_blob(tmp_path, pb.Blob(name=blob.name, size=8, data=b"content"))
    for name in (bytes(32), b"", b"\xff" * 300):
        with pytest.raises(PayloadError, match="cannot be read"):
            store.get(pb.Blob(name=name, size=1))


def test_a_file_cut_short_by_a_power_cut_is_written_anew(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    blob = store.put([b"content"])
    store.path(blob.name).write_bytes(b"")
    assert not store.has(blob)
    assert bytes(store.get(store.put([b"content"]))) == b"content"


def test_reading_a_blob_marks_its_use(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    blob = store.put([b"content"])
    os.utime(store.path(blob.name), (1, 1))
    store.get(blob)
    assert store.path(blob.name).stat().st_mtime > 1


def test_a_put_that_fails_leaves_nothing(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    whole = b"content"

    class Torn(Sequence[bytes]):
        """Buffers of which the second cannot be read."""

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> bytes:  # type: ignore[override]
            if index:
                raise OSError("no space left on device")
            return whole

    with pytest.raises(OSError, match="no space"):
        store.put(Torn())
    assert names(store) == []


PUT_OFTEN = """
import sys
from pathlib import Path
from fedpace.protocol.blobs import BlobStore
store = BlobStore(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for number in range(100):
    blob = store.put([bytes([number]) * 50_000, b"end"])
    assert store.get(blob)[-4:] == bytes([number]) + b"end"
"""


def test_two_processes_put_the_same_content_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PUT_OFTEN, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    both = [subprocess.Popen(command, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    for process in both:
        assert process.stdout.readline() == b"ready\n"
    for process in both:
        process.stdin.write(b"go\n")
        process.stdin.flush()
    for process in both:
        process.communicate(timeout=60)
        assert process.returncode == 0
    wanted = {digest([bytes([n]) * 50_000 + b"end"]).hex() for n in range(100)}
    assert set(names(BlobStore(tmp_path))) == wanted


# ---------------------------------------------------------------- transfers


@law
@given(st.binary(min_size=1, max_size=300), st.lists(st.integers(0, 300), max_size=6), st.integers(1, 50))
def test_a_transfer_goes_on_from_wherever_it_broke_off(data: bytes, breaks: list[int], chunk: int) -> None:
    with TemporaryDirectory() as folder:
        store = BlobStore(Path(folder))
        blob = blob_of(data)
        for stop in [*sorted(min(at, len(data)) for at in breaks), len(data)]:
            incoming = store.incoming(blob.name, blob.size)
            while incoming.offset < stop:
                incoming.write(data[incoming.offset : min(stop, incoming.offset + chunk)])
            if stop < len(data):
                with pytest.raises(PayloadError, match=f"{stop} of {len(data)} bytes arrived"):
                    incoming.finish()
            incoming.close()
        assert not store.has(blob)
        incoming.finish()
        assert store.get(blob) == data and names(store) == [blob.name.hex()]


@law
@given(st.binary(min_size=1, max_size=60), st.lists(st.tuples(st.integers(0, 2), st.integers(1, 20)), max_size=40))
def test_transfers_of_one_blob_at_a_time_do_not_mix(data: bytes, steps: list[tuple[int, int]]) -> None:
    """Two slots may fetch the same model at once, and a broken stream may still be writing when the next one starts."""
    with TemporaryDirectory() as folder:
        store = BlobStore(Path(folder))
        blob = blob_of(data)
        under_way: dict[int, IncomingBlob] = {}
        for who, amount in steps:
            if who not in under_way:
                under_way[who] = store.incoming(blob.name, blob.size)
            one = under_way[who]
            one.write(data[one.offset : one.offset + amount])
            if one.offset == len(data):
                one.finish()
                del under_way[who]
                assert store.get(blob) == data
        for one in under_way.values():
            one.close()
        left = [name for name in names(store) if name.endswith(".part")]
        assert len(left) <= 1
        last = store.incoming(blob.name, blob.size)
        last.write(data[last.offset :])
        last.finish()
        assert store.get(blob) == data and names(store) == [blob.name.hex()]


@pytest.mark.parametrize("end", [Path.unlink, lambda part: part.rename(part.with_suffix(""))])
def test_a_transfer_that_ends_while_another_begins_keeps_its_file(
    tmp_path: Path, end: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening a part and locking it, the transfer it belonged to may have finished it or dropped it."""
    store = BlobStore(tmp_path)
    blob = blob_of(b"content")
    part = tmp_path / f"{blob.name.hex()}.part"
    part.write_bytes(b"content")
    flock = fcntl.flock

    def late(file: object, operation: int) -> None:
        monkeypatch.undo()
        end(part)
        flock(file, operation)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", late)
    incoming = store.incoming(blob.name, 7)
    assert incoming.offset == 0
    incoming.write(b"content")
    incoming.finish()
    assert bytes(store.get(blob)) == b"content" and names(store) == [blob.name.hex()]


def test_more_bytes_than_announced_end_the_transfer(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    incoming = store.incoming(blob_of(b"content").name, 7)
    incoming.write(b"conte")
    with pytest.raises(PayloadError, match="more than the 7 bytes announced"):
        incoming.write(b"nts")
    assert names(store) == []


def test_other_bytes_than_announced_are_dropped(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    blob = blob_of(b"content")
    incoming = store.incoming(blob.name, 7)
    incoming.write(b"forgery")
    with pytest.raises(PayloadError, match="not those announced"):
        incoming.finish()
    assert names(store) == [] and store.incoming(blob.name, 7).offset == 0


def test_what_is_longer_than_the_blob_is_no_part_of_it(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    blob = blob_of(b"content")
    (tmp_path / f"{blob.name.hex()}.part").write_bytes(b"something longer")
    incoming = store.incoming(blob.name, 7)
    assert incoming.offset == 0
    incoming.write(b"content")
    incoming.finish()
    assert bytes(store.get(blob)) == b"content"


def test_an_empty_blob_arrives(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    store.incoming(blob_of(b"").name, 0).finish()
    assert store.has(blob_of(b"")) and bytes(store.get(blob_of(b""))) == b""


@pytest.mark.parametrize("name", [b"", b"short", bytes(33)])
def test_a_name_is_32_bytes(tmp_path: Path, name: bytes) -> None:
    with pytest.raises(PayloadError, match="named by 32 bytes"):
        BlobStore(tmp_path).incoming(name, 1)


# ---------------------------------------------------------------- small blobs in memory


@law
@given(st.lists(st.binary(min_size=1, max_size=40), max_size=40), st.integers(1, 100))
def test_small_blobs_stay_within_their_limit_and_the_last_used_stay(contents: list[bytes], limit: int) -> None:
    blobs = SmallBlobs(limit)
    used: list[bytes] = []
    for data in contents:
        name = digest([data])
        if blobs.get(name) is None:
            blobs.add(name, data)
        blobs.add(name, data)
        used = [*(one for one in used if one != data), data]
        kept: list[bytes] = []
        for one in reversed(used):
            if kept and sum(map(len, kept)) + len(one) > limit:
                break
            kept.append(one)
        used = list(reversed(kept))
        for one in set(contents):
            held = blobs._blobs.get(digest([one]))
            assert held == (one if one in used else None)
