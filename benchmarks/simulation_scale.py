"""FedBuff in virtual time, really training, on fleets of a thousand to a million devices, beside rounds and FLGo.

Work M (see simulation_speed.py) with 1,000 devices at work at a time and 100 updates a version, speeds log-normal. Ours
is `fedpace simulate` with the fused executor, end to end, decision log and trace on. Ratios are of CPU time.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.launch import Measured, measure
from benchmarks.peers import build
from benchmarks.report import options, publish
from benchmarks.sides import Results, Side, known, write_work

IN_FLIGHT = 1000
SIZES = {"1k": 1_000, "10k": 10_000, "100k": 100_000, "1m": 1_000_000}
FLGO_SIZES = ("1k", "10k")  # it makes an object a device


def ours_sync(work: Path, rounds: int) -> Measured:
    """Rounds of our FedAvg: what asynchrony is measured against."""
    return measure("fedpace_simulate", work, "--executor", "fused", "--rounds", rounds, "--warm-up", 20)


def ours_async(work: Path, rounds: int) -> Measured:
    """Our FedBuff, after as many versions as it takes for devices to be at different ones."""
    strategy = ("--executor", "fused", "--strategy", "FedBuff", "--in-flight", IN_FLIGHT, "--fleet", "lognormal.toml")
    return measure("fedpace_simulate", work, *strategy, "--rounds", rounds, "--warm-up", 50)


def flgo(work: Path, rounds: int) -> Measured:
    options = ("--in-flight", IN_FLIGHT, "--rounds", rounds, "--warm-up", 10)
    return measure("flgo_fedbuff", work, *options, python=build("flgo"))


def sides(size: str, scale: float) -> dict[str, Side]:
    """The sides at one fleet size, by name, with versions enough to take a few seconds, times `scale`."""
    found: dict[str, Side] = {f"async {size}": functools.partial(ours_async, rounds=round(1000 * scale))}
    if size in FLGO_SIZES:
        found[f"flgo {size}"] = functools.partial(flgo, rounds=round(30 * scale))
    if size == "1k":
        found["sync 1k"] = functools.partial(ours_sync, rounds=round(1000 * scale))
    return found


def figures_of(results: Results) -> dict[str, float | None]:
    """Where a ratio could be taken at several sizes it is the least of them."""
    figures: dict[str, float | None] = {
        "async_vs_sync": least([results.ratio(f"async {size}", "sync 1k") for size in SIZES]),
        "async_vs_flgo": least([results.ratio(f"async {size}", f"flgo {size}") for size in FLGO_SIZES]),
        "million_vs_thousand": results.ratio("async 1k", "async 1m"),
    }
    for size in SIZES:
        peak, rate = results.median(f"async {size}", "peak_mb"), results.median(f"async {size}", "rate")
        figures[f"peak_gb_{size}"] = None if peak is None else peak / 1000
        figures[f"updates_per_second_{size}"] = rate
        figures[f"events_per_second_{size}"] = results.median(f"async {size}", "event_rate")
    for name in results.measured:
        figures[f"{name.replace(' ', '_')}_cpu_ms"] = results.median(name, "cpu_ms")
    return figures


def least(ratios: list[float | None]) -> float | None:
    """The least ratio; None where one is missing."""
    there = [ratio for ratio in ratios if ratio is not None]
    return min(there) if len(there) == len(ratios) else None


def main() -> None:
    arguments = options(str(__doc__).splitlines()[0])
    repetitions, scale = (1, 0.3) if arguments.quick else (3, 1.0)
    results = Results()
    with tempfile.TemporaryDirectory() as folder:
        works = {size: write_work(Path(folder), "M", devices) for size, devices in SIZES.items()}
        for _ in range(repetitions):
            for size, path in works.items():
                for name, side in sides(size, scale).items():
                    results.run(name, side, path)
    settings = {"in_flight": IN_FLIGHT, "repetitions": repetitions, "missing": results.missing}
    publish("FedBuff in virtual time", results.rows("sync 1k"), known(figures_of(results)), settings, arguments.json)


if __name__ == "__main__":
    main()
