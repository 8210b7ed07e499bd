"""Bytes until the model is as good as it gets with dense updates: codecs with and without error feedback, and downlink.

Eight devices that hold different digits learn them together, in simulation and as processes. The target, and each side's
learning rate, come from tuning seeds that no result is taken from (bytes_tuned.json): without --quick they are sought
anew, among the same rates for all. A run that never arrives counts with all its bytes, and is marked with a *; one that
ends because its model diverges counts as one that goes on to the last round with an accuracy of 0.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import options, publish
from fedpace.errors import RunError
from fedpace.hosting.app import load_app_folder
from fedpace.localfleet import LocalFleet
from fedpace.simulations.executors.fused import FusedExecutor  # noqa: F401 - imported before processes are forked
from fedpace.simulations.run import SimulationOptions, simulate

APP = Path(__file__).resolve().parent / "apps" / "bytes"
TUNED = Path(__file__).resolve().parent / "bytes_tuned.json"
DEVICES = 8
ROUNDS = 100
RUN_SECONDS = 900.0
SEEDS = (0, 1, 2, 3, 4)
TUNING_SEEDS = (100, 101)
RATES = (0.2, 0.4, 0.8, 1.6)
AT_TARGET = 0.98
DIVERGED = "finite"
"""What is said of updates, of what devices are to compress and of versions, until the run gives up: NaN or infinite, not
finite, to be finite."""
LAST = 5
"""Versions at the end of a run whose mean accuracy is its final one."""

BEST = "topk(0.01) >> quantise(4)"
CODECS = (BEST, "topk(0.01)", "randomk(0.02) >> quantise(8)", "quantise(4)", "quantise(1)", "sign", "lowrank(1)")
CHEAPER = "quantise(4)"
"""The codec of the server's steps."""


@dataclass(frozen=True)
class Side:
    """A way to send updates: a codec ("" for dense) with its feedback, and the codec of the server's steps."""

    codec: str = ""
    feedback: str = "ef"
    downlink: str = ""

    @property
    def name(self) -> str:
        up = "dense" if not self.codec else self.codec if self.feedback != "none" else f"{self.codec}, no feedback"
        return f"{up}; down {self.downlink}" if self.downlink else up

    def settings(self, rate: float) -> dict[str, Any]:
        """Of the app."""
        texts = {"codec": self.codec, "feedback": self.feedback, "downlink": self.downlink}
        return {**texts, "learning-rate": rate, "rounds": ROUNDS}


@dataclass(frozen=True)
class Run:
    """`accuracy` after each round, and all the bytes that went up and down."""

    accuracy: list[float]
    bytes_up: float
    bytes_down: float

    @property
    def final(self) -> float:
        return float(np.mean(self.accuracy[-LAST:]))

    def rounds_to(self, target: float) -> tuple[int, bool]:
        """Rounds until the accuracy is the target's; all of them, and False, where it never is."""
        found = [number for number, accuracy in enumerate(self.accuracy, 1) if accuracy >= target]
        return (found[0], True) if found else (len(self.accuracy), False)

    def bytes_to(self, target: float, *, down: bool = False) -> float:
        """Every device takes part in every round, so rounds cost the same to within the first one's whole model."""
        whole = self.bytes_down if down else self.bytes_up
        return whole * self.rounds_to(target)[0] / len(self.accuracy)


