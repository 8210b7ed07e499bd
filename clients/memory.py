"""What a device keeps on disk of each run: the state of its app with the last reply, and blobs on their way out.

STATE/runs/<run id>-<slot>.record   a SlotRecord, replaced as a whole after every task
STATE/outbox/<task id>/             large blobs of a reply nobody has acknowledged yet
STATE/blobs/                        models fetched, least recently used first out
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Collection
from pathlib import Path

from google.protobuf.message import DecodeError

from fedpace.hosting.files import write_atomically
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.blobs import BlobStore

_RUNS_KEPT = 16


class DeviceMemory:
    """One device's state folder; the agent and its workers each open it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.blobs = BlobStore(directory / "blobs")
        self._runs = directory / "runs"
        self._runs.mkdir(parents=True, exist_ok=True)

    def _record_path(self, run_id: int, slot: int) -> Path:
        return self._runs / f"{run_id}-{slot}.record"

    def load(self, run_id: int, slot: int) -> pb.SlotRecord | None:
        """What a slot last did in a run. A record that cannot be read counts as none."""
        with contextlib.suppress(OSError, DecodeError):
            return pb.SlotRecord.FromString(self._record_path(run_id, slot).read_bytes())
        return None

    def keep(self, record: pb.SlotRecord, slot: int) -> None:
        """Replaces a slot's record: state and reply become one fact, that a kill cannot tear apart."""
        write_atomically(self._record_path(record.run_id, slot), record.SerializeToString(), sync=False)

    def last_run(self) -> list[pb.SlotRecord]:
        """The records of the run this device worked for last; those of long past runs are removed."""
        paths = sorted(self._runs.glob("*.record"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        runs = list(dict.fromkeys(path.name.partition("-")[0] for path in paths))
        for path in paths:
            if path.name.partition("-")[0] in runs[_RUNS_KEPT:]:
                path.unlink(missing_ok=True)
        found = []
        for path in paths:
            run, _, slot = path.stem.partition("-")
            if run == runs[0] and (record := self.load(int(run), int(slot))) is not None:
                found.append(record)
        return found

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
        needed = {sha256.hex() for sha256 in but}
        files = sorted(((path.stat(), path) for path in self.blobs.directory.iterdir()), key=lambda f: f[0].st_mtime_ns)
        total = sum(stat.st_size for stat, _ in files)
        for stat, path in files:
            if total <= limit_bytes:
                return
            if path.name.removesuffix(".part") not in needed:
                path.unlink(missing_ok=True)
                total -= stat.st_size
