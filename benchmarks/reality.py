"""What the simulator predicts of eight devices that are really there, and what then comes true.

Eight device processes of four speeds, over mTLS, learn digits by FedAvg, FedBuff and Paced, one after the other. A short
run comes first, to be measured: the fleet that `fedpace simulate` is given is what was seen of each device in it. It
predicts how long each strategy takes to an accuracy, and to a number of updates. The app is apps/reality: its
devices compute little and wait for the rest, as boards of their own would, since eight that compute share few cores.

An error is how far the ratio of a strategy's time to FedAvg's is from the predicted ratio, as a share of the latter.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import options, publish
from fedpace.errors import RunError
from fedpace.localfleet import LocalFleet

APP = Path(__file__).resolve().parent / "apps" / "reality"
SLOWDOWNS = (1, 1, 2, 2, 4, 4, 8, 8)
STEP_SECONDS = 0.025
"""How long a local step takes on the fastest boards, beside its arithmetic; a task is ten."""


@dataclass(frozen=True)
class Strategy:
    """How many versions a run makes, each of how many updates, and the preset's settings."""

    versions: int
    updates: int
    settings: Mapping[str, int] = field(default_factory=dict)


Run = tuple[str, int, Mapping[str, int]]
"""Strategy, versions, settings."""

BASELINE = "FedAvg"
STRATEGIES = {
    BASELINE: Strategy(10, updates=8),
    "FedBuff": Strategy(40, updates=4, settings={"k": 4}),
    "Paced": Strategy(32, updates=4, settings={"k": 4}),
}
TARGET = 0.6
UPDATES = 80
SMOOTHED = 24
"""Updates behind the tests whose mean is taken for the accuracy at the last of them."""
MEASURED: Run = ("FedBuff", 30, {"k": 4, "seed": 1000})
"""The run that devices are measured in: all are at work all the time, the slowest ones on four tasks."""

RUN_SECONDS = 1200.0
SEEDS = (0, 1, 2, 3, 4)
QUICK_SEEDS = (0, 1)
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Task:
    """Of one task: which device had it, when it was sent and its reply was there, how long the device computed, seconds."""

    device: int
    sent: float
    replied: float
    compute_seconds: float
    steps: int


