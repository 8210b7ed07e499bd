"""A run written down as it happened, so that it can be replayed:

    DIR/recording.json       which app, config and seed; how it ended, once it has
    DIR/rows.jsonl           a row an arrival (what devices did) and a row a look (what the ServerApp asked its grid),
                             in the order in which the ServerApp's process saw them
    DIR/blobs/               the arrays of replies, named by their SHA-256
    DIR/initial.safetensors  the model the run was told to begin with, if it was
    DIR/decisions.jsonl      the run's decision log, once it has ended

A look lies after the arrivals that it could see and carries the time it was told, so that the rows say all that a grid
returned: who was there, which answers, which event, what time. Times are in seconds since the run began.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import math
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedpace import __version__
from fedpace.errors import ConfigError, PayloadError, RunError
from fedpace.hosting.app import AppFolder
from fedpace.hosting.config import Config
from fedpace.hosting.files import write_atomically
from fedpace.hosting.outputs import to_json
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.blobs import BlobStore, digest, read_blob
from fedpace.protocol.paced import DeviceProfile
from fedpace.protocol.payloads import Get, all_blobs, metrics_of

log = logging.getLogger("fedpace.recording")

FORMAT = 3
ARRIVALS = ("joined", "left", "beat", "replied", "failed", "expired", "stop")


@dataclass(frozen=True, slots=True)
class Look:
    """The ServerApp asked its grid for something and was told the time `at`; `found` is what else the row holds."""

    what: str
    at: float
    found: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Arrival:
    """Something that devices did, or that the coordinator said. `what` is one of `ARRIVALS`.

    `profile` is what was known of the device from then on; `quiet` news of a device were not told as an event.
    `payload` is a reply's, its blobs without data. `due` is `at`, moved by the least where two arrivals share a time:
    no two arrivals have the same.
    """

    what: str
    sequence: int
    at: float
    due: float
    node_id: int = 0
    name: str = ""
    profile: DeviceProfile | None = None
    quiet: bool = False
    task: int = 0
    code: int = 0
    reason: str = ""
    compute_seconds: float = 0.0
    payload: pb.Payload | None = None


def model_digest(payload: pb.Payload) -> str:
    """Stands for the arrays of a message."""
    return digest([blob.name for blob in payload.blobs]).hex()[:32]


class Recorder:
    """Writes a recording. Calls come one at a time, in order. A disk that fails ends the recording, never the run."""

    def __init__(
        self,
        directory: Path,
        app: AppFolder,
        *,
        run_id: int,
        seed: int,
        overrides: Config,
        initial_model: Path | None = None,
    ) -> None:
        """Raises ConfigError where the folder cannot be written to."""
        self._directory = directory
        self._header: dict[str, Any] = {
            "format": FORMAT,
            "fedpace": __version__,
            "app": {"name": app.name, "version": app.version, "sha256": app.sha256},
            "run_id": run_id,
            "seed": seed,
            "run_config": dict(overrides),
            "initial_model": initial_model is not None,
        }
        self._hash = hashlib.sha256()
        self._thread: int | None = None
        self._broken = self._warned = False
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self._blobs = BlobStore(directory / "blobs")
            if initial_model is not None:
                shutil.copyfile(initial_model, directory / "initial.safetensors")
            self._rows = (directory / "rows.jsonl").open("wb")
            self._write_header()
        except OSError as error:
            raise ConfigError(f"--record: {directory} cannot be written to: {error}") from None

    def look(self, what: str, at: float, **found: Any) -> None:
        """The ServerApp was told the time `at`, and what was asked for."""
        thread = threading.get_ident()
        self._thread = self._thread or thread
        if thread != self._thread:
            found["thread"] = "another"
            if not self._warned:
                log.warning("this run cannot be replayed: its ServerApp uses the grid from more than one thread")
                self._warned = True
        self._row({"look": what, "at": at, **found})

    def arrival(
        self, row: Mapping[str, Any], profile: DeviceProfile | None, payload: pb.Payload | None, get: Get
    ) -> None:
        """Something arrived: `row` says what, `sequence`, `at` and more, as `Arrival` has it."""
        entry = dict(row)
        if profile is not None:
            entry["profile"] = asdict(profile)
        try:
            if payload is not None:
                entry["metrics"] = metrics_of(payload, get)
                entry["payload"] = base64.b64encode(self._kept(payload, get).SerializeToString()).decode()
            self._row(entry)
            if not self._broken:
                self._rows.flush()
        except Exception as error:  # noqa: BLE001 - whatever it is, the run matters more
            self._break(error)

    def _kept(self, payload: pb.Payload, get: Get) -> pb.Payload:
        """The payload without the bytes of its blobs, which are kept in files."""
        kept = pb.Payload()
        kept.CopyFrom(payload)
        for blob in all_blobs(kept):
            self._blobs.put([get(blob)])
            blob.ClearField("data")
        return kept

    def _row(self, entry: Mapping[str, Any]) -> None:
        if self._broken:
            return
        line = (to_json(entry) + "\n").encode()
        try:
            self._rows.write(line)
        except OSError as error:
            self._break(error)
        self._hash.update(line)

    def _break(self, error: Exception) -> None:
        self._broken = True
        log.error("the recording in %s ends here, the run goes on: %s", self._directory, error)

    def close(self, status: str, decisions: Path) -> None:
        """The run has ended, and so is its decision log."""
        if self._broken:
            return
        try:
            self._rows.close()
            shutil.copyfile(decisions, self._directory / "decisions.jsonl")
            self._header |= {"status": status, "rows_sha256": self._hash.hexdigest()}
            self._write_header()
        except OSError as error:
            self._break(error)

    def _write_header(self) -> None:
        write_atomically(self._directory / "recording.json", (to_json(self._header, indent=2) + "\n").encode())


@dataclass(frozen=True)
class Recording:
    """A recording as read. `complete`: the run that was recorded has ended, rather than been killed."""

    directory: Path
    app: Mapping[str, str]
    run_id: int
    seed: int
    overrides: Config
    initial_model: Path | None
    complete: bool
    rows: list[Look | Arrival]

    def arrivals(self) -> Iterator[Arrival]:
        """Those that are more than the grid's own end, in order."""
        return (row for row in self.rows if isinstance(row, Arrival) and row.what != "stop")

    def get(self, blob: pb.Blob) -> memoryview:
        """The bytes of a blob. Raises RunError where they are not those that were recorded."""
        try:
            view = read_blob(self.directory / "blobs", blob)
        except PayloadError as error:
            raise RunError(f"the recording {self.directory} is damaged: {error}") from None
        if digest([view]) != blob.name:
            raise RunError(f"the recording {self.directory} is damaged: blob {blob.name.hex()[:12]} has been changed")
        return view

    def first_difference(self, decisions: Path) -> str | None:
        """Where a decision log first differs from the recorded one, times apart; None where it does not."""
        recorded, replayed = (_decisions(path) for path in (self.directory / "decisions.jsonl", decisions))
        for number, (ours, theirs) in enumerate(zip(recorded, replayed, strict=False), 1):
            if ours != theirs:
                return f"decision {number} is {to_json(theirs)}, the recorded one {to_json(ours)}"
        if len(recorded) != len(replayed):
            return f"there are {len(replayed)} decisions, {len(recorded)} were recorded"
        return None


