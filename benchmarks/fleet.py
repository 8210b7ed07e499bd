"""The fedpace side of the benchmarks: a server and device processes on this machine, running one app."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.memory import AnonymousMemory
from fedpace.errors import RunError
from fedpace.localfleet import LocalFleet

NODES = 8


def measure_fedpace(app_dir: Path, rounds: int, *, change: bool = False) -> tuple[list[float], dict[str, Any]]:
    """Milliseconds of each round of the echo app, in order, and the run's `result.json`."""
    with _fleet(app_dir, f"rounds={rounds} change={str(change).lower()}") as (fleet, timings):
        _finish(fleet, 120.0 + rounds)
        result = json.loads((fleet.out / "result.json").read_text())
        return json.loads(timings.read_text())["round_ms"], result


def measure_fan_out(app_dir: Path, repetitions: int) -> tuple[list[float], int]:
    """Seconds of each repetition of the fan-out app, and the most anonymous memory the coordinator process took
    above what it had before the first (bytes)."""
    with _fleet(app_dir, f"repetitions={repetitions}") as (fleet, timings):
        assert fleet.server is not None
        with AnonymousMemory(fleet.server.pid) as memory:
            _finish(fleet, 120.0 + 60.0 * repetitions)
        return json.loads(timings.read_text())["seconds"], memory.peak_above_start


@contextmanager
def _fleet(app_dir: Path, run_config: str) -> Iterator[tuple[LocalFleet, Path]]:
    """A server with `NODES` devices about to run an app, and the file its timings will be in."""
    with tempfile.TemporaryDirectory() as folder, LocalFleet(Path(folder), app_dir) as fleet:
        timings = Path(folder) / "timings.json"
        config = f'nodes={NODES} timings="{timings}" {run_config}'
        fleet.start_server("--min-nodes", str(NODES), "--run-config", config, "--seed", "0")
        for index in range(NODES):
            fleet.start_device(f"device-{index}", node_config=f"partition-id={index}")
        yield fleet, timings


def _finish(fleet: LocalFleet, seconds: float) -> None:
    started = time.monotonic()
    code = fleet.wait(seconds)
    if code != 0:
        raise RunError(f"exit code {code} after {time.monotonic() - started:.0f} s:\n{fleet.log('server')[-4000:]}")
