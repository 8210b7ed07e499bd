"""What the engines have in common: their command line, their stop-watch, the line of JSON that they print.

The model that an engine ends with goes into a file, so that one judge says for all of them what it has learned.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engines.arrays import Floats

TICKS = os.sysconf("SC_CLK_TCK")


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser that knows `work` and `model` (paths), `rounds` and `warm_up`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("work", type=Path, help="the .npz that arrays.py made")
    parser.add_argument("model", type=Path, help="the .npz where the last model goes, as in Work.weights")
    parser.add_argument("--rounds", type=int, default=10, help="rounds that are measured (%(default)s)")
    parser.add_argument("--warm-up", type=int, default=2, help="rounds before them (%(default)s)")
    return parser


class Meter:
    """Wall and CPU time of process `root` (this one) and all it started, from `start` to `stop`; then `report`, once.

    What was spent before `start`, on imports, compilation and rounds that warm up, is told apart.
    """

    def __init__(self, root: int | None = None) -> None:
        self.root = root or os.getpid()
        self.times: dict[str, float] = {}

    def start(self) -> None:
        before, now = cpu_seconds(self.root), wall_seconds()
        self.times = {"start_seconds": age(self.root), "start_cpu_seconds": before}
        self._cpu, self._wall = before, now

    def stop(self) -> None:
        self.times["wall_seconds"] = wall_seconds() - self._wall
        self.times["cpu_seconds"] = cpu_seconds(self.root) - self._cpu

    def report(self, updates: int, weights: Mapping[str, Floats], model: Path, **settings: object) -> None:
        """Write the last model, and print what so many updates of devices took; `settings` as the engine has them."""
        arrays: dict[str, Any] = dict(weights)
        np.savez(model, **arrays)
        print(json.dumps({"updates": updates, **self.times, "settings": settings}), flush=True)


@dataclass
class RoundMeter:
    """Starts and stops a `Meter` for engines that tell when a round is over."""

    meter: Meter
    warm_up: int
    rounds: int

    @property
    def last(self) -> int:
        """The number of rounds, which are counted from 1, and so the number of the last one."""
        return self.warm_up + self.rounds

    def after(self, done: int) -> None:
        """`done` rounds have been run."""
        if done == self.warm_up:
            self.meter.start()
        elif done == self.last:
            self.meter.stop()


def wall_seconds() -> float:
    """The machine's clock, where `time.perf_counter` and its like may be a simulator's."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)


def cpu_seconds(root: int) -> float:
    """CPU seconds, user and system, that process `root`, those it started and theirs took, the ended ones included."""
    return sum(ticks_of(pid) for pid in tree(root)) / TICKS


def tree(root: int) -> list[int]:
    """`root` and the processes below it."""
    pids = [root]
    for pid in pids:  # grows as it goes
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                pids += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue  # it has ended
    return pids


def ticks_of(pid: int) -> int:
    fields = stat_of(pid)
    return sum(int(field) for field in fields[11:15])  # utime, stime, and both of the children waited for


def age(pid: int) -> float:
    """Seconds since process `pid` was started."""
    fields = stat_of(pid)
    return float(Path("/proc/uptime").read_text().split()[0]) - int(fields[19]) / TICKS if fields else 0.0


def stat_of(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third one on; none where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
