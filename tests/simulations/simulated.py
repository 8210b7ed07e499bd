"""`fedpace simulate` as a process, and what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

APPS = Path(__file__).with_name("apps")
DECLARED = APPS / "declared"
SECONDS = 100

UNEVEN = """
[compute]
model = "lognormal"
sigma = 1.0
jitter = 0.2
[faults]
dropout = 0.1
failure = 0.05
notice_seconds = 1.0
"""


def command(app: Path, out: Path, *options: str | Path) -> list[str]:
    return [sys.executable, "-m", "fedpace", "simulate", "--app", str(app), "--out", str(out), *map(str, options)]


def environment(home: Path) -> dict[str, str]:
    return {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", str(home)), "COLUMNS": "200"}


def simulate(app: Path, out: Path, *options: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(app, out, *options),
        env=environment(out),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


@dataclass(frozen=True)
class Left:
    """What a run left in its folder."""

    out: Path

    @property
    def result(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / "result.json").read_text())
        return found

    @property
    def trace(self) -> dict[str, NDArray[Any]]:
        """As docs say: without pickle."""
        with np.load(self.out / "trace.npz") as columns:
            return {name: columns[name] for name in columns.files}

    @property
    def bits(self) -> tuple[str, str, str]:
        result = self.result
        return result["model_sha256"], result["trace_sha256"], (self.out / "decisions.jsonl").read_text()


def finished(app: Path, out: Path, *options: str | Path) -> Left:
    done = simulate(app, out, *options)
    assert done.returncode == 0, done.stderr
    return Left(out)
