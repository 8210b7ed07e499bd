"""Runs an engine of benchmarks/engines in a process of its own, to its end, and says what its work took and taught."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil

from benchmarks.engines.arrays import DEVICES_A_ROUND, Work, load
from benchmarks.engines.meter import tree
from fedpace.errors import RunError

ROOT = Path(__file__).resolve().parents[1]
MB = 1e6
SAMPLE_SECONDS = 0.2
STOP_SECONDS = 10.0


@dataclass(frozen=True)
class Measured:
    """What `updates` of devices took, start-up apart, and what the model had learned by then.

    `cpu_seconds` holds every process of the engine. `peak_mb` is from start to end: the anonymous memory of all its
    processes, and what the largest of them maps beside (libraries, shared memory), which the others share with it.
    Losses are mean cross-entropies on the test images.
    """

    updates: int
    wall_seconds: float
    cpu_seconds: float
    start_seconds: float
    start_cpu_seconds: float
    peak_mb: float
    loss_before: float
    loss: float
    accuracy: float
    settings: dict[str, Any]

    @property
    def cpu_ms(self) -> float:
        """CPU milliseconds an update."""
        return 1e3 * self.cpu_seconds / self.updates

    @property
    def rate(self) -> float:
        """Updates a second."""
        return self.updates / self.wall_seconds

    @property
    def event_rate(self) -> float:
        """Events a second, of an engine that counts them: those of the whole run, per version."""
        return self.rate * float(self.settings["events"] / self.settings["versions"] / DEVICES_A_ROUND)


def measure(module: str, work: Path, *options: object, python: Path | None = None, timeout: float = 300.0) -> Measured:
    """Run benchmarks/engines/MODULE.py on the work in a file, by `python` (ours, unless given) and with `options`.

    RunError when it fails, takes longer than `timeout` seconds, or has learned nothing; no process is left in any case.
    """
    with tempfile.TemporaryDirectory(prefix="engine-") as folder:
        model = Path(folder) / "model.npz"
        command = [str(python or sys.executable), "-m", f"benchmarks.engines.{module}", str(work), str(model)]
        out, peak = run(module, [*command, *map(str, options)], Path(folder), timeout)
        line = json.loads(out.strip().splitlines()[-1])
        loss_before, _ = judge_first(work)
        loss, accuracy = judge_file(model, work)
    if not loss < loss_before:
        raise RunError(f"{module} did not learn: the loss was {loss_before:.3f} before and is {loss:.3f} after")
    return Measured(peak_mb=peak / MB, loss_before=loss_before, loss=loss, accuracy=accuracy, **line)


def run(name: str, command: list[str], folder: Path, timeout: float) -> tuple[str, int]:
    """The standard output of a command, and the bytes of memory that it and its processes took at most."""
    # What is compiled outlives a run, as it does where people work; everything else goes with the folder.
    compiled = {"TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir()) / "fedpace-benchmarks-compiled")}
    environment = {**os.environ, **QUIET, **compiled, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=err)
    with all_ended(process), Memory(process.pid) as memory:
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise RunError(f"{name} was not done in {timeout:.0f} s\n  {' '.join(command)}") from error
    if code != 0:
        last_words = "\n".join(f"  {line}" for line in (folder / "stderr").read_text().strip().splitlines()[-8:])
        raise RunError(f"{name} failed with exit code {code}\n  {' '.join(command)}\n{last_words}")
    return (folder / "stdout").read_text(), memory.peak


QUIET = {
    # Engines that want more threads say so: inside operators this small they only cost.
    "OMP_NUM_THREADS": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@contextlib.contextmanager
def all_ended(process: subprocess.Popen[Any]) -> Iterator[None]:
    """Ends the processes below `process` with it, when the block is left before it ended by itself."""
    try:
        yield
    finally:
        if process.poll() is None:
            members = [psutil.Process(pid) for pid in tree(process.pid) if psutil.pid_exists(pid)]
            for stop in (psutil.Process.terminate, psutil.Process.kill):
                for member in members:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        stop(member)
                _, members = psutil.wait_procs(members, timeout=STOP_SECONDS)
            process.wait()


class Memory:
    """Samples the memory of process `root` and those below it, from `with` to the end of its block."""

    def __init__(self, root: int) -> None:
        self.root = root
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            parts = [resident(pid) for pid in tree(self.root)]
            self.peak = max(self.peak, sum(own for own, _ in parts) + max(mapped for _, mapped in parts))


def resident(pid: int) -> tuple[int, int]:
    """Bytes of anonymous memory that a process has resident, and of files and shared memory that it maps."""
    try:
        lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except OSError:
        return 0, 0
    found = {words[0]: int(words[1]) * 1024 for words in lines if words[0] in ("RssAnon:", "RssFile:", "RssShmem:")}
    return found.get("RssAnon:", 0), found.get("RssFile:", 0) + found.get("RssShmem:", 0)


@functools.cache
def work_of(path: Path) -> Work:
    return load(path)


@functools.cache
def judge_first(path: Path) -> tuple[float, float]:
    from benchmarks.engines.models import judge

    return judge(work_of(path).weights, work_of(path))


def judge_file(model: Path, work: Path) -> tuple[float, float]:
    import numpy as np

    from benchmarks.engines.models import judge

    with np.load(model, allow_pickle=False) as file:
        return judge({name: file[name] for name in file.files}, work_of(work))
