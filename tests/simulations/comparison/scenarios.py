"""Scenarios for tests, and `fedpace compare` as a process."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tests.simulations.simulated import APPS, environment

SECONDS = 110
CONTEST = APPS / "contest"

SLOW = """
[compute]
model = "lognormal"
sigma = 1.0
jitter = 0.2
[faults]
dropout = 0.1
notice_seconds = 1.0
"""


def scenario_text(
    strategies: str,
    *,
    app: Path = CONTEST,
    seeds: Sequence[int] = (1, 2),
    seconds: float = 30.0,
    devices: int = 20,
    before: str = "",
    config: str = "{}",
) -> str:
    """One app on one uneven fleet; `before` goes in front of the tables."""
    return f"""
seeds = {list(seeds)}
baseline = "FedAvg"
evaluations = 20
{before}

[[apps]]
name = "contest"
folder = "{app}"
devices = {devices}
virtual_seconds = {seconds}
target = 0.7
config = {config}

[[fleets]]
name = "uneven"
fleet = "uneven.toml"

[[strategies]]
name = "FedAvg"
settings = {{ train_nodes = 10 }}

{strategies}
"""


FEDBUFF = """
[[strategies]]
name = "FedBuff"
settings = { train_nodes = 10, k = 4 }
"""


def write_scenario(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "uneven.toml").write_text(SLOW)
    path = folder / "scenario.toml"
    path.write_text(text)
    return path


def command(scenario: Path, out: Path, *options: str | Path) -> list[str]:
    return [sys.executable, "-m", "fedpace", "compare", str(scenario), "--out", str(out), *map(str, options)]


def compare(scenario: Path, out: Path, *options: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(scenario, out, *options),
        env=environment(out),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def compared(scenario: Path, out: Path, *options: str | Path) -> Path:
    """The folder of a comparison that ended well."""
    done = compare(scenario, out, *options)
    assert done.returncode == 0, done.stderr
    return out


def rows(out: Path, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(out / f"{name}.parquet").to_pylist()
    return found


def digest(out: Path, name: str = "results") -> str:
    return hashlib.sha256((out / f"{name}.parquet").read_bytes()).hexdigest()
