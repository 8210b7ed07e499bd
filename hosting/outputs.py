"""What becomes of a run, written to its folder:

    OUT/metrics.jsonl      a line an evaluation: {"round", "version", "seconds", "source", "metrics"}
    OUT/versions/          every model version, safetensors
    OUT/decisions.jsonl    the decision log: counters and names, times in a column of their own
    OUT/model.safetensors  the last version
    OUT/result.json        how it ended

JSON has no NaN and no infinity: such a number is null there.

Versions are written by a thread of their own, so that a round never waits for the disk.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import queue
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from fedpace.errors import ConfigError
from fedpace.hosting.app import AppFolder
from fedpace.hosting.files import write_atomically

log = logging.getLogger("fedpace.outputs")

EXIT_CODES = {"finished": 0, "failed": 1, "interrupted": 130}
"""What a command exits with, by the status in `result.json`."""


class Outputs:
    """The folder of one run. Methods are safe from any thread; `close` waits for what is under way."""

    def __init__(self, directory: Path, *, keep_versions: int = 0, only_last: bool = False) -> None:
        """The last `keep_versions` are kept, all for 0; with `only_last` no version but the last is ever written.

        `latest` and `latest_metrics` are the number and the metrics that came last.
        """
        self.directory = directory
        self.model_sha256: str | None = None
        self.latest = 0
        self.latest_metrics: dict[str, Any] = {}
        self._only_last = only_last
        self._last: ArrayRecord | None = None
        self._model: bytes | None = None
        self._keep = keep_versions
        self._warned = False
        (directory if only_last else directory / "versions").mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._metrics = (directory / "metrics.jsonl").open("a", encoding="utf-8")
        self._decisions = (directory / "decisions.jsonl").open("a", encoding="utf-8")
        self._counter = 0
        self._versions: queue.Queue[tuple[int, ArrayRecord] | None] = queue.Queue(maxsize=2)
        self._writer = threading.Thread(target=self._write_versions, name="versions", daemon=True)
        self._writer.start()

    def metrics(self, server_round: int, version: int, seconds: float, source: str, metrics: Mapping[str, Any]) -> None:
        """Appends one line of metrics; `seconds` since the run began."""
        entry = {
            "round": server_round,
            "version": version,
            "seconds": round(seconds, 6),
            "source": source,
            "metrics": dict(metrics),
        }
        self.latest_metrics = dict(metrics)
        with self._lock:
            if not self._metrics.closed:
                self._metrics.write(to_json(entry) + "\n")
                self._metrics.flush()
                self._decisions.flush()

    @property
    def decisions(self) -> int:
        """How many decisions there are."""
        return self._counter

    def decision(self, seconds: float, decision: Mapping[str, Any]) -> None:
        """Appends one decision, with the next counter; `seconds` go into a column of their own, the last."""
        with self._lock:
            if not self._decisions.closed:  # what still happens once the run has ended belongs to none
                self._counter += 1
                self._decisions.write(to_json({"n": self._counter, **decision, "seconds": round(seconds, 6)}) + "\n")

    def decision_text(self, seconds: float, text: str) -> None:
        """`decision`, for those that are many: an entry as JSON without braces, `"what": "send", "task": 1`."""
        with self._lock:
            if not self._decisions.closed:
                self._counter += 1
                self._decisions.write(f'{{"n": {self._counter}, {text}, "seconds": {round(seconds, 6)}}}\n')

    def version(self, version: int, arrays: ArrayRecord) -> None:
        """Keeps a model version. Waits only where the disk is two versions behind."""
        self.latest = version
        if self._only_last:
            self._last = arrays.copy()
        else:
            self._versions.put((version, arrays.copy()))

    def _write_versions(self) -> None:
        while (item := self._versions.get()) is not None:
            version, arrays = item
            try:
                data = safetensors_bytes(arrays)
                self._model = data
                if self._only_last:
                    continue
                write_atomically(self.directory / "versions" / f"{version:06d}.safetensors", data)
                if self._keep:
                    old = self.directory / "versions" / f"{version - self._keep:06d}.safetensors"
                    old.unlink(missing_ok=True)
            except Exception as error:  # noqa: BLE001 - arrays may hold anything, and the next version is still to come
                if not self._warned:
                    log.warning("model version %d cannot be kept as safetensors: %s", version, error)
                self._warned = True

    def close(self) -> None:
        """Waits until everything is on disk. A second call does nothing."""
        if not self._writer.is_alive():
            return
        if self._last is not None:
            self._versions.put((self.latest, self._last))
        self._versions.put(None)
        self._writer.join()
        if self._model is not None:
            write_atomically(self.directory / "model.safetensors", self._model)
            self.model_sha256 = hashlib.sha256(self._model).hexdigest()
        with self._lock:
            self._metrics.close()
            self._decisions.close()


def default_out(app: AppFolder) -> Path:
    """Where a run's results go if nobody says."""
    return Path("runs") / f"{app.name}-{time.strftime('%Y%m%d-%H%M%S')}"


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: null for NaN and infinities, text for what is no plain value."""
    try:
        return _encode(value) if indent is None else json.dumps(value, default=_plain, allow_nan=False, indent=indent)
    except ValueError:
        return json.dumps(_finite(value), default=_plain, indent=indent)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)


_encode = json.JSONEncoder(default=_plain, allow_nan=False).encode


def _finite(value: Any) -> Any:
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def safetensors_bytes(arrays: ArrayRecord) -> bytes:
    """A model as safetensors. Raises whatever numpy and safetensors do for arrays they do not know."""
    return save({name: np.asarray(array.numpy(), order="C") for name, array in arrays.items()})


def check_model_file(path: Path) -> None:
    """Raises ConfigError where a file is not safetensors; reads its header alone."""
    try:
        with safe_open(path, framework="numpy"):
            pass
    except FileNotFoundError:
        raise ConfigError(f"--initial-model: there is no file {path}") from None
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"--initial-model: {path} is not a safetensors file: {error}") from None


def load_model(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of a safetensors file. Raises ConfigError where it is not one."""
    check_model_file(path)
    return load_file(path)


def write_result(directory: Path, result: Mapping[str, Any]) -> None:
    """Writes `OUT/result.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / "result.json", (to_json(result, indent=2) + "\n").encode())
