"""What the benchmarks have in common: their command line, their table and their JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table


def options(description: str, *, resumes: bool = False) -> argparse.Namespace:
    """`quick` (bool) and `json` (Path or None) from the command line; of a benchmark that `resumes` also `out` (likewise).

    From here on SIGTERM ends the program as Ctrl-C does, so that what a benchmark started is stopped with it.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions: within 3 minutes on 2 cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    if resumes:
        parser.add_argument("--out", type=Path, metavar="DIR", help="keep all runs there, and go on from those")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    return parser.parse_args()


def publish(
    title: str,
    rows: Sequence[Sequence[str]],
    figures: Mapping[str, float],
    settings: Mapping[str, object],
    path: Path | None,
) -> None:
    """Print `rows` (the first is the header) as a table, and write figures and settings to `path` when there is one."""
    table = Table(*rows[0], title=title, caption=", ".join(f"{name} {value}" for name, value in settings.items()))
    for row in rows[1:]:
        table.add_row(*row)
    Console().print(table)
    if path is not None:
        surroundings = {
            "python": platform.python_version(),
            "grpcio": version("grpcio"),
            "flwr": version("flwr"),
            "cores": os.cpu_count(),
        }
        content = {"figures": dict(figures), "settings": {**settings, **surroundings}}
        path.write_text(json.dumps(content, indent=2) + "\n")
