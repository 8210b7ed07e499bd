"""Results as parquet files: every evaluation, every run, every trial."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fedpace.hosting.files import write_atomically
from fedpace.simulations.comparison.runs import COLUMNS, Run, RunSpec
from fedpace.simulations.comparison.tuning import Trial

_TEXT, _WHOLE, _NUMBER, _FLAG = pa.string(), pa.int64(), pa.float64(), pa.bool_()
_KEY = [("app", _TEXT), ("fleet", _TEXT), ("strategy", _TEXT), ("tuned", _FLAG), ("seed", _WHOLE)]

RESULTS = pa.schema([*_KEY, *((name, _WHOLE if kind is int else _NUMBER) for name, kind in COLUMNS.items())])
RUNS = pa.schema(
    [
        *_KEY,
        *((name, _TEXT) for name in ("settings", "status", "reason")),
        ("virtual_seconds", _NUMBER),
        ("device_seconds", _NUMBER),
        *((name, _WHOLE) for name in ("bytes_up", "bytes_down", "folded", "discarded", "lost", "given_up")),
        *((name, _NUMBER) for name in ("final_accuracy", "final_slow_accuracy")),
        *((name, _NUMBER) for name in ("seconds_to_target", "device_seconds_to_target", "bytes_to_target")),
        ("target", _NUMBER),
        ("metric", _TEXT),
        ("limit_seconds", _NUMBER),
    ]
)
TRIALS = pa.schema(
    [
        *_KEY[:3],
        ("trial", _WHOLE),
        ("settings", _TEXT),
        ("value", _NUMBER),
        ("chosen", _FLAG),
        ("seeds", pa.list_(_WHOLE)),
    ]
)


def write_results(directory: Path, runs: Sequence[Run], trials: Sequence[Trial], seeds: Sequence[int]) -> None:
    """Writes `results.parquet`, `runs.parquet` and `trials.parquet`: the same bytes for the same runs."""
    runs = sorted(runs, key=lambda run: _key_of(run.spec))
    _write(directory / "results.parquet", RESULTS, [row for run in runs for row in _evaluations(run)])
    _write(directory / "runs.parquet", RUNS, [_row(run) for run in runs])
    ordered = sorted(trials, key=lambda trial: (trial.app, trial.fleet, trial.strategy, trial.trial))
    _write(directory / "trials.parquet", TRIALS, [_trial(trial, seeds) for trial in ordered])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of one of these files."""
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def _write(path: Path, schema: pa.Schema, rows: Sequence[dict[str, Any]]) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer)
    write_atomically(path, buffer.getvalue())


def _key_of(spec: RunSpec) -> tuple[str, str, str, bool, int]:
    return spec.app, spec.fleet, spec.strategy, spec.tuned, spec.seed


def _key(spec: RunSpec) -> dict[str, Any]:
    return dict(zip((name for name, _ in _KEY), _key_of(spec), strict=True))


def _evaluations(run: Run) -> list[dict[str, Any]]:
    """A row an evaluation, by version."""
    columns = run.outcome.evaluations
    return [{**_key(run.spec), **{name: columns[name][n] for name in COLUMNS}} for n in range(len(columns["version"]))]


def _row(run: Run) -> dict[str, Any]:
    spec, outcome = run.spec, run.outcome
    at = outcome.first_reaching(spec.metric, run.target)
    reached = dict.fromkeys(("seconds_to_target", "device_seconds_to_target", "bytes_to_target"), math.nan)
    if at is not None:
        columns = outcome.evaluations
        reached = {
            "seconds_to_target": columns["virtual_seconds"][at],
            "device_seconds_to_target": columns["device_seconds"][at],
            "bytes_to_target": float(columns["bytes_up"][at] + columns["bytes_down"][at]),
        }
    return {
        **_key(spec),
        "settings": json.dumps(spec.settings, sort_keys=True),
        "final_accuracy": outcome.final("accuracy"),
        "final_slow_accuracy": outcome.final("slow_accuracy"),
        **reached,
        "target": run.target,
        "metric": spec.metric,
        "limit_seconds": spec.virtual_seconds,
        **{
            name: getattr(outcome, name)
            for name in ("status", "reason", "virtual_seconds", "device_seconds", "bytes_up", "bytes_down")
        },
        **{name: getattr(outcome, name) for name in ("folded", "discarded", "lost", "given_up")},
    }


def _trial(trial: Trial, seeds: Sequence[int]) -> dict[str, Any]:
    settings = json.dumps(trial.settings, sort_keys=True)
    plain = {name: getattr(trial, name) for name in ("app", "fleet", "strategy", "trial", "value", "chosen")}
    return {**plain, "settings": settings, "seeds": list(seeds)}
