"""A folder as `fedpace compare` leaves it, with made-up runs: for tests of what reads one."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

TARGET = 0.8
NAN = float("nan")


@dataclass(frozen=True)
class Shape:
    """How a made-up strategy does: where its accuracy ends, in how many seconds it rises, and how uneven its work is."""

    ceiling: float
    rise_seconds: float
    slow_gap: float = 0.05
    concurrency: int = 100
    skew: float = 0.5
    staleness: float = 0.0


SHAPES: Mapping[str, Shape] = {
    "FedAvg": Shape(0.84, 2600, slow_gap=0.12, skew=0.1),
    "FedBuff": Shape(0.85, 900, slow_gap=0.10, staleness=4, skew=1.0),
    "Paced": Shape(0.86, 420, slow_gap=0.04, staleness=3, skew=0.8),
}


@dataclass(frozen=True)
class Comparison:
    """What to make. A run in `broken` ends with that status; one in `late` never comes to the target."""

    apps: Sequence[str] = ("digits",)
    fleets: Sequence[str] = ("flash",)
    shapes: Mapping[str, Shape] = field(default_factory=lambda: SHAPES)
    untuned: Sequence[str] = ("Paced",)
    seeds: Sequence[int] = (100, 101, 102)
    limit: float = 6000.0
    devices: int = 120
    versions: int = 30
    trials: int = 4
    slow: bool = True
    broken: Mapping[tuple[str, int], tuple[str, str]] = field(default_factory=dict)
    late: Sequence[str] = ()


def write_comparison(directory: Path, made: Comparison) -> Path:
    """Writes the tables and the runs' details. Returns `directory`."""
    results: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    for app, fleet, name in product(made.apps, made.fleets, made.shapes):
        for tuned, seed in product((True, False) if name in made.untuned else (True,), made.seeds):
            rows, run = _run(made, app, fleet, name, tuned, seed)
            results += rows
            runs.append(run)
            folder = directory / "runs" / app / fleet / (name if tuned else f"{name}-untuned") / str(seed)
            folder.mkdir(parents=True, exist_ok=True)
            if run["status"] != "failed":
                np.savez_compressed(folder / "details.npz", **_details(made, made.shapes[name], seed))
    pq.write_table(pa.Table.from_pylist(results, RESULTS), directory / "results.parquet")
    pq.write_table(pa.Table.from_pylist(runs, RUNS), directory / "runs.parquet")
    pq.write_table(pa.Table.from_pylist(list(_trials(made)), TRIALS), directory / "trials.parquet")
    return directory


def _columns(**names: str) -> pa.Schema:
    kinds = {"text": pa.string(), "bool": pa.bool_(), "int": pa.int64(), "float": pa.float64()}
    return pa.schema([(name, kinds[kind]) for kind, found in names.items() for name in found.split()])


RUN = "app fleet strategy"
SEEDS = pa.field("seeds", pa.list_(pa.int64()))
RESULTS = _columns(
    text=RUN,
    bool="tuned",
    int="seed version bytes_up bytes_down folded",
    float="virtual_seconds device_seconds accuracy loss slow_accuracy",
)
RUNS = _columns(
    text=f"{RUN} settings status reason metric",
    bool="tuned",
    int="seed bytes_up bytes_down folded discarded lost given_up",
    float="virtual_seconds device_seconds final_accuracy final_slow_accuracy seconds_to_target "
    "device_seconds_to_target bytes_to_target target limit_seconds",
)
TRIALS = _columns(text=f"{RUN} settings", int="trial", float="value", bool="chosen").append(SEEDS)


