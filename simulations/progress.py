"""What a person sees of a simulation while it runs."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

_LOOK_SECONDS = 0.2
_SHOWN = ("accuracy", "acc", "eval-acc", "eval_acc", "loss", "eval_loss", "train-loss", "train_loss")


class SimulationProgress:
    """A line on a terminal: virtual time, model versions, updates a second, and how well the model does.

    Elsewhere nothing is shown. Use it as a context manager.
    """

    def __init__(self, devices: int) -> None:
        self._shown = sys.stderr.isatty()
        self._started = self._looked = time.monotonic()
        self._metric = ""
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=not self._shown,
            transient=True,
            auto_refresh=False,
        )
        self._task = self._bar.add_task(f"{devices:,} devices", total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def metrics(self, metrics: Mapping[str, Any]) -> None:
        """The last metrics of the run; the first of the usual names is shown."""
        for name in _SHOWN:
            if isinstance(value := metrics.get(name), int | float):
                self._metric = f"{name} {value:.4g}"
                return

    def update(self, virtual_seconds: float, versions: int, received: int) -> None:
        """Called often; looks at the clock, and draws a few times a second."""
        now = time.monotonic()
        if not self._shown or now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        speed = received / (now - self._started)
        parts = [
            f"virtual {told_seconds(virtual_seconds)}",
            f"version {versions}",
            f"{speed:,.0f} updates/s",
            self._metric,
        ]
        self._bar.update(self._task, description="  ".join(filter(None, parts)))
        self._bar.refresh()


def told_seconds(seconds: float) -> str:
    """A duration for people: 3.2 s, 4 min 5 s, 7 h 12 min, 3 d 4 h."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = int(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600} h"
