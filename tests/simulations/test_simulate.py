"""`fedpace simulate` as a process: what it refuses, how it ends, what it leaves."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedpace.simulations.trace import COLUMNS, KINDS
from tests.simulations.simulated import (
    APPS,
    DECLARED,
    SECONDS,
    UNEVEN,
    Left,
    command,
    environment,
    finished,
    simulate,
)

NUMPY = APPS / "quickstart_numpy"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fleets") / "uneven.toml"
    path.write_text(UNEVEN)
    return path


# ---------------------------------------------------------------- refused


def refused(app: Path, out: Path, *options: str | Path) -> str:
    """What is said of a command that ends with exit code 2 and one line, and leaves nothing."""
    done = simulate(app, out, *options)
    assert done.returncode == 2, f"exit code {done.returncode}: {done.stderr}"
    assert not done.stdout and "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("fedpace: ")
    assert not (out / "result.json").exists()
    return line.removeprefix("fedpace: ")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--fleet", "nowhere"), "fleet 'nowhere': name one of cross-silo, edge-extreme, flash, liars, uniform"),
        (("--executor", "turbo"), "--executor: there is no 'turbo'; choose one of auto, inline, pool, fused"),
        (("--run-config", "speed=1"), "--run-config: the app has no key 'speed'"),
        (("--run-config", "rounds"), "--run-config"),
        (("--device", "cuda", "--executor", "fused"), "the device is 'cuda', but torch finds no GPU here"),
        (("--device", "cuda", "--executor", "pool"), "--device cuda: executor pool leaves the device to the app"),
        (("--device", "cuda"), "the device is 'cuda', but torch finds no GPU here"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, options: tuple[str, ...], reason: str) -> None:
    assert reason in refused(DECLARED, tmp_path / "out", *options)


def test_fused_is_for_declared_work(tmp_path: Path) -> None:
    assert "is not what LocalTraining.client_app() returns" in refused(NUMPY, tmp_path, "--executor", "fused")


@pytest.mark.parametrize("executor", ["auto", "inline", "pool"])
def test_an_app_without_a_client_app(tmp_path: Path, executor: str) -> None:
    app = tmp_path / "app"
    shutil.copytree(DECLARED, app)
    (app / "declared.py").write_text((app / "declared.py").read_text().replace("client =", "no_client ="))
    reason = refused(app, tmp_path / "out", "--executor", executor)
    assert "Unable to load attribute client from module declared, which 'declared:client' names" in reason


def test_a_fleet_with_a_fault(tmp_path: Path) -> None:
    fleet = tmp_path / "fleet.toml"
    fleet.write_text("[compute]\nspeed = 1")
    assert f"{fleet}:2" in (reason := refused(DECLARED, tmp_path / "out", "--fleet", fleet)) and "speed" in reason


# ---------------------------------------------------------------- how runs end


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory, fleet: Path) -> Left:
    """A run in which everything happens."""
    options = (
        "--devices",
        "50",
        "--fleet",
        fleet,
        "--executor",
        "inline",
        "--run-config",
        'strategy="FedBuff" rounds=6',
    )
    return finished(DECLARED, tmp_path_factory.mktemp("left") / "out", *options)


def test_the_result_is_a_runs_and_a_simulations(left: Left) -> None:
    result = left.result
    assert (result["status"], result["reason"], result["versions"]) == ("finished", "", 6)
    assert result["updates"]["folded"] == 48 and result["final"]["accuracy"] > 0.4
    assert (result["devices"], result["fleet"], result["seed"]) == (50, "uneven", 0)
    model = (left.out / "model.safetensors").read_bytes()
    assert result["model_sha256"] == hashlib.sha256(model).hexdigest()
    assert set(load_file(left.out / "model.safetensors")) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert 0 < result["virtual_seconds"] < 60 and result["device_seconds"] > 0
    assert result["final"]["seconds"] == pytest.approx(result["virtual_seconds"], abs=1e-6), (
        "the app's clock was virtual"
    )


def test_the_trace_is_what_the_result_counts(left: Left) -> None:
    trace, result = left.trace, left.result
    kinds = trace.pop("kinds").tolist()
    assert kinds == list(KINDS) and list(trace) == list(COLUMNS)
    assert {name: column.dtype for name, column in trace.items()} == {n: np.dtype(c) for n, c in COLUMNS.items()}
    assert len({column.shape for column in trace.values()}) == 1

    counted = Counter(kinds[kind] for kind in trace["kind"].tolist())
    tasks = result["tasks"]
    assert counted["replied"] == result["updates"]["received"] >= 48
    assert (counted["failed"], counted["cancelled"]) == (tasks["failed"], tasks["cancelled"])
    assert tasks["failed"] > 0 and tasks["cancelled"] > 0
    assert len(np.unique(trace["task"])) == len(trace["task"]) <= tasks["sent"]
    assert (np.diff(trace["seconds"]) >= 0).all() and (trace["sent_seconds"] <= trace["seconds"]).all()
    assert trace["compute_seconds"].sum() == pytest.approx(result["device_seconds"], abs=1e-5)
    assert trace["node_id"].min() >= 1000 and trace["node_id"].max() < 1050
    digest = hashlib.sha256()
    for name in COLUMNS:
        digest.update(trace[name].tobytes())
    assert digest.hexdigest() == result["trace_sha256"]


def test_the_decision_log_tells_the_same_story(left: Left) -> None:
    entries = [json.loads(line) for line in (left.out / "decisions.jsonl").read_text().splitlines()]
    assert [entry["n"] for entry in entries] == list(range(1, len(entries) + 1))
    told = Counter(entry.get("what") for entry in entries)
    result = left.result
    chosen = sum(len(entry["tasks"]) for entry in entries if entry.get("what") == "select")
    assert (chosen + told["send"], told["replied"]) == (result["tasks"]["sent"], result["updates"]["received"])
    seconds = [entry["seconds"] for entry in entries]
    assert seconds == sorted(seconds)


def test_another_runs_result_is_not_overwritten(left: Left) -> None:
    before = (left.out / "result.json").read_bytes()
    done = simulate(DECLARED, left.out)
    assert done.returncode == 2 and "holds the result of another run; name another folder" in done.stderr
    assert (left.out / "result.json").read_bytes() == before


def test_the_same_seed_gives_the_same_bits(left: Left, fleet: Path, tmp_path: Path) -> None:
    """In the processes of a pool as in one: what is computed does not depend on where."""
    options = ("--devices", "50", "--fleet", fleet, "--executor", "pool", "--run-config", 'strategy="FedBuff" rounds=6')
    assert finished(DECLARED, tmp_path / "out", *options, "--workers", "2").bits == left.bits


def test_a_server_app_that_raises(tmp_path: Path) -> None:
    done = simulate(DECLARED, tmp_path, "--executor", "inline", "--run-config", "fail-after=2", "--devices", "30")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "declared.py" in done.stderr
    assert "the run failed: ValueError: the app has had enough" in done.stderr
    left = Left(tmp_path)
    assert left.result["status"] == "failed" and "has had enough" in left.result["reason"]
    assert left.result["versions"] == 2 and len(left.trace["task"]) >= 40
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("executor", ["inline", "pool"])
def test_ctrl_c_leaves_a_usable_result(tmp_path: Path, executor: str) -> None:
    options = ("--executor", executor, "--devices", "50", "--run-config", 'strategy="FedBuff" rounds=1000000')
    process = subprocess.Popen(
        command(DECLARED, tmp_path, *options), env=environment(tmp_path), stderr=subprocess.PIPE, text=True
    )
    try:
        until = time.monotonic() + SECONDS
        metrics = tmp_path / "metrics.jsonl"
        while not metrics.exists() or metrics.read_text().count("\n") < 3:
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    left = Left(tmp_path)
    result = left.result
    assert (result["status"], result["reason"]) == ("interrupted", "the simulation was told to stop")
    assert result["versions"] >= 1 and result["final"]["accuracy"] > 0.1
    assert hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest() == result["model_sha256"]
    replied = (left.trace["kind"] == KINDS.index("replied")).sum()
    assert replied == result["updates"]["received"] >= 8 * result["versions"]
