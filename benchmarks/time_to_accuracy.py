"""Virtual time to a target accuracy: fedpace's own strategy against synchronous rounds and published asynchronous ones.

The comparisons of `simulations/scenarios/`, with what `fedpace compare` found for each strategy in as many trials, on
other seeds (`benchmarks/tuned.json`). Ratios are geometric means over seeds, paired, and over apps; those that settings
of fedpace's own strategy were searched on, the digits, are run but not counted. Runs that never arrive count as what they
had spent at their end, so a ratio over them is a bound from below.

Quick: one app, on `flash` all strategies with five seeds; elsewhere synchronous rounds and ours alone.
"""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np

from benchmarks.report import options, publish
from fedpace.errors import RunError
from fedpace.simulations.comparison.results import read_rows
from fedpace.simulations.comparison.statistics import Estimate, Runs
from fedpace.simulations.fleets import load_fleet

SCENARIOS = ROOT / "simulations" / "scenarios"
TUNED = Path(__file__).with_name("tuned.json")
SEARCHED_ON = "digits"
APPS = ("digits", "fashion", "watch")
QUICK = "watch"
SYNC, OURS, CALIBRATED = "FedAvg", "Paced", "CA2FL"
OTHERS = ("FedBuff", "FedAsync", "Oort", "Compass", "REFL")
UNTUNED = (OURS, False)
QUICK_SECONDS = {"flash": 700.0, "uniform": 30.0, "edge-extreme": 150.0}
"""When the runs of a quick comparison end, but for synchronous rounds on `edge-extreme`, which need thousands."""
LONGEST_SECONDS = 3600.0 * 3


def scenario(name: str) -> dict[str, Any]:
    """A shipped scenario as it is, with paths that hold anywhere."""
    plain = tomllib.loads((SCENARIOS / f"{name}.toml").read_text())
    for app in plain["apps"]:
        app["folder"] = str((SCENARIOS / app["folder"]).resolve())
    return plain


def narrowed(plain: Mapping[str, Any], fleets: Sequence[str], strategies: Sequence[str] = ()) -> dict[str, Any]:
    """Only these fleets, and only these strategies, if any are named."""
    kept = {**plain, "fleets": [fleet for fleet in plain["fleets"] if fleet["name"] in fleets]}
    if strategies:
        kept["strategies"] = [each for each in plain["strategies"] if each["name"] in strategies]
    kept["apps"] = [
        {**app, "on": {fleet: limits for fleet, limits in app.get("on", {}).items() if fleet in fleets}}
        for app in plain["apps"]
    ]
    kept["tuning"] = {**plain["tuning"], "fleets": list(fleets)}
    kept.pop("quick", None)
    return kept