def _run(
    made: Comparison, app: str, fleet: str, name: str, tuned: bool, seed: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    shape = made.shapes[name]
    draws = np.random.default_rng([seed, zlib.crc32(f"{app}/{fleet}/{name}/{tuned}".encode())])
    key = {"app": app, "fleet": fleet, "strategy": name, "tuned": tuned, "seed": seed}
    status, reason = made.broken.get((name, seed), ("completed", ""))
    limit = made.limit * {"completed": 1.0, "diverged": 0.4, "failed": 0.0}[status]
    ceiling = (0.7 if name in made.late else shape.ceiling) + draws.normal(0, 0.005)
    rise = shape.rise_seconds * (0.5 if fleet == "uniform" else 1.0) * (1.0 if tuned else 1.25) * draws.normal(1, 0.07)
    times = np.linspace(0, limit, made.versions + 1) if limit else np.zeros(0)
    accuracy = 0.1 + (ceiling - 0.1) * (1 - np.exp(-np.sqrt(times / rise) * 1.6)) + draws.normal(0, 0.006, times.size)
    rows: list[dict[str, Any]] = []
    for version, (seconds, value) in enumerate(zip(times, accuracy, strict=True)):
        folded = int(seconds * shape.concurrency / 40)
        rows.append(
            key
            | {
                "version": version,
                "virtual_seconds": float(seconds),
                "device_seconds": float(seconds * shape.concurrency * 0.6),
                "bytes_up": folded * 52_000,
                "bytes_down": folded * 60_000,
                "folded": folded,
                "accuracy": float(value),
                "loss": float(-np.log(max(value, 0.05))),
                "slow_accuracy": float(value - shape.slow_gap) if made.slow else NAN,
            }
        )
    hits = np.flatnonzero(accuracy >= TARGET)
    last = rows[-1] if rows else {}
    reached = rows[hits[0]] if hits.size and status == "completed" else None
    names = ("virtual_seconds", "device_seconds", "bytes_up", "bytes_down", "folded")
    settings = {"server_lr": 0.5 if tuned else 1.0, "k": 10}
    return rows, key | {column: last.get(column, 0) for column in names} | {
        "settings": json.dumps(settings),
        "status": status,
        "reason": reason,
        "discarded": last.get("folded", 0) // 20,
        "lost": last.get("folded", 0) // 9,
        "final_accuracy": last.get("accuracy", NAN),
        "final_slow_accuracy": last.get("slow_accuracy", NAN),
        "seconds_to_target": reached["virtual_seconds"] if reached else NAN,
        "device_seconds_to_target": reached["device_seconds"] if reached else NAN,
        "bytes_to_target": float(reached["bytes_up"] + reached["bytes_down"]) if reached else NAN,
        "given_up": last.get("folded", 0) // 30,
        "target": TARGET,
        "metric": "accuracy",
        "limit_seconds": made.limit,
    }


def _details(made: Comparison, shape: Shape, seed: int) -> dict[str, Any]:
    draws = np.random.default_rng(seed)
    speed = np.random.default_rng(7).lognormal(0, 1, made.devices)
    tasks = draws.poisson(12 * speed**shape.skew / np.mean(speed**shape.skew))
    folded = np.repeat(np.arange(made.devices), tasks)
    staleness = draws.poisson(shape.staleness / np.sqrt(speed[folded]))
    starts, ends, devices, outcomes = [], [], [], []
    for place, device in enumerate(np.argsort(-speed)[: min(100, made.devices)]):
        now = draws.exponential(100)
        while now < 0.1 * made.limit:
            end = now + 40 / speed[device] * draws.normal(1, 0.1)
            devices.append(place)
            starts.append(now)
            ends.append(end)
            outcomes.append(draws.choice(["replied", "failed", "expired"], p=[0.85, 0.05, 0.1]))
            now = end + draws.exponential(20)
    return {
        "tasks_per_device": tasks,
        "device_speed": speed,
        "staleness": staleness,
        "weights": (1.0 + staleness) ** -0.5,
        "weight_speed": speed[folded],
        "gantt_device": np.array(devices),
        "gantt_start": np.array(starts),
        "gantt_end": np.array(ends),
        "gantt_outcome": np.array(outcomes),
    }


def _trials(made: Comparison) -> list[dict[str, Any]]:
    rows = []
    for app, fleet, name in product(made.apps, made.fleets, made.shapes):
        draws = np.random.default_rng(zlib.crc32(f"{app}/{fleet}/{name}".encode()))
        values = draws.normal(0.75, 0.03, made.trials)
        for trial, value in enumerate(values):
            settings = {"server_lr": round(float(draws.uniform(0.05, 1)), 3), "k": int(draws.integers(4, 40))}
            key = {"app": app, "fleet": fleet, "strategy": name, "trial": trial, "settings": json.dumps(settings)}
            rows.append(key | {"value": float(value), "chosen": value == values.max(), "seeds": [0, 1]})
    return rows