def environment(seed: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": "1", "FEDPACE_BENCHMARK_SEED": str(seed)}


def simulated(side: Side, rate: float, seed: int) -> Run:
    """In a process of its own, forked from this one once it has imported what all of them need."""
    os.environ.update(environment(seed))
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        options = SimulationOptions(
            app=load_app_folder(APP),
            devices=DEVICES,
            fleet="uniform",
            executor="inline" if side.downlink else "fused",
            workers=1,
            device="cpu",
            steps=10.0,
            overrides=side.settings(rate),
            seed=seed,
            initial_model=None,
            out=Path(folder) / "out",
        )
        code, said = simulate(options), Path(log.name).read_text()
        if code and DIVERGED not in said:
            raise RunError(f"{side.name}, rate {rate}, seed {seed}: exit code {code}\n{said[-2000:]}")
        return read_run(options.out)


def on_devices(side: Side, rate: float, seed: int) -> Run:
    """The same, by a server and eight device processes over mTLS."""
    with tempfile.TemporaryDirectory() as folder:
        with LocalFleet(Path(folder), APP, environment=environment(seed)) as fleet:
            settings = side.settings(rate).items()
            told = " ".join(
                f'{key}="{value}"' if isinstance(value, str) else f"{key}={value}" for key, value in settings
            )
            fleet.start_server("--min-nodes", str(DEVICES), "--run-config", told, "--seed", str(seed))
            for index in range(DEVICES):
                config = f"partition-id={index} num-partitions={DEVICES}"
                fleet.start_device(f"device-{index}", node_config=config)
            if code := fleet.wait(RUN_SECONDS):
                raise RunError(f"exit code {code}:\n{fleet.log('server')[-4000:]}")
        return read_run(fleet.out)


def read_run(out: Path) -> Run:
    result = json.loads((out / "result.json").read_text())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = {line["round"]: line["metrics"]["accuracy"] for line in lines if "accuracy" in line["metrics"]}
    more = ROUNDS / max([1, *found])
    accuracy = [found.get(number, 0.0) for number in range(1, ROUNDS + 1)]
    return Run(accuracy, result["bytes_up"] * more, result["bytes_down"] * more)


def simulate_all(jobs: Iterable[tuple[Side, float, int]]) -> dict[tuple[Side, float, int], Run]:
    jobs = list(dict.fromkeys(jobs))
    with multiprocessing.get_context("fork").Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        return dict(zip(jobs, pool.starmap(simulated, jobs, chunksize=1), strict=True))


def tune(sides: Iterable[Side]) -> dict[str, Any]:
    """For every side the rate of the best mean final accuracy on the tuning seeds; and dense's, for the target."""
    sides = list(sides)
    runs = simulate_all((side, rate, seed) for side in sides for rate in RATES for seed in TUNING_SEEDS)
    tried = {
        side.name: {rate: float(np.mean([runs[side, rate, seed].final for seed in TUNING_SEEDS])) for rate in RATES}
        for side in sides
    }
    rates = {name: max(finals, key=finals.__getitem__) for name, finals in tried.items()}
    return {"target": AT_TARGET * max(tried["dense"].values()), "rates": rates, "tried": tried}


def ratio(top: list[float], bottom: list[float]) -> float:
    """The geometric mean over seeds."""
    return float(np.exp(np.mean(np.log(np.array(top) / np.array(bottom)))))


def main() -> None:
    arguments = options(__doc__.splitlines()[0])
    dense, best = Side(), Side(BEST)
    bare, down = Side(BEST, "none"), Side(BEST, downlink=CHEAPER)
    sides = [dense, best, bare]
    if not arguments.quick:
        sides += [Side(codec, feedback) for codec in CODECS for feedback in ("ef", "none")]
        sides += [Side(BEST, "ef21"), down]
        sides = list(dict.fromkeys(sides))
        TUNED.write_text(json.dumps(tune(sides), indent=2) + "\n")
    tuned = json.loads(TUNED.read_text())
    target, rates = tuned["target"], tuned["rates"]

    runs = simulate_all((side, rates[side.name], seed) for side in sides for seed in SEEDS)
    by_side = {side: [runs[side, rates[side.name], seed] for seed in SEEDS] for side in sides}
    real = {side: on_devices(side, rates[side.name], SEEDS[0]) for side in (dense, down)}

    def up(side: Side) -> list[float]:
        return [run.bytes_to(target) for run in by_side[side]]

    def final(side: Side) -> float:
        return float(np.mean([run.final for run in by_side[side]]))

    figures = {
        "bytes_ratio": ratio(up(dense), up(best)),
        "accuracy_gap_points": 100 * (final(dense) - final(best)),
        "without_feedback_ratio": ratio(up(bare), up(best)),
        "without_feedback_gap_points": 100 * (final(dense) - final(bare)),
        "bytes_ratio_real": real[dense].bytes_to(target) / real[down].bytes_to(target),
        "accuracy_gap_points_real": 100 * (real[dense].final - real[down].final),
        "downlink_ratio": real[dense].bytes_to(target, down=True) / real[down].bytes_to(target, down=True),
        "target": target,
    }
    rows: list[tuple[str, ...]] = [
        ("updates", "where", "kB up an update", "rounds to target", "MB up to target", "times fewer", "final")
    ]
    rows += [row(side, "simulated", found, target, up(dense)) for side, found in by_side.items()]
    rows += [row(side, "8 processes", [run], target, [real[dense].bytes_to(target)]) for side, run in real.items()]
    settings = {"devices": DEVICES, "rounds": ROUNDS, "seeds": len(SEEDS), "target": round(target, 4)}
    publish("Bytes to accuracy", rows, figures, settings, arguments.json)


def row(side: Side, where: str, runs: list[Run], target: float, dense: list[float]) -> tuple[str, ...]:
    to_target = [run.rounds_to(target) for run in runs]
    mark = "" if all(arrived for _, arrived in to_target) else "*"
    taken = [run.bytes_to(target) for run in runs]
    return (
        side.name,
        where,
        f"{np.mean([run.bytes_up for run in runs]) / ROUNDS / DEVICES / 1e3:,.3g}",
        f"{np.mean([rounds for rounds, _ in to_target]):.0f}{mark}",
        f"{np.mean(taken) / 1e6:,.3g}{mark}",
        f"{ratio(dense, taken):,.3g}{mark}",
        f"{np.mean([run.final for run in runs]):.4f}",
    )


if __name__ == "__main__":
    main()
