"""Slow devices know what fast ones do not: what strategies learn of it, and how soon.

The app is examples/compared/slow-devices: a third of the devices, twelve times slower, is alone in seeing four of
Fashion-MNIST's ten classes. Synchronous FedAvg waits for everybody, and learns those classes as well as it can; T is a
time in which it has flattened. Strategies that follow speed fold several times as many updates meanwhile, most of them
from devices that have never seen those four.

A gap is FedAvg's accuracy on these classes at T, less another strategy's at a third of T: at 0 or less, that one has
learned in a third of the time what waiting for everybody teaches. Accuracies are means over the tenth of the time before.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is loaded: a run a core, each on one thread

import torch

from benchmarks.report import options, publish
from fedpace.clients.training import declared_training
from fedpace.errors import ConfigError, RunError
from fedpace.hosting.app import load_app_folder
from fedpace.hosting.config import Config
from fedpace.hosting.flower import load_client_app
from fedpace.hosting.outputs import Outputs
from fedpace.hosting.seeds import derive_seed
from fedpace.simulations.fleets import load_fleet
from fedpace.simulations.run import SimulationOptions, make_grid, prepare, run_app

ROOT = Path(__file__).resolve().parents[1]
APP = ROOT / "examples" / "compared" / "slow-devices"
FLEET = APP / "fleet.toml"
SYNC, OURS, BUFFERED = "FedAvg", "Paced", "FedBuff"

STRATEGIES: Mapping[str, Mapping[str, Any]] = {
    SYNC: {"config": {"lr": 0.3}},
    "FedAsync": {"config": {"lr": 0.3}},
    "CA2FL": {"config": {"lr": 0.1}, "k": 30},
    BUFFERED: {"config": {"lr": 0.3}},
    OURS: {"config": {"lr": 0.3}, "k": 10},
}
"""Settings of each, the best of those tried on seed 1, which is not among the results'."""

TESTS = 100
"""How often a run is tested, at even distances."""
ENDLESS = 10**9


@dataclass(frozen=True)
class Scale:
    """`at_work`: devices a round, or at a time. `until`: T, in virtual seconds."""

    devices: int
    at_work: int
    until: float
    seeds: tuple[int, ...]


QUICK = Scale(150, 30, 3000.0, (101, 102, 103))
FULL = Scale(500, 100, 6000.0, (101, 102, 103, 104, 105))


@dataclass(frozen=True)
class Curve:
    """Of one run: virtual seconds, and the accuracies then, on all classes and on the slow devices'."""

    seconds: Sequence[float]
    accuracy: Sequence[float]
    slow: Sequence[float]

    def at(self, seconds: float, values: Sequence[float]) -> float:
        """The mean of `values` over the tenth of the time before."""
        found = [value for at, value in zip(self.seconds, values, strict=True) if 0.9 * seconds < at <= seconds]
        return statistics.fmean(found) if found else math.nan

    def reaches(self, slow: float) -> float:
        """When its accuracy on the slow devices' classes is first as high; infinite if never."""
        return next((at for at in self.seconds if self.at(at, self.slow) >= slow), math.inf)


def run(job: tuple[str, Scale, int]) -> Curve:
    """One strategy's run to T, in this process. RunError where it fails."""
    strategy, scale, seed = job
    torch.set_num_threads(1)
    config: Config = {
        "strategy": strategy,
        "settings": json.dumps(STRATEGIES[strategy]),
        "num-rounds": ENDLESS,
        "train-nodes": scale.at_work,
        "evaluate-seconds": scale.until / TESTS,
    }
    with tempfile.TemporaryDirectory() as folder:
        told = SimulationOptions(
            app=load_app_folder(APP),
            devices=scale.devices,
            fleet=str(FLEET),
            executor="fused",
            workers=1,
            device="cpu",
            steps=1.0,
            overrides=config,
            seed=seed,
            initial_model=None,
            out=Path(folder),
        )
        fleet = load_fleet(told.fleet, told.devices, derive_seed(seed, "fleet"))
        prepared, outputs = prepare(told), Outputs(told.out, only_last=True)
        grid = make_grid(told, prepared, fleet, outputs, until=scale.until)
        ending = run_app(told, prepared, grid, outputs)
        if ending.status == "failed" or grid.seconds < scale.until:
            raise RunError(f"{strategy}, seed {seed}: {ending.reason or ending.status} after {grid.seconds:.0f} s")
        lines = map(json.loads, (told.out / "metrics.jsonl").read_text().splitlines())
        found = [(line["seconds"], line["metrics"]) for line in lines if line["source"] == "server"]
    return Curve(
        [seconds for seconds, _ in found],
        [metrics["accuracy"] for _, metrics in found],
        [metrics["slow_accuracy"] for _, metrics in found],
    )


