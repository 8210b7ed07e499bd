"""What the update of a device costs in simulation: ours, Flower's own, pfl, FedJAX, a plain loop, and no federation.

Work M: 1,000 devices with 32 images of 8x8 digits each, an MLP 64-64-10; 100 devices a round, one epoch, batches of 16,
SGD, FedAvg. Work C: the same with 28x28 digits and a CNN of 106 k parameters. Ratios are of CPU time, all processes of
a side together, since that is what is left when more cores are there; updates a second are told beside.

Every engine starts from the same weights, and must have lowered the loss on the same test images, or it is missing.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.launch import Measured, measure
from benchmarks.peers import build
from benchmarks.report import options, publish
from benchmarks.sides import Results, Side, known, write_work
from fedpace.errors import RunError

DEVICES = 1000
PEERS = ("pfl", "fedjax", "blazefl")
"""Simulators beside Flower; the best is the one that takes the least CPU time."""


def ours_fused(work: Path, rounds: int) -> Measured:
    """End to end: `fedpace simulate`, our FedAvg, decision log and trace on."""
    return measure("fedpace_simulate", work, "--executor", "fused", "--rounds", rounds, "--warm-up", 20)


def ours_executor(work: Path, rounds: int) -> Measured:
    """The fused executor, nothing around it."""
    return measure("fedpace_executor", work, "--rounds", rounds, "--warm-up", 20)


def ours_stock(work: Path, rounds: int) -> Measured:
    """End to end, with Flower's FedAvg on the fused executor."""
    strategy = ("--executor", "fused", "--strategy", "flwr:FedAvg")
    return measure("fedpace_simulate", work, *strategy, "--rounds", rounds, "--warm-up", 5)


def ours_pool(work: Path, rounds: int) -> Measured:
    """End to end, with our FedAvg and the ClientApp that Flower is measured with, on all cores."""
    return measure(
        "fedpace_simulate", work, "--executor", "pool", "--workers", os.cpu_count(), "--rounds", rounds, "--warm-up", 2
    )


def flower(work: Path, rounds: int) -> Measured:
    return measure("flower_ray", work, "--rounds", rounds)


def peer(name: str, module: str, work: Path, rounds: int) -> Measured:
    return measure(module, work, "--rounds", rounds, python=build(name))


def blazefl(work: Path, rounds: int) -> Measured:
    build("blazefl")
    raise RunError("blazefl is installed, but there is no engine for it here: none has been tried")


def loop(work: Path, rounds: int) -> Measured:
    return measure("torch_loop", work, "--rounds", rounds)


def central(work: Path, rounds: int, batch_size: int = 16) -> Measured:
    return measure("torch_central", work, "--rounds", rounds, "--batch-size", batch_size)


def sides(work: str, scale: float) -> dict[str, Side]:
    """The sides on one of the works, each with rounds enough to take a few seconds, times `scale`."""

    def of(side: object, rounds_m: int, rounds_c: int) -> Side:
        assert callable(side)
        rounds = max(3, round(scale * (rounds_m if work == "M" else rounds_c)))
        return functools.partial(side, rounds=rounds)

    both = {
        "flower": of(flower, 20, 8),
        "pfl": of(functools.partial(peer, "pfl", "pfl_torch"), 60, 8),
        "fedjax": of(functools.partial(peer, "fedjax", "fedjax_jit"), 80, 8),
        "blazefl": of(blazefl, 60, 8),
        "loop": of(loop, 80, 8),
        "central": of(central, 100, 8),
        "fused": of(ours_fused, 1000, 30),
    }
    if work == "C":
        return both
    return {
        **both,
        "executor": of(ours_executor, 1000, 0),
        "central_4096": of(functools.partial(central, batch_size=4096), 100, 0),
        "stock": of(ours_stock, 100, 0),
        "pool": of(ours_pool, 60, 0),
    }


def figures_of(results: Results, suffix: str) -> dict[str, float | None]:
    """The figures of one work; those of work C have a suffix to their names."""
    present = [name for name in PEERS if name in results.measured]
    best = min(present, key=lambda name: results.median(name, "cpu_ms") or 0.0, default="none")
    figures = {
        f"{ours}_vs_{theirs}": results.ratio(ours, best if theirs == "best_peer" else theirs)
        for ours in ("fused", "executor", "stock", "pool")
        for theirs in ("flower", "best_peer")
    }
    figures |= {f"fused_vs_{theirs}": results.ratio("fused", theirs) for theirs in ("loop", "central", "central_4096")}
    rates = results.median("fused", "rate"), results.median("flower", "rate")
    figures["fused_vs_flower_wall"] = rates[0] / rates[1] if rates[0] and rates[1] else None
    for name in results.measured:
        figures[f"{name}_cpu_ms"] = results.median(name, "cpu_ms")
        figures[f"{name}_updates_per_second"] = results.median(name, "rate")
        figures[f"{name}_peak_mb"] = results.median(name, "peak_mb")
    return {f"{name}{suffix}": value for name, value in figures.items()}


def main() -> None:
    arguments = options(str(__doc__).splitlines()[0])
    repetitions, scale = (1, 0.3) if arguments.quick else (5, 1.0)
    results = {"M": Results(), "C": Results()}
    with tempfile.TemporaryDirectory() as folder:
        works = {name: write_work(Path(folder), name, DEVICES) for name in results}
        for _ in range(repetitions):
            for work, path in works.items():
                for name, side in sides(work, scale).items():
                    results[work].run(name, side, path)
    figures = known({**figures_of(results["M"], ""), **figures_of(results["C"], "_cnn")})
    missing = {f"{name} ({work})": why for work, its in results.items() for name, why in its.missing.items()}
    settings = {"devices": DEVICES, "repetitions": repetitions, "missing": missing}
    publish("Work C: a CNN", results["C"].rows("flower"), {}, {"devices": DEVICES}, None)
    publish("Work M: an MLP", results["M"].rows("flower"), figures, settings, arguments.json)


if __name__ == "__main__":
    main()
