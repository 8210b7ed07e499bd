"""Content-addressed blobs on disk: named by their BLAKE3 digests, written once, checked when they arrive.

A blob is a file whose name is the digest in hexadecimal. It comes into being under a temporary name and is renamed when
complete, so a name that is there always holds the bytes it promises. A transfer that broke off leaves a `.part` file,
from whose end it goes on.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from io import FileIO
from pathlib import Path

from blake3 import blake3

from fedpace.errors import PayloadError
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.limits import CHUNK_BYTES, INLINE_BYTES
from fedpace.protocol.spares import SpareFiles

_EMPTY = memoryview(b"")
_SHARED = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
_TRIES = 10
_PORTION_BYTES = 1 << 19
_OFFSET = struct.Struct("<Q")


def digest(buffers: Iterable[bytes | memoryview]) -> bytes:
    """The name of the concatenation of some buffers, 32 bytes."""
    found = blake3()
    for buffer in buffers:
        found.update(buffer)
    return found.digest()


def inline_blob(buffers: Sequence[bytes | memoryview]) -> pb.Blob | None:
    """A blob that carries its own bytes, or None where they are too many for that."""
    return None if sum(map(len, buffers)) > INLINE_BYTES else whole_blob(buffers)


def whole_blob(buffers: Sequence[bytes | memoryview]) -> pb.Blob:
    """A blob that carries its own bytes, however many."""
    return pb.Blob(name=digest(buffers), size=sum(map(len, buffers)), data=b"".join(buffers))


def read_blob(directory: Path, blob: pb.Blob) -> memoryview:
    """The bytes of a blob, from the message that names it or mapped from its file in `directory`.

    Raises PayloadError where it is not there, or not of the size the message says.
    """
    if blob.HasField("data"):
        view = memoryview(blob.data)
    elif blob.size == 0:
        return _EMPTY
    else:
        try:
            view = _map(directory / blob.name.hex())
        except (OSError, ValueError) as error:
            raise PayloadError(f"blob {blob.name.hex()[:12]} cannot be read: {error}") from None
    if len(view) != blob.size:
        raise PayloadError(f"blob {blob.name.hex()[:12]} has {len(view)} bytes, not {blob.size}")
    return view


def _map(path: Path) -> memoryview:
    """A file's bytes. While they are in use, a shared lock keeps the file from being written over (see `spares`)."""
    for _ in range(_TRIES):
        with path.open("rb") as file, contextlib.suppress(BlockingIOError):  # locked: removed, about to be written over
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):  # neither removed nor replaced before the lock
                return memoryview(mmap.mmap(file.fileno(), 0, flags=_SHARED, prot=mmap.PROT_READ))  # keeps it open
    raise FileNotFoundError("it is replaced over and over")


class BlobStore:
    """A folder of blobs, shared by processes of one machine. With `spares`, those it writes are among these files."""

    def __init__(self, directory: Path, spares: SpareFiles | None = None) -> None:
        self.directory = directory
        self.spares = spares
        directory.mkdir(parents=True, exist_ok=True)

    def path(self, name: bytes) -> Path:
        return self.directory / name.hex()

    def has(self, blob: pb.Blob) -> bool:
        """Whether a blob is here; a file of another size, as a power cut may leave one, is not it."""
        try:
            return self.path(blob.name).stat().st_size == blob.size
        except OSError:
            return False

    def put(self, buffers: Sequence[bytes | memoryview]) -> pb.Blob:
        """Keeps the concatenation of some buffers. Returns its name and size, without data."""
        temporary = self.directory / f"{secrets.token_hex(8)}.tmp"
        try:
            found, size = blake3(), 0
            with self.create(temporary) as file:
                for buffer in buffers:
                    size = _write_hashed(file, found, buffer, size)
                file.truncate(size)
            blob = pb.Blob(name=found.digest(), size=size)
            if self.has(blob):
                temporary.unlink()
            else:
                temporary.rename(self.path(blob.name))
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return blob

    def create(self, path: Path, prepare: Callable[[FileIO], None] | None = None) -> FileIO:
        """A new file, or one that has served: see `SpareFiles.create`."""
        return path.open("x+b", buffering=0) if self.spares is None else self.spares.create(path, prepare)

    def get(self, blob: pb.Blob) -> memoryview:
        """See `read_blob`. The file's time of change becomes that of its last use."""
        if not blob.HasField("data"):
            with contextlib.suppress(OSError):
                os.utime(self.path(blob.name))
        return read_blob(self.directory, blob)

    def remove(self, name: bytes) -> None:
        self.path(name).unlink(missing_ok=True)

    def incoming(self, name: bytes, size: int) -> IncomingBlob:
        """A transfer into this store, going on from where an earlier one broke off."""
        return IncomingBlob(self, name, size)


