"""What a device keeps on disk of each run: the state of its app with the last reply, and blobs on their way out.

STATE/runs/<run id>/<slot>.<number>.record   a SlotRecord, replaced as a whole after every task
STATE/outbox/<task id>/                      large blobs of a reply nobody has acknowledged yet
STATE/blobs/                                 models fetched, least recently used first out
STATE/spares/<writer>/                       files of these two that nobody needs, for the agent or a slot to write over
"""

from __future__ import annotations

import contextlib
import re
import shutil
import zlib
from collections.abc import Collection
from pathlib import Path

from google.protobuf.message import DecodeError

from fedpace.hosting.files import write_atomically
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.blobs import BlobStore
from fedpace.protocol.spares import SpareFiles

_RUNS_KEPT = 16
_SPARE_FILES = 2
_RECORD = re.compile(r"(\d+)\.(\d+)\.record")


class DeviceMemory:
    """One device's state folder; the agent and its workers each open it, as writers of different names."""

    def __init__(self, directory: Path, writer: str = "agent") -> None:
        self.directory = directory
        self.spares = SpareFiles(directory / "spares" / writer, _SPARE_FILES)
        self.blobs = BlobStore(directory / "blobs", self.spares)
        self._runs = directory / "runs"
        self._runs.mkdir(parents=True, exist_ok=True)
        self._last: dict[tuple[int, int], Path] = {}

    def _records(self, run_id: int, slot: int) -> list[Path]:
        """A slot's records, the newest first; there are two only where a process ended between two steps."""
        found = (self._runs / str(run_id)).glob(f"{slot}.*.record")
        return sorted(filter(_is_record, found), key=_number, reverse=True)

    def load(self, run_id: int, slot: int) -> pb.SlotRecord | None:
        """What a slot last did in a run. A record that cannot be read counts as none."""
        for path in self._records(run_id, slot):
            with contextlib.suppress(OSError, DecodeError):
                with path.open("rb") as file:
                    checksum, data = file.read(4), file.read()
                if checksum == _checksum(data):
                    return pb.SlotRecord.FromString(data)
        return None

    def keep(self, record: pb.SlotRecord, slot: int) -> None:
        """Replaces a slot's record: state and reply become one fact, that a kill cannot tear apart.

        Every record has a name of its own: renaming onto a file that is there makes ext4 write it out at once, which
        costs more than the rest of a small task.
        """
        key = (record.run_id, slot)
        old = self._last.get(key) or next(iter(self._records(*key)), None)
        folder = self._runs / str(record.run_id)
        if old is None:
            folder.mkdir(exist_ok=True)
        path = folder / f"{slot}.{0 if old is None else _number(old) + 1}.record"
        data = record.SerializeToString()
        write_atomically(path, [_checksum(data), data], sync=False)
        self._last[key] = path
        if old is not None:
            old.unlink(missing_ok=True)

    def last_run(self) -> list[pb.SlotRecord]:
        """The records of the run this device worked for last; those of long past runs are removed."""
        folders = [path for path in self._runs.iterdir() if path.name.isdecimal()]
        folders.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
        for folder in folders[_RUNS_KEPT:]:
            shutil.rmtree(folder, ignore_errors=True)
        if not folders:
            return []
        slots = {int(path.name.partition(".")[0]) for path in folders[0].iterdir() if _is_record(path)}
        found = [self.load(int(folders[0].name), slot) for slot in sorted(slots)]
        return [record for record in found if record is not None]

    def outbox(self, task_id: int) -> Path:
        """Where the large blobs of a reply wait."""
        return self.directory / "outbox" / str(task_id)

    def settle(self, task_id: int) -> None:
        """A reply's fate is known: its blobs may go."""
        shutil.rmtree(self.outbox(task_id), ignore_errors=True)

    def empty_outbox(self, but: Collection[int]) -> None:
        """Removes blobs of replies that nobody remembers."""
        for path in (self.directory / "outbox").glob("*"):
            if path.name not in {str(task) for task in but}:
                shutil.rmtree(path, ignore_errors=True)

    def trim_blobs(self, limit_bytes: int, but: Collection[bytes]) -> None:
        """Removes the least recently used models above the limit, except those in use."""
        needed = {name.hex() for name in but}
        files = sorted(((path.stat(), path) for path in self.blobs.directory.iterdir()), key=lambda f: f[0].st_mtime_ns)
        total = sum(stat.st_size for stat, _ in files)
        for stat, path in files:
            if total <= limit_bytes:
                return
            if path.name.partition(".")[0] not in needed:
                path.unlink(missing_ok=True)
                total -= stat.st_size


def _is_record(path: Path) -> bool:
    return _RECORD.fullmatch(path.name) is not None


def _number(record: Path) -> int:
    return int(record.name.split(".")[1])


def _checksum(data: bytes) -> bytes:
    """Tells a record that was not yet on the disk when the power went: records are not synced."""
    return zlib.crc32(data).to_bytes(4, "big")
