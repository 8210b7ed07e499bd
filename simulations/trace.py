"""The trace of a simulation: a row an event, in columns that a notebook reads with `numpy.load`."""

from __future__ import annotations

import hashlib
from array import array
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

KINDS = ("joined", "left", "replied", "failed", "expired", "cancelled")
JOINED, LEFT, REPLIED, FAILED, EXPIRED, CANCELLED = range(6)

COLUMNS = {"seconds": "d", "kind": "B", "node_id": "Q", "task": "q", "sent_seconds": "d", "compute_seconds": "d"}


class Trace:
    """What happened, in order.

    Columns: `seconds` (float64, virtual), `kind` (uint8, an index into `KINDS`), `node_id` (uint64), `task` (int64, 0
    for joined and left), `sent_seconds` (when the task was sent) and `compute_seconds` (what the device really spent on it).
    """

    def __init__(self) -> None:
        self._columns: list[array[Any]] = [array(code) for code in COLUMNS.values()]
        self._seconds, self._kind, self._node_id, self._task, self._sent, self._compute = self._columns

    def __len__(self) -> int:
        return len(self._kind)

    def add(self, seconds: float, kind: int, node_id: int, task: int, sent: float, compute: float) -> None:
        self._seconds.append(seconds)
        self._kind.append(kind)
        self._node_id.append(node_id)
        self._task.append(task)
        self._sent.append(sent)
        self._compute.append(compute)

    def columns(self) -> dict[str, NDArray[Any]]:
        """The columns so far, each of shape (events,)."""
        return {
            name: np.frombuffer(column, dtype=column.typecode) if len(column) else np.empty(0, column.typecode)
            for name, column in zip(COLUMNS, self._columns, strict=True)
        }

    def sha256(self) -> str:
        """Over the bytes of all columns: equal for runs in which the same happened at the same times."""
        found = hashlib.sha256()
        for column in self._columns:
            found.update(memoryview(column).cast("B"))
        return found.hexdigest()

    def write(self, path: Path) -> None:
        """Writes a compressed .npz; array `kinds` holds the names."""
        with path.open("wb") as file:
            columns: dict[str, Any] = {"kinds": np.array(KINDS), **self.columns()}
            np.savez_compressed(file, **columns)