def _write_hashed(file: FileIO, found: blake3, data: bytes | memoryview, offset: int) -> int:
    """Writes some bytes and hashes them, in portions that stay in the cache in between. Returns where they end."""
    view = memoryview(data)
    while view:
        written = os.pwrite(file.fileno(), view[:_PORTION_BYTES], offset)
        found.update(view[:written])
        view = view[written:]
        offset += written
    return offset


class IncomingBlob:
    """A blob on its way in. `offset` is how many bytes are here; `finish` checks them and gives them their name.

    Of several transfers of one blob at a time, the first goes on where an earlier one broke off and leaves its bytes to
    a later one; the others start anew and leave nothing. `write` may be called in another thread than the rest.

    A part is as long as what has arrived; or, where it is a file that has served, eight bytes longer than the blob,
    and these say how much of it has.
    """

    def __init__(self, store: BlobStore, name: bytes, size: int) -> None:
        if len(name) != 32:
            raise PayloadError(f"a blob is named by 32 bytes, not {len(name)}")
        self._store = store
        self._name = name
        self.size = size
        self._part = store.directory / f"{name.hex()}.part"
        self._alone = True
        self._hash = blake3()
        self._lock = threading.Lock()
        self._served = False
        self._file = self._open()
        self.offset = self._rehash()

    def _open(self) -> FileIO:
        try:
            file = self._create()
        except FileExistsError:
            file = FileIO(os.open(self._part, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        with contextlib.suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), self._part.stat()):  # not renamed or removed meanwhile
                return file
        file.close()
        self._alone = False
        self._part = self._part.with_name(f"{self._name.hex()}.{secrets.token_hex(8)}.part")
        return self._create()

    def _create(self) -> FileIO:
        def prepare(file: FileIO) -> None:
            file.truncate(self.size + _OFFSET.size)
            os.pwrite(file.fileno(), _OFFSET.pack(0), self.size)

        return self._store.create(self._part, prepare)

    def _rehash(self) -> int:
        """Hashes what has arrived before. Returns how many bytes these are."""
        length = arrived = os.fstat(self._file.fileno()).st_size
        self._served = length == self.size + _OFFSET.size
        if self._served:
            (arrived,) = _OFFSET.unpack(os.pread(self._file.fileno(), _OFFSET.size, self.size))
        if arrived > self.size:  # what lies here is no part of this blob
            self._file.truncate(arrived := 0)
            self._served = False
        for start in range(0, arrived, CHUNK_BYTES):
            self._hash.update(os.pread(self._file.fileno(), min(CHUNK_BYTES, arrived - start), start))
        return arrived

    def write(self, data: bytes | memoryview) -> None:
        """Appends bytes. Raises PayloadError, and forgets the transfer, where they are more than was said."""
        if self.offset + len(data) > self.size:
            self.discard()
            raise PayloadError(f"more than the {self.size} bytes announced arrived")
        with self._lock:
            if self._file.closed:
                raise PayloadError("the transfer has ended")
            self.offset = _write_hashed(self._file, self._hash, data, self.offset)
            if self._served:
                os.pwrite(self._file.fileno(), _OFFSET.pack(self.offset), self.size)

    def finish(self) -> None:
        """Names the blob. Raises PayloadError where bytes are missing (kept) or are not those announced (dropped)."""
        if self.offset != self.size:
            raise PayloadError(f"{self.offset} of {self.size} bytes arrived")
        if self._hash.digest() != self._name:
            self.discard()
            raise PayloadError(
                f"the {self.size} bytes that arrived are not those announced: their BLAKE3 digest differs"
            )
        if self._served:
            os.truncate(self._part, self.size)
        if not self._file.closed:
            fcntl.flock(self._file, fcntl.LOCK_SH)  # whoever sees the blob may read it
        self._part.rename(self._store.path(self._name))
        self.close()

    def close(self) -> None:
        """Stops here; what arrived stays for the next try. `finish` may follow where all of it did."""
        with self._lock:
            self._file.close()
        if not self._alone and self.offset < self.size:
            self._part.unlink(missing_ok=True)

    def discard(self) -> None:
        self._part.unlink(missing_ok=True)
        with self._lock:
            self._file.close()


class SmallBlobs:
    """The last small blobs seen, in memory, so that one need not be sent or read twice."""

    def __init__(self, limit_bytes: int = 32 << 20) -> None:
        self._limit = limit_bytes
        self._bytes = 0
        self._blobs: OrderedDict[bytes, bytes] = OrderedDict()

    def get(self, name: bytes) -> bytes | None:
        data = self._blobs.get(name)
        if data is not None:
            self._blobs.move_to_end(name)
        return data

    def add(self, name: bytes, data: bytes) -> None:
        if name in self._blobs:
            return
        self._blobs[name] = data
        self._bytes += len(data)
        while self._bytes > self._limit and len(self._blobs) > 1:
            _, dropped = self._blobs.popitem(last=False)
            self._bytes -= len(dropped)