def _decisions(path: Path) -> list[dict[str, Any]]:
    try:
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise RunError(f"the decision log {path} cannot be read: {error}") from None
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in entries]


def load_recording(directory: Path) -> Recording:
    """Raises ConfigError for a folder that is no recording, or one that is damaged: it names file and line."""
    path = directory / "recording.json"
    try:
        header = json.loads(path.read_bytes())
        if header["format"] != FORMAT:
            raise ConfigError(f"{path}: its format is {header['format']!r}, this fedpace replays {FORMAT}")
        data = (directory / "rows.jsonl").read_bytes()
        complete = "rows_sha256" in header
        if complete and hashlib.sha256(data).hexdigest() != header["rows_sha256"]:
            raise ConfigError(
                f"{directory / 'rows.jsonl'} is damaged: it is not what was written; record the run again"
            )
        return Recording(
            directory=directory,
            app={key: str(header["app"][key]) for key in ("name", "version", "sha256")},
            run_id=int(header["run_id"]),
            seed=int(header["seed"]),
            overrides=header["run_config"],
            initial_model=directory / "initial.safetensors" if header["initial_model"] else None,
            complete=complete,
            rows=_read_rows(directory / "rows.jsonl", data),
        )
    except FileNotFoundError as error:
        raise ConfigError(f"{directory} is no recording: there is no {error.filename}") from None
    except OSError as error:
        raise ConfigError(f"the recording {directory} cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged: {_told(error)}") from None


def _read_rows(path: Path, data: bytes) -> list[Look | Arrival]:
    rows: list[Look | Arrival] = []
    due, sequence = -math.inf, 0
    *lines, _torn = data.split(b"\n")  # after the last newline: nothing, or half a row of a server that was killed
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            row: Look | Arrival
            if "look" in entry:
                row = _look(entry)
            else:
                due = max(float(entry["at"]), math.nextafter(due, math.inf))
                row = _arrival(entry, due)
                if row.sequence <= sequence:
                    raise ValueError(f"sequence {row.sequence} comes after {sequence}")
                sequence = row.sequence
        except ConfigError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from None
        except Exception as error:  # noqa: BLE001 - damaged bytes may be anything, and protobuf has errors of its own
            raise ConfigError(f"{path}, line {number} is damaged: {_told(error)}; record the run again") from None
        rows.append(row)
    return rows


def _look(entry: dict[str, Any]) -> Look:
    look = Look(entry.pop("look"), float(entry.pop("at")), entry)
    if "thread" in entry:
        raise ConfigError("this run cannot be replayed: its ServerApp used the grid from more than one thread")
    return look


def _arrival(entry: dict[str, Any], due: float) -> Arrival:
    entry.pop("metrics", None)  # those of the payload, for people
    if entry["what"] not in ARRIVALS:
        raise ValueError(f"there is no {entry['what']!r}")
    if (profile := entry.pop("profile", None)) is not None:
        profile = {name: tuple(value) if isinstance(value, list) else value for name, value in profile.items()}
        entry["profile"] = DeviceProfile(**profile)
    if "payload" in entry:
        entry["payload"] = pb.Payload.FromString(base64.b64decode(entry["payload"], validate=True))
    return Arrival(**entry, due=due)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if isinstance(error, KeyError | TypeError) else str(error)