def toml(value: Any) -> str:
    """A value of a TOML file, on one line."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value)


def compared(plain: Mapping[str, Any], directory: Path) -> list[dict[str, Any]]:
    """The rows of `runs.parquet`. RunError where the comparison fails."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "scenario.toml"
    file.write_text("".join(f"{key} = {toml(value)}\n" for key, value in plain.items()))
    tuned = directory / "tuned.json"
    tuned.write_text(json.dumps(settled([fleet["name"] for fleet in plain["fleets"]])))
    command = [sys.executable, "-m", "fedpace", "compare", str(file), "--tuned", str(tuned)]
    command += ["--out", str(directory / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LONGEST_SECONDS, check=False)
    if done.returncode:
        raise RunError(f"the comparison {file} failed: {done.stderr[-2000:]}")
    return read_rows(directory / "out" / "runs.parquet")


def settled(fleets: Sequence[str]) -> dict[str, Any]:
    """The trials on these fleets; of a strategy that was not searched for on one, those on `flash`."""
    plain = json.loads(TUNED.read_text())
    found = []
    for fleet in fleets:
        on = [trial for trial in plain["trials"] if trial["fleet"] == fleet]
        there = {(trial["app"], trial["strategy"]) for trial in on}
        for trial in plain["trials"]:
            if trial["fleet"] == "flash" and (trial["app"], trial["strategy"]) not in there:
                on.append({**trial, "fleet": fleet})
        found += on
    return {"seeds": plain["seeds"], "trials": found}


def run_quick(directory: Path) -> list[dict[str, Any]]:
    plain = scenario(QUICK)
    rows = compared(narrowed(plain, ["edge-extreme"], (SYNC,)), directory / "extreme")
    plain["baseline"] = OURS
    for fleet, strategies in (("flash", ()), ("uniform", (SYNC, OURS)), ("edge-extreme", (OURS,))):
        short = narrowed(plain, [fleet], strategies)
        short["apps"][0]["on"].setdefault(fleet, {})["virtual_seconds"] = QUICK_SECONDS[fleet]
        rows += compared(short, directory / f"short-{fleet}")
    return rows


def run_full(directory: Path) -> list[dict[str, Any]]:
    return [row for name in APPS for row in compared(scenario(name), directory / name)]


# ------------------------------------------------------------ figures


def figures_of(runs: Runs, apps: Sequence[str]) -> dict[str, float]:
    """Ratios of virtual seconds, above 1 where ours needs less; gaps in points of a hundred, reference minus ours."""
    ours, sync = (OURS, True), (SYNC, True)
    others = [(name, True) for name in OTHERS]
    found = {
        "speedup_vs_sync": runs.speedup(ours, sync, "flash", apps),
        "speedup_vs_sync_extreme": runs.speedup(ours, sync, "edge-extreme", apps),
        "speedup_vs_best_other": runs.speedup_on_best(ours, others, "flash", apps),
        "speedup_vs_ca2fl": runs.speedup(ours, (CALIBRATED, True), "flash", apps),
        "accuracy_gap_points": runs.gap(ours, sync, "flash", apps),
        "untuned_speedup_vs_sync": runs.speedup(UNTUNED, sync, "flash", apps),
        "untuned_speedup_vs_best_other": runs.speedup_on_best(UNTUNED, others, "flash", apps),
        "uniform_slowdown": runs.speedup(sync, ours, "uniform", apps),
        "untuned_uniform_slowdown": runs.speedup(sync, UNTUNED, "uniform", apps),
        "device_seconds_ratio_vs_sync": runs.speedup(ours, sync, "flash", apps, "device_seconds"),
        "bytes_ratio_vs_sync": runs.speedup(ours, sync, "flash", apps, "bytes"),
    }
    for name in OTHERS:
        found[f"speedup_vs_{name.lower()}"] = runs.speedup(ours, (name, True), "flash", apps)
        found[f"accuracy_gap_to_{name.lower()}_points"] = runs.gap(ours, (name, True), "flash", apps)
    figures: dict[str, float] = {}
    for name, estimate in found.items():
        scale = 100.0 if name.endswith("_points") else 1.0
        figures |= {
            name: scale * estimate.value,
            f"{name}_low": scale * estimate.low,
            f"{name}_high": scale * estimate.high,
        }
    return figures | control(runs, apps)


def control(runs: Runs, apps: Sequence[str]) -> dict[str, float]:
    """The negative control, after FLASH (Yang et al., WWW 2021): what synchronous rounds lose on `flash` against `uniform`.

    Time to the target is in units of a fleet's mean seconds a local step, so that a fleet is not slower for its devices
    being older, but for their being uneven.
    """
    steps = {fleet: float(np.mean(load_fleet(fleet, 10_000, 0).devices.step_seconds)) for fleet in ("flash", "uniform")}
    times, gaps = [], []
    for app in apps:
        flash, uniform = (runs.of(app, fleet, (SYNC, True)) for fleet in ("flash", "uniform"))
        for seed in sorted(flash.keys() & uniform.keys()):
            one, other = runs.cost(flash[seed], "seconds"), runs.cost(uniform[seed], "seconds")
            times.append(math.log(one.value / steps["flash"]) - math.log(other.value / steps["uniform"]))
            gaps.append(uniform[seed]["final_accuracy"] - flash[seed]["final_accuracy"])
    return {
        "control_time_ratio": math.exp(math.fsum(times) / len(times)),
        "control_accuracy_loss_points": 100.0 * math.fsum(gaps) / len(gaps),
    }


def rows_of(runs: Runs) -> list[tuple[str, ...]]:
    header = ("app", "fleet", "strategy", "arrived", "seconds to target", "device-seconds", "MB", "final accuracy, %")
    rows: list[tuple[str, ...]] = [header]
    for app in runs.apps:
        for fleet in runs.fleets:
            for strategy in runs.strategies:
                of = list(runs.of(app, fleet, strategy).values())
                if not of:
                    continue
                arrived = sum(not math.isnan(run["seconds_to_target"]) for run in of)
                costs = [runs.costs(app, fleet, strategy, each) for each in ("seconds", "device_seconds", "bytes")]
                accuracy = runs.mean(app, fleet, strategy, "final_accuracy")
                name = strategy[0] if strategy[1] else f"{strategy[0]}, untuned"
                shown = [told(costs[0]), told(costs[1]), told(costs[2], 1e-6)]
                rows.append((app, fleet, name, f"{arrived} of {len(of)}", *shown, told(accuracy, 100.0)))
    return rows


def told(estimate: Estimate, scale: float = 1.0) -> str:
    bound = "≥ " if estimate.bound else ""
    return f"{bound}{scale * estimate.value:,.1f} ({scale * estimate.low:,.1f} to {scale * estimate.high:,.1f})"


def main() -> None:
    arguments = options(str(__doc__).splitlines()[0], resumes=True)
    kept = contextlib.nullcontext(arguments.out) if arguments.out else tempfile.TemporaryDirectory()
    with kept as directory:
        rows = (run_quick if arguments.quick else run_full)(Path(directory))
    runs = Runs(rows)
    apps = [app for app in runs.apps if app != SEARCHED_ON]
    settings = {"apps_counted": apps, "seeds": sorted({row["seed"] for row in rows})}
    publish("Virtual time to the target", rows_of(runs), figures_of(runs, apps), settings, arguments.json)


if __name__ == "__main__":
    main()
