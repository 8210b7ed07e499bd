"""`fedpace compare` as a process: what it leaves, whatever happens on the way."""

from __future__ import annotations

import csv
import fcntl
import json
import math
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from fedpace.simulations.comparison.results import RESULTS, RUNS, TRIALS
from fedpace.simulations.comparison.runs import run_folder
from tests.simulations.comparison.scenarios import (
    CONTEST,
    FEDBUFF,
    SECONDS,
    command,
    compare,
    compared,
    digest,
    rows,
    scenario_text,
    write_scenario,
)
from tests.simulations.simulated import DECLARED, environment, finished

pytestmark = pytest.mark.xdist_group("compare")

STRATEGIES = """
[[strategies]]
name = "FedBuff"
untuned = true
settings = { train_nodes = 10 }
search = { k = [2, 4, 8], server_lr = { low = 0.5, high = 1.5 } }

[[strategies]]
name = "mine"
[strategies.settings]
train_nodes = 10
gate = { part = "Arrivals", k = 3 }
weighers = ["Samples", { part = "Absolute", weigher = "Polynomial" }]
[strategies.search]
gate.k = [3, 5, 7]
config.lr = { low = 0.1, high = 0.5 }

[tuning]
seeds = [101, 102]
trials = 3
"""
TEXT = scenario_text(STRATEGIES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compared")


@pytest.fixture(scope="module")
def scenario(folder: Path) -> Path:
    return write_scenario(folder, TEXT)


@pytest.fixture(scope="module")
def whole(scenario: Path, folder: Path) -> Path:
    """A comparison that nothing happened to."""
    return compared(scenario, folder / "whole", "--workers=2")


# ---------------------------------------------------------------- what it leaves


def test_every_run_is_there(whole: Path) -> None:
    runs, results, trials = (rows(whole, name) for name in ("runs", "results", "trials"))
    assert [list(table[0]) for table in (runs, results, trials)] == [s.names for s in (RUNS, RESULTS, TRIALS)]
    keys = [(run["strategy"], run["tuned"], run["seed"]) for run in runs]
    wanted = [("FedAvg", False), ("FedBuff", False), ("FedBuff", True), ("mine", True)]
    assert keys == [(*strategy, seed) for strategy in wanted for seed in (1, 2)]
    assert {run["status"] for run in runs} == {"completed"}
    order = [tuple(row[name] for name in ("app", "fleet", "strategy", "tuned", "seed", "version")) for row in results]
    assert order == sorted(order) and len(set(order)) == len(order)
    assert {row[:5] for row in order} == {("contest", "uneven", *key) for key in keys}


def test_the_scenarios_strategies_ran_from_the_apps_model(whole: Path) -> None:
    """The app starts Flower's FedAvg for two rounds."""
    results, runs = rows(whole, "results"), rows(whole, "runs")
    first = [row for row in results if row["version"] == 0]
    assert len(first) == len(runs) and {round(row["accuracy"], 12) for row in first} == {round(math.exp(-2), 12)}
    assert all(row["virtual_seconds"] == row["bytes_up"] == row["folded"] == 0 for row in first)
    folded = {(run["strategy"], run["tuned"]): run["folded"] for run in runs}
    assert folded["FedBuff", False] > 2 * folded["FedAvg", False] > 40
    last = {(row["strategy"], row["tuned"], row["seed"]): row for row in results}
    for run in runs:
        final = last[run["strategy"], run["tuned"], run["seed"]]
        assert final["folded"] == run["folded"], "the last version is tested"
        assert final["accuracy"] > 0.7 and final["loss"] == pytest.approx(-math.log(final["accuracy"]))
        assert final["slow_accuracy"] == pytest.approx(final["accuracy"] ** 2)


def test_runs_end_when_their_time_is_up(whole: Path) -> None:
    for run in rows(whole, "runs"):
        assert run["virtual_seconds"] == 30.0 and run["reason"] == "its time was up"
        assert 0 < run["device_seconds"] <= 20 * 30.0
        mine = [row for row in rows(whole, "results") if _key(row) == _key(run)]
        assert len(mine) <= 22 and all(row["virtual_seconds"] <= 30.0 for row in mine)
        stages = [int(20 * math.sqrt(row["virtual_seconds"] / 30.0)) for row in mine[:-1]]
        assert len(set(stages)) == len(stages), "one test a step"
        for name in ("virtual_seconds", "device_seconds", "bytes_up", "bytes_down", "folded"):
            assert [row[name] for row in mine] == sorted(row[name] for row in mine)


def _key(row: dict[str, Any]) -> tuple[str, bool, int]:
    return row["strategy"], row["tuned"], row["seed"]


def test_what_is_reached_is_what_the_evaluations_say(whole: Path) -> None:
    for run in rows(whole, "runs"):
        reached = next(
            (row for row in rows(whole, "results") if _key(row) == _key(run) and row["accuracy"] >= 0.7), None
        )
        if reached is None:
            assert math.isnan(run["seconds_to_target"]) and math.isnan(run["bytes_to_target"])
        else:
            assert run["seconds_to_target"] == reached["virtual_seconds"]
            assert run["bytes_to_target"] == reached["bytes_up"] + reached["bytes_down"]
            assert run["device_seconds_to_target"] == reached["device_seconds"]


def test_details_add_up(whole: Path) -> None:
    for run in rows(whole, "runs"):
        place = run_folder(whole, "contest", "uneven", run["strategy"], run["tuned"], run["seed"])
        with np.load(place / "details.npz") as details:
            tasks, speed = details["tasks_per_device"], details["device_speed"]
            assert tasks.shape == speed.shape == (20,)
            assert run["folded"] + run["discarded"] + run["lost"] <= tasks.sum()
            assert np.median(speed) == pytest.approx(1.0, rel=0.2)
            assert len(details["staleness"]) == len(details["weights"]) == len(details["weight_speed"]) == run["folded"]
            assert set(details["weight_speed"]) <= set(speed) and details["staleness"].min() >= 0
            assert set(details["gantt_outcome"]) <= {"replied", "failed", "expired", "cancelled"}
            assert (details["gantt_start"] <= details["gantt_end"]).all()
            assert set(details["gantt_device"]) <= set(range(20))
            if run["strategy"] == "FedBuff":
                assert details["weights"].sum() < run["folded"] and details["staleness"].max() > 0
                fast = tasks[np.argsort(-speed)]
                assert fast[:10].sum() > fast[10:].sum(), "who is fast works more where nobody waits"


def test_every_strategy_gets_as_many_trials(whole: Path) -> None:
    trials = rows(whole, "trials")
    assert Counter(trial["strategy"] for trial in trials) == {"FedBuff": 3, "mine": 3}
    assert {tuple(trial["seeds"]) for trial in trials} == {(101, 102)}
    for name, untuned in (("FedBuff", {"server_lr": 1.0}), ("mine", {"gate.k": 3})):
        own = [trial for trial in trials if trial["strategy"] == name]
        (chosen,) = (trial for trial in own if trial["chosen"])
        assert chosen["value"] == min(trial["value"] for trial in own)
        assert json.loads(own[0]["settings"]).items() >= untuned.items(), "the first one is the strategy untuned"
        values = json.loads(chosen["settings"])
        used = json.loads(next(r["settings"] for r in rows(whole, "runs") if r["strategy"] == name and r["tuned"]))
        assert (used["k"] if name == "FedBuff" else used["gate"]["k"]) == values["k" if name == "FedBuff" else "gate.k"]


def test_tables(whole: Path) -> None:
    with (whole / "summary.csv").open() as file:
        summary = list(csv.DictReader(file))
    assert {(row["app"], row["strategy"], row["tuned"]) for row in summary} >= {("(all)", "FedBuff", "True")}
    for row in summary:
        if row["strategy"] == "FedAvg":
            assert float(row["speedup"]) == 1.0
        elif row["app"] == "contest":
            assert float(row["speedup_low"]) <= float(row["speedup"]) <= float(row["speedup_high"])
    said = json.loads((whole / "scenario.json").read_text())
    assert said["baseline"] == "FedAvg" and said["apps"][0]["metric"] == "accuracy" and said["seeds"] == [1, 2]
    text = (whole / "tables.md").read_text()
    assert "## Fleet uneven" in text and "| FedBuff (untuned) | 2/2 |" in text
    assert (whole / "failures.csv").read_text().splitlines() == ["app,fleet,strategy,tuned,seed,status,reason"]
    assert (whole / "report.html").stat().st_size > 1000


# ---------------------------------------------------------------- the same again


@pytest.mark.slow
def test_as_many_workers_as_one_likes(whole: Path, scenario: Path, folder: Path) -> None:
    other = compared(scenario, folder / "one-worker", "--workers=1")
    assert [digest(other, name) for name in ("results", "runs", "trials")] == [
        digest(whole, name) for name in ("results", "runs", "trials")
    ]


def test_what_is_done_is_not_done_again(whole: Path, scenario: Path) -> None:
    def made() -> dict[Path, float]:
        return {path: path.stat().st_mtime for path in whole.rglob("run.json")}

    before, bits = made(), digest(whole)
    compared(scenario, whole)
    assert made() == before and len(before) == 8 + 2 * 3 * 2 and digest(whole) == bits
    assert not (whole / ".partial").exists()


@pytest.mark.slow
def test_what_was_chosen_once_is_used_again(whole: Path, scenario: Path, folder: Path) -> None:
    other = compared(scenario, folder / "tuned", "--tuned", whole / "tuned.json")
    assert digest(other) == digest(whole) and digest(other, "trials") == digest(whole, "trials")
    assert not (other / "trials").exists()


@pytest.mark.slow
def test_a_run_is_what_simulate_makes_of_it(folder: Path) -> None:
    strategy = 'name = "FedBuff"\nsettings = { train_nodes = 30, k = 8 }'
    text = scenario_text(f"[[strategies]]\n{strategy}", app=DECLARED, devices=60, seeds=[5])
    text = text.replace("virtual_seconds = 30.0", "versions = 6")
    out = compared(write_scenario(folder / "declared", text), folder / "declared-out")
    fleet, config = folder / "declared" / "uneven.toml", 'strategy="FedBuff" rounds=6'
    alone = finished(DECLARED, folder / "alone", "--devices=60", "--fleet", fleet, "--seed=5", "--run-config", config)
    model = run_folder(out, "contest", "uneven", "FedBuff", False, 5) / "model.safetensors"
    assert model.read_bytes() == (alone.out / "model.safetensors").read_bytes()
    (run,) = (run for run in rows(out, "runs") if run["strategy"] == "FedBuff")
    assert run["reason"] == "6 versions" and run["virtual_seconds"] == pytest.approx(alone.result["virtual_seconds"])
    assert run["device_seconds"] == pytest.approx(alone.result["device_seconds"])


# ---------------------------------------------------------------- interrupted


@contextmanager
def started(scenario: Path, out: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command(scenario, out, "--workers=2"),
        env=environment(out),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - ignored in the background
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_interrupted_and_killed_it_ends_with_the_same_bytes(whole: Path, scenario: Path, folder: Path) -> None:
    out = folder / "interrupted"

    def made() -> int:
        return len(list(out.rglob("*/run.json"))) - len(list(out.rglob(".partial/*/run.json")))

    with started(scenario, out) as process:
        wait_for(lambda: made() >= 3)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 130 and "the same command goes on" in said and "Traceback" not in said
    before = made()
    assert before < 20 and not (out / "results.parquet").exists()
    with started(scenario, out) as process:
        children: list[psutil.Process] = []
        wait_for(lambda: made() >= before + 4 or process.poll() is not None)
        children = psutil.Process(process.pid).children(recursive=True)
        assert process.poll() is None and children
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    wait_for(lambda: not any(_alive(child) for child in children))
    assert before < made() < 20
    compared(scenario, out, "--workers=3")
    assert digest(out) == digest(whole)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# ---------------------------------------------------------------- what goes wrong


def test_runs_that_end_badly_are_rows_and_the_others_go_on(folder: Path) -> None:
    bad = "".join(
        f"""
[[strategies]]
name = "{behave}"
preset = "FedBuff"
settings = {{ train_nodes = 10, k = 4, config = {{ behave = "{behave}" }} }}
"""
        for behave in ("raises", "dies", "hangs", "prints")
    )
    bad += '[[strategies]]\nname = "diverges"\npreset = "FedBuff"\nsettings = { k = 4, config = { lr = 1e30 } }\n'
    text = scenario_text(bad + FEDBUFF, seeds=[1], before="wall_seconds = 4")
    out = compared(write_scenario(folder / "bad", text), folder / "bad-out")
    told = {run["strategy"]: (run["status"], run["reason"]) for run in rows(out, "runs")}
    good = ("completed", "its time was up")
    assert {name for name, outcome in told.items() if outcome == good} == {"FedAvg", "FedBuff", "prints"}
    assert told["raises"][0] == "failed" and "ValueError: this device will not" in told["raises"][1]
    assert told["dies"] == ("failed", "its process was ended by signal 9 (SIGKILL)")
    assert told["hangs"] == ("failed", "it took more than 4 s")
    assert told["diverges"][0] == "diverged" and "version 1 is not finite" in told["diverges"][1]
    with (out / "failures.csv").open() as file:
        assert {row["strategy"] for row in csv.DictReader(file)} == {"raises", "dies", "hangs", "diverges"}
    text = (out / "tables.md").read_text()
    assert "this device will not" in text and "≤ " in text
    log = (run_folder(out, "contest", "uneven", "prints", False, 1) / "log.txt").read_text()
    assert "a server has something to say" in log and "a device has something to say" in log


@pytest.mark.slow
def test_apps_that_cannot_be_compared_are_rows(folder: Path) -> None:
    reasons = {
        "raises": "ValueError: the app has had enough",
        "legacy": "a legacy strategy, which no other can replace",
        "silent": "the ServerApp ended without a strategy",
        "blind": "the app gives its strategy no evaluate_fn",
        "vague": "evaluate_fn gives loss; it needs accuracy",
        "well": "its time was up",
    }
    app = f'[[apps]]\nfolder = "{CONTEST}"\nvirtual_seconds = 5\nname = '
    apps = "".join(f'{app}"{name}"\nconfig = {{ server = "{name}" }}\n' for name in reasons)
    text = f"""
seeds = [1]
baseline = "FedAvg"
{apps}
[[fleets]]
name = "uniform"
[[strategies]]
name = "FedAvg"
"""
    out = compared(write_scenario(folder / "apps", text), folder / "apps-out")
    for run in rows(out, "runs"):
        assert reasons[run["app"]] in run["reason"]
        assert run["status"] == ("completed" if run["app"] == "well" else "failed")
    for server in ("raises", "silent"):
        text = text.replace(f'config = {{ server = "{server}" }}', "")
    trace = run_folder(out, "raises", "uniform", "FedAvg", False, 1) / "traceback.txt"
    assert "contest.py" in trace.read_text()


@pytest.mark.slow
def test_an_app_that_cannot_be_loaded(folder: Path) -> None:
    app = folder / "broken-app"
    app.mkdir()
    (app / "pyproject.toml").write_text((CONTEST / "pyproject.toml").read_text())
    (app / "contest.py").write_text("raise ValueError('not today')")
    done = compare(write_scenario(folder / "broken", scenario_text("", app=app)), folder / "broken-out")
    assert done.returncode == 1, "nothing was completed"
    assert {run["reason"] for run in rows(folder / "broken-out", "runs")} == {
        "the app cannot be loaded: ValueError: not today"
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("devices = 20", "devices = 200"), "have 100 partitions, one a device; choose fewer devices"),
        (("target = 0.7", "target = 0.7\nexecutor = 'fussed'"), "executor: is 'fussed'; allowed: auto, fused, inline"),
        (('baseline = "FedAvg"', 'baseline = "Paced"'), ":3: baseline: there is no strategy 'Paced'"),
    ],
)
def test_what_is_wrong_with_a_scenario_is_one_line(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    text = scenario_text("", app=DECLARED).replace(*change)
    done = compare(write_scenario(tmp_path, text), tmp_path / "out")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("fedpace: ") and said in line
    assert not list(tmp_path.rglob("run.json"))


def test_one_comparison_a_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = compare(write_scenario(tmp_path, scenario_text("")), out)
    assert done.returncode == 2 and "another comparison is at work in" in done.stderr
