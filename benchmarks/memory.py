"""How much memory another process takes: its anonymous pages, sampled while it works."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def anonymous_bytes(pid: int) -> int:
    """Bytes of anonymous memory that process `pid` has resident. OSError when there is no such process.

    From counters the kernel keeps anyway, and from the shortest list of them: who looks twenty times a second takes the
    time from what is measured.
    """
    _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
    if resident == "0":
        raise ProcessLookupError(f"process {pid} has ended")
    return (int(resident) - int(shared)) * _PAGE_BYTES


class AnonymousMemory:
    """Samples `anonymous_bytes(pid)` every `interval` seconds from `with` to the end of its block.

    `start_bytes` is the first sample, `peak_bytes` the largest. What the process frees between two samples is not seen.
    """

    def __init__(self, pid: int, interval: float = 0.05) -> None:
        self.pid = pid
        self.interval = interval
        self.start_bytes = 0
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    @property
    def peak_above_start(self) -> int:
        """Bytes."""
        return self.peak_bytes - self.start_bytes

    def __enter__(self) -> Self:
        self.start_bytes = self.peak_bytes = anonymous_bytes(self.pid)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(self.interval):
            try:
                self.peak_bytes = max(self.peak_bytes, anonymous_bytes(self.pid))
            except OSError:
                return  # the process has ended: what was seen stands
