"""What benchmarks/time_to_accuracy.py makes of runs whose figures are known, and of the scenarios it narrows."""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest

from benchmarks import time_to_accuracy
from benchmarks.time_to_accuracy import APPS, OTHERS, figures_of, narrowed, rows_of, scenario, settled, toml
from fedpace.simulations.comparison.statistics import Runs

SECONDS = {"FedAvg": 600.0, "Paced": 100.0, "FedBuff": 200.0, "CA2FL": 250.0}
"""To the target on flash; the other strategies take 300."""


def row(
    fleet: str, strategy: str, seed: int, seconds: float, *, tuned: bool = True, final: float = 0.8
) -> dict[str, Any]:
    told = {"app": "watch", "fleet": fleet, "strategy": strategy, "tuned": tuned, "seed": seed, "status": "completed"}
    spent = {"virtual_seconds": 1000.0, "device_seconds": 1e4, "bytes_up": 10, "bytes_down": 10}
    reached = {"seconds_to_target": seconds, "device_seconds_to_target": 9 * seconds, "bytes_to_target": seconds}
    return {**told, **spent, **reached, "final_accuracy": final, "final_slow_accuracy": math.nan}


def rows() -> list[dict[str, Any]]:
    found = []
    for seed in (1, 2):
        for name in ("FedAvg", "Paced", "CA2FL", *OTHERS):
            found.append(row("flash", name, seed, SECONDS.get(name, 300.0), final=0.81 if name == "FedAvg" else 0.8))
        found.append(row("flash", "Paced", seed, 150.0, tuned=False))
        for fleet, sync, ours in (("uniform", 10.0, 11.0), ("edge-extreme", 4000.0, 40.0)):
            found += [row(fleet, "FedAvg", seed, sync, final=0.84), row(fleet, "Paced", seed, ours)]
            found.append(row(fleet, "Paced", seed, ours, tuned=False))
    return found


def test_figures_are_the_ratios_of_known_times() -> None:
    figures = figures_of(Runs(rows()), ["watch"])
    expected = {
        "speedup_vs_sync": 6.0,
        "speedup_vs_sync_extreme": 100.0,
        "speedup_vs_best_other": 2.0,
        "speedup_vs_ca2fl": 2.5,
        "speedup_vs_oort": 3.0,
        "untuned_speedup_vs_sync": 4.0,
        "uniform_slowdown": 1.1,
        "accuracy_gap_points": 1.0,
        "control_accuracy_loss_points": 3.0,
    }
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value), name
    assert {f"{name}_low" for name in expected if not name.startswith("control")} <= figures.keys()
    assert figures["control_time_ratio"] == pytest.approx(60.0 / (1.147 / 0.05), rel=0.02)


def test_a_run_that_never_arrives_is_shown_as_a_bound() -> None:
    late = [*rows()[:-1], row("edge-extreme", "Paced", 2, math.nan, tuned=False)]
    (shown,) = [line for line in rows_of(Runs(late)) if line[1] == "edge-extreme" and "untuned" in line[2]]
    assert shown[3] == "1 of 2" and shown[4].startswith("≥ ")


@pytest.mark.parametrize("name", APPS)
def test_a_narrowed_scenario_is_a_file_that_says_the_same(name: str) -> None:
    plain = narrowed(scenario(name), ["uniform"], ("FedAvg", "Paced"))
    text = "".join(f"{key} = {toml(value)}\n" for key, value in plain.items())
    assert tomllib.loads(text) == plain
    assert [each["name"] for each in plain["strategies"]] == ["FedAvg", "Paced"]
    assert list(plain["apps"][0]["on"]) == ["uniform"]
    assert Path(plain["apps"][0]["folder"]).is_dir()


def test_settings_for_a_fleet_without_a_search_are_those_of_flash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = {"app": "watch", "strategy": "Paced", "trial": 0, "settings": {}, "value": 1.0, "chosen": True}
    trials = [{**trial, "fleet": "flash"}, {**trial, "fleet": "edge-extreme", "value": 2.0}]
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps({"seeds": [7], "trials": trials}))
    monkeypatch.setattr(time_to_accuracy, "TUNED", file)
    assert settled(["edge-extreme"])["trials"] == trials[1:]
    assert settled(["uniform"])["trials"] == [{**trial, "fleet": "uniform"}]