@dataclass(frozen=True)
class Curve:
    """Seconds since the run began, and accuracy, of each version; versions are of `updates` updates."""

    seconds: Sequence[float]
    accuracy: Sequence[float]
    updates: int

    def folds(self, updates: int) -> float:
        """When so many updates were folded."""
        return self.seconds[updates // self.updates]

    def reaches(self, accuracy: float) -> float:
        """When the mean of the last tests is first as high, between two tests on a straight line; infinite if never."""
        last = SMOOTHED // self.updates
        smooth = [statistics.fmean(self.accuracy[max(0, n - last) : n]) for n in range(1, len(self.accuracy) + 1)]
        points = list(zip(self.seconds, smooth, strict=True))
        for (before, low), (after, high) in pairwise(points):
            if high >= accuracy:
                return before + (after - before) * (accuracy - low) / (high - low)
        return math.inf


# ---------------------------------------------------------------- the fleet, measured


def read_tasks(recording: Path, since: float, until: float) -> list[Task]:
    """The tasks of a recording (`fedpace server --record`) that were sent and replied to between two times."""
    devices: dict[int, int] = {}
    sent: dict[int, float] = {}
    found = []
    for row in map(json.loads, (recording / "rows.jsonl").read_text().splitlines()):
        if row.get("what") == "joined":
            devices[row["node_id"]] = int(row["name"].removeprefix("device-"))
        elif row.get("look") == "push":
            sent.update({task: row["at"] for task, *_ in row["tasks"]})
        elif row.get("what") == "replied" and since <= sent[row["task"]] and row["at"] <= until:
            steps = row["metrics"]["local-steps"]
            found.append(Task(devices[row["node_id"]], sent[row["task"]], row["at"], row["compute_seconds"], steps))
    return found


def measured_fleet(tasks: Iterable[Task]) -> tuple[list[float], dict[str, float]]:
    """Mean seconds a local step of each device, in order; and of all together `jitter`, the standard deviation of
    ln(seconds) from task to task, and `latency_ms`, half of what a task took beyond computing (mean)."""
    by_device: dict[int, list[float]] = defaultdict(list)
    beyond = []
    for task in tasks:
        by_device[task.device].append(task.compute_seconds / task.steps)
        beyond.append(task.replied - task.sent - task.compute_seconds)
    means = {device: statistics.fmean(times) for device, times in sorted(by_device.items())}
    logs = [math.log(time / means[device]) for device, times in by_device.items() for time in times]
    every = {"jitter": statistics.pstdev(logs), "latency_ms": 1000 * max(0.0, statistics.fmean(beyond)) / 2}
    return list(means.values()), every


FLEET = """description = "Eight boards, as measured"

[compute]
model = "file"
file = "seconds.json"
jitter = {jitter:.6f}

[network]
down_mbit = 10000
up_mbit = 10000
latency_ms = {latency_ms:.6f}
"""


def write_fleet(folder: Path, seconds: Sequence[float], every: Mapping[str, float]) -> Path:
    (folder / "seconds.json").write_text(json.dumps(list(seconds)))
    path = folder / "boards.toml"
    path.write_text(FLEET.format(**every))
    return path


# ---------------------------------------------------------------- runs


def plan(seeds: Iterable[int]) -> list[Run]:
    return [
        (name, each.versions, {**each.settings, "seed": seed}) for seed in seeds for name, each in STRATEGIES.items()
    ]


def write_config(folder: Path, runs: Sequence[Run]) -> Path:
    path = folder / "config.toml"
    path.write_text(f"runs = '{json.dumps(runs)}'\n")
    return path


def on_devices(folder: Path, runs: Sequence[Run]) -> tuple[list[dict[str, Any]], Path]:
    """The tests of runs by a server and device processes, and the recording of what the devices did."""
    recording = folder / "recording"
    config = write_config(folder, runs)
    with LocalFleet(folder / "fleet", APP, environment=ENVIRONMENT) as fleet:
        options = ("--min-nodes", str(len(SLOWDOWNS)), "--run-config", str(config), "--seed", "0")
        fleet.start_server(*options, "--record", str(recording))
        for index, slowdown in enumerate(SLOWDOWNS):
            node = f"partition-id={index} step-seconds={STEP_SECONDS}"
            fleet.start_device(f"device-{index}", "--slowdown", str(slowdown), node_config=node)
        if code := fleet.wait(RUN_SECONDS):
            raise RunError(f"exit code {code}:\n{fleet.log('server')[-4000:]}")
    return read_tests(fleet.out), recording


def simulated(folder: Path, runs: Sequence[Run], fleet: Path) -> list[dict[str, Any]]:
    """The tests of runs that `fedpace simulate` makes."""
    out = folder / "simulated"
    command = [sys.executable, "-m", "fedpace", "simulate", "--app", str(APP), "--devices", str(len(SLOWDOWNS))]
    command += ["--fleet", str(fleet), "--executor", "fused", "--seed", "0", "--out", str(out)]
    command += ["--run-config", str(write_config(folder, runs))]
    environment = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    if done.returncode:
        raise RunError(f"exit code {done.returncode}:\n{done.stderr[-4000:]}")
    return read_tests(out)


def read_tests(out: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["metrics"] for line in lines if "run" in line["metrics"]]


def seconds_of(
    tests: Iterable[Mapping[str, Any]], runs: Sequence[Run], first: int = 0
) -> dict[str, dict[str, list[float]]]:
    """What each strategy took, a number a seed: "target", seconds to the accuracy; "updates", to so many updates.

    `first`: the number of the first of these runs. Raises RunError for one that did not get there.
    """
    points: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for test in tests:
        points[test["run"]].append((test["at"], test["accuracy"]))
    found: dict[str, dict[str, list[float]]] = {name: {"target": [], "updates": []} for name in STRATEGIES}
    for number, (name, versions, settings) in enumerate(runs, first):
        at, accuracy = zip(*points[number], strict=True)
        curve = Curve([each - at[0] for each in at], accuracy, STRATEGIES[name].updates)
        if (seconds := curve.reaches(TARGET)) == math.inf:
            raise RunError(f"{name}, {settings}: not at {TARGET} after {versions} versions, but at {accuracy[-1]}")
        found[name]["target"].append(seconds)
        found[name]["updates"].append(curve.folds(UPDATES))
    return found


# ---------------------------------------------------------------- what it says


Seconds = Mapping[str, Mapping[str, Sequence[float]]]


def figures_of(real: Seconds, predicted: Seconds) -> dict[str, float]:
    """Medians over seeds, ratios to FedAvg of those, the largest error of a ratio, and whether the same are faster."""
    figures: dict[str, float] = {}
    errors = []
    for kind in ("target", "updates"):
        took = {
            side: {name: statistics.median(times[kind]) for name, times in seconds.items()}
            for side, seconds in (("real", real), ("predicted", predicted))
        }
        for name in real:
            label = f"{name.lower()}_seconds_to_{kind}"
            figures |= {f"{side}_{label}": took[side][name] for side in took}
            if name != BASELINE:
                ratios = {side: took[side][name] / took[side][BASELINE] for side in took}
                figures |= {f"{side}_{name.lower()}_ratio_to_{kind}": ratio for side, ratio in ratios.items()}
                errors.append(abs(ratios["real"] / ratios["predicted"] - 1.0))
        if kind == "target":
            ranked = {side: sorted(took[side], key=took[side].__getitem__) for side in took}
            figures["ranking_agrees"] = float(ranked["real"] == ranked["predicted"])
    figures["ratio_error_max"] = max(errors)
    return figures


def rows_of(figures: Mapping[str, float]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("until", "strategy", "real, s", "predicted", "ratio", "predicted", "error")]
    for kind, until in (("target", f"accuracy {TARGET}"), ("updates", f"{UPDATES} updates")):
        for name in STRATEGIES:
            times = [f"{figures[f'{side}_{name.lower()}_seconds_to_{kind}']:.2f}" for side in ("real", "predicted")]
            if name == BASELINE:
                rows.append((until, name, *times, "", "", ""))
                continue
            told, said = (figures[f"{side}_{name.lower()}_ratio_to_{kind}"] for side in ("real", "predicted"))
            rows.append((until, name, *times, f"{told:.3f}", f"{said:.3f}", f"{100 * (told / said - 1):+.1f} %"))
    return rows


def main() -> None:
    arguments = options(str(__doc__).splitlines()[0])
    runs = plan(QUICK_SEEDS if arguments.quick else SEEDS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tests, recording = on_devices(folder, [MEASURED, *runs])
        real = seconds_of(tests, runs, first=1)
        measured = [test["at"] for test in tests if test["run"] == 0]
        seconds, every = measured_fleet(read_tasks(recording, measured[0], measured[-1]))
        if len(seconds) < len(SLOWDOWNS):
            raise RunError(
                f"only {len(seconds)} devices ended a task while they were measured: is the machine too busy?"
            )
        predicted_runs = plan(SEEDS)
        predicted = seconds_of(simulated(folder, predicted_runs, write_fleet(folder, seconds, every)), predicted_runs)
    figures = figures_of(real, predicted)
    settings = {
        "seeds": len(real[BASELINE]["target"]),
        "predicted_seeds": len(SEEDS),
        "devices": len(SLOWDOWNS),
        "slowdowns": SLOWDOWNS,
        "target": TARGET,
        "updates": UPDATES,
        "ms_a_step": [round(1000 * each, 1) for each in seconds],
        **{name: round(value, 4) for name, value in every.items()},
    }
    publish("Predicted and real", rows_of(figures), figures, settings, arguments.json)


if __name__ == "__main__":
    main()
