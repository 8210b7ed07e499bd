"""What a run on a foreign grid remembers: its decision log, and the state its strategy saved last."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_KEPT_IN_MEMORY = 10_000


class RunMemory:
    """`decisions.jsonl` and `strategy.json` in `directory`, which is made if need be; in memory where it is None.

    `decisions` are the last entries as they were written, the newest last.
    """

    def __init__(self, directory: Path | None) -> None:
        self.decisions: deque[str] = deque(maxlen=_KEPT_IN_MEMORY)
        self._directory = directory
        self._state: str | None = None
        self._counter = 0
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
            self._log = directory / "decisions.jsonl"
            self._state_file = directory / "strategy.json"
            if self._log.exists():
                with self._log.open("rb") as lines:
                    self._counter = sum(1 for _ in lines)
            if self._state_file.exists():
                self._state = self._state_file.read_text(encoding="utf-8")

    def record(self, seconds: float, decision: Mapping[str, Any]) -> None:
        """Appends one decision with the next counter; `seconds` go into the last column. JSON has no NaN: null."""
        self._counter += 1
        entry = {"n": self._counter, **decision, "seconds": round(seconds, 6)}
        line = json.dumps(_plain(entry), allow_nan=False)
        self.decisions.append(line)
        if self._directory is not None:
            with self._log.open("a", encoding="utf-8") as log:
                log.write(line + "\n")

    def save(self, state: Mapping[str, Any]) -> None:
        """Keeps the state, on disk as a whole or not at all. Raises TypeError for what is not plain."""
        text = json.dumps(state)  # a state is read by Python alone, and may hold NaN
        if self._directory is not None:
            temporary = self._state_file.with_name(f".{self._state_file.name}.{os.getpid()}.tmp")
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(self._state_file)
        self._state = text

    def restore(self) -> dict[str, Any] | None:
        """The state saved last, by this process or by one before it; None where there is none."""
        return None if self._state is None else dict(json.loads(self._state))


def _plain(value: Any) -> Any:
    """A value as JSON takes it: null for NaN and infinities, text for what is no plain value."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | str) else str(value)
