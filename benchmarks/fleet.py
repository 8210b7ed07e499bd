"""The fedpace side of the benchmarks: a server and device processes on this machine, running one app."""

from __future__ import annotations

from pathlib import Path

NODES = 8


def measure_fedpace(app_dir: Path, rounds: int) -> list[float]:
    """Milliseconds of each round of the echo app, in order: what it wrote to its run-config `timings`."""
    raise NotImplementedError


def measure_fan_out(app_dir: Path, repetitions: int) -> tuple[list[float], int]:
    """Seconds of each repetition of the fan-out app, and the most anonymous memory the coordinator process took
    above what it had before the first (bytes)."""
    raise NotImplementedError
