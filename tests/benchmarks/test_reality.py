"""What benchmarks/reality.py makes of what was measured, on figures that are known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.reality import TARGET, Curve, Task, figures_of, measured_fleet, read_tasks, seconds_of, write_fleet
from fedpace.errors import RunError
from fedpace.simulations.fleets import load_fleet

FASTER = {"FedAvg": {"target": [16.0], "updates": [20.0]}, "FedBuff": {"target": [8.0], "updates": [5.0]}}


def test_an_accuracy_is_reached_by_the_mean_of_the_tests_behind_24_updates() -> None:
    curve = Curve([0.0, 2.0, 4.0, 6.0, 8.0], [0.0, 0.3, 0.9, 0.6, 0.6], updates=8)
    assert curve.reaches(0.5) == pytest.approx(4.0 + 2.0 * 0.1 / 0.2)  # means: 0, 0.15, 0.4, 0.6, 0.7
    assert curve.reaches(0.75) == math.inf
    assert curve.folds(16) == 4.0


def test_a_fleet_of_measured_devices_takes_as_long_as_they_did(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tasks = []
    for device, step in enumerate([0.02, 0.16]):
        for compute in 10 * step * rng.lognormal(0.0, 0.1, 2000):
            tasks.append(Task(device, 100.0, 100.0 + compute + 0.03, compute, steps=10))
    seconds, every = measured_fleet(tasks)
    assert every == {"jitter": pytest.approx(0.1, rel=0.05), "latency_ms": pytest.approx(15.0)}

    fleet = load_fleet(str(write_fleet(tmp_path, seconds, every)), 2, 1)
    for device, step in enumerate([0.02, 0.16]):
        ends = [fleet.draw(device, task, 0.0, 10, 5000, 5000) for task in range(2000)]
        computed = np.log([end.compute_seconds for end in ends])
        assert np.exp(computed.mean()) == pytest.approx(10 * step, rel=0.02)
        assert computed.std() == pytest.approx(0.1, rel=0.05)
        assert np.mean([end.at - end.compute_seconds for end in ends]) == pytest.approx(0.03, rel=0.01)


def test_tasks_of_a_recording_are_those_within_the_time(tmp_path: Path) -> None:
    replied = {"what": "replied", "node_id": 7, "compute_seconds": 0.5, "metrics": {"local-steps": 10}}
    rows = [
        {"what": "joined", "node_id": 7, "name": "device-3", "at": 0.1},
        {"look": "push", "at": 1.0, "tasks": [[1, 7, "train", "ab"]]},
        {**replied, "task": 1, "at": 1.6},
        {"look": "push", "at": 2.0, "tasks": [[2, 7, "train", "ab"], [3, 7, "train", "ab"]]},
        {**replied, "task": 2, "at": 2.6},
        {**replied, "task": 3, "at": 3.2},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_tasks(tmp_path, 2.0, 3.0) == [Task(3, 2.0, 2.6, 0.5, 10)]


def test_times_are_of_each_run_since_it_began() -> None:
    tests = [{"run": 1, "at": 50.0 + 2 * version, "accuracy": version / 10} for version in range(11)]
    found = seconds_of(tests, [("FedAvg", 10, {})], first=1)["FedAvg"]
    assert found["updates"] == [20.0]
    assert found["target"] == [
        pytest.approx(2 * (10 * TARGET + 1))
    ]  # the mean of three tests is that of the middle one
    with pytest.raises(RunError, match="not at"):
        seconds_of([{**test, "accuracy": 0.1} for test in tests], [("FedAvg", 10, {})], first=1)


def test_the_error_is_of_ratios_and_the_largest() -> None:
    slower = {name: {kind: [2 * took[0]] for kind, took in times.items()} for name, times in FASTER.items()}
    figures = figures_of(slower, FASTER)
    assert figures["ratio_error_max"] == pytest.approx(0.0) and figures["ranking_agrees"] == 1.0
    assert figures["real_fedbuff_ratio_to_target"] == 0.5 and figures["real_fedavg_seconds_to_target"] == 32.0

    other = {**FASTER, "FedBuff": {"target": [6.0], "updates": [5.5]}}
    assert figures_of(other, FASTER)["ratio_error_max"] == pytest.approx(0.25)


def test_a_strategy_that_is_the_faster_one_only_in_simulation_does_not_agree() -> None:
    other = {**FASTER, "FedBuff": {"target": [17.0], "updates": [5.0]}}
    assert figures_of(other, FASTER)["ranking_agrees"] == 0.0