def run_all(scale: Scale) -> dict[str, list[Curve]]:
    """The curves of each strategy, one a seed. Every run has a process of its own."""
    jobs = [(strategy, scale, seed) for strategy in STRATEGIES for seed in scale.seeds]
    with multiprocessing.get_context("fork").Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        curves = []
        for (strategy, _, seed), curve in zip(jobs, pool.imap(run, jobs), strict=True):
            print(f"{strategy}, seed {seed}: done", file=sys.stderr)
            curves.append(curve)
    count = len(scale.seeds)
    return {strategy: curves[n * count : (n + 1) * count] for n, strategy in enumerate(STRATEGIES)}


def figures_of(curves: Mapping[str, Sequence[Curve]], until: float) -> dict[str, float]:
    """Accuracies are shares, gaps points of a hundred."""
    sync = [curve.at(until, curve.slow) for curve in curves[SYNC]]

    def gap(strategy: str) -> float:
        early = [curve.at(until / 3, curve.slow) for curve in curves[strategy]]
        return 100 * statistics.fmean(one - other for one, other in zip(sync, early, strict=True))

    figures = {"slow_class_gap_points": gap(OURS), "fedbuff_slow_class_gap_points": gap(BUFFERED)}
    logs = []
    for goal, one, other in zip(sync, curves[SYNC], curves[OURS], strict=True):
        logs.append(math.log(one.reaches(goal) / min(other.reaches(goal), until)))
    figures["speedup_vs_sync"] = math.exp(statistics.fmean(logs))
    before = [curve.at(until * 2 / 3, curve.slow) for curve in curves[SYNC]]
    figures["sync_gain_in_last_third_points"] = 100 * (statistics.fmean(sync) - statistics.fmean(before))
    for name, its in curves.items():
        for label, seconds in (("third", until / 3), ("end", until)):
            figures[f"{name.lower()}_slow_accuracy_{label}"] = statistics.fmean(c.at(seconds, c.slow) for c in its)
            figures[f"{name.lower()}_accuracy_{label}"] = statistics.fmean(c.at(seconds, c.accuracy) for c in its)
    return figures


def rows_of(curves: Mapping[str, Sequence[Curve]], until: float) -> list[tuple[str, ...]]:
    """Percent, mean and standard deviation over seeds."""

    def told(values: Sequence[float]) -> str:
        spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{100 * statistics.fmean(values):.1f}{spread}"

    header = ("strategy", "slow classes at T/3", "slow classes at T", "all at T/3", "all at T", "reaches FedAvg's")
    rows: list[tuple[str, ...]] = [header]
    goals = [curve.at(until, curve.slow) for curve in curves[SYNC]]
    for name, its in curves.items():
        when = [curve.reaches(goal) for goal, curve in zip(goals, its, strict=True)]
        arrived = [seconds for seconds in when if seconds < math.inf]
        reached = f"{statistics.fmean(arrived):,.0f} s" if arrived else "never"
        if 0 < len(arrived) < len(its):
            reached += f" ({len(arrived)} of {len(its)})"
        slow = [told([curve.at(at, curve.slow) for curve in its]) for at in (until / 3, until)]
        accuracy = [told([curve.at(at, curve.accuracy) for curve in its]) for at in (until / 3, until)]
        rows.append((name, *slow, *accuracy, reached))
    return rows


def load_app() -> None:
    """Loads the app and its data, which the processes of runs then share; fetches Fashion-MNIST where it is not there."""
    training = declared_training(load_client_app(load_app_folder(APP)))
    assert training is not None
    try:
        len(training.federation.partitions)
    except ConfigError as error:
        print(f"{error}\nFetching it: make data", file=sys.stderr)
        if subprocess.run(["make", "-C", str(ROOT), "data"], check=False, stdout=sys.stderr).returncode:
            sys.exit("slow_devices: Fashion-MNIST could not be fetched")
        len(training.federation.partitions)


def main() -> None:
    arguments = options(str(__doc__).splitlines()[0])
    scale = QUICK if arguments.quick else FULL
    load_app()
    curves = run_all(scale)
    settings = {"devices": scale.devices, "at_work": scale.at_work, "T_seconds": scale.until, "seeds": scale.seeds}
    title = "Slow devices know what fast ones do not: accuracy, %"
    publish(title, rows_of(curves, scale.until), figures_of(curves, scale.until), settings, arguments.json)


if __name__ == "__main__":
    main()
