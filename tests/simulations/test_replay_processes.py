"""Real runs of eight device processes of different pace, recorded, and replayed on the virtual clock."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedpace.errors import RunError
from fedpace.localfleet import LocalFleet
from tests.fleets import wait_for

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
APP = Path(__file__).parent / "apps" / "recorded"
EVERY_EVENT = ROOT / "tests" / "flower" / "paced"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""As many threads in both runs, so that both round alike; and eight devices share this machine."""
SLOWDOWNS = (1.0, 1.0, 1.5, 1.5, 2.0, 2.5, 4.0, 12.0)


def start(fleet: LocalFleet, *options: str, devices: tuple[float, ...] = SLOWDOWNS) -> None:
    record = str(fleet.directory / "recording")
    fleet.start_server("--min-nodes", str(len(devices)), "--seed", "3", "--record", record, *options)
    for i, slowdown in enumerate(devices):
        config = f"partition-id={i} num-partitions={len(devices)}"
        fleet.start_device(f"device-{i}", "--slowdown", str(slowdown), node_config=config)


def replay(fleet: LocalFleet, *options: str) -> subprocess.CompletedProcess[str]:
    """Replays a fleet's recording into its folder `replayed`."""
    command = [sys.executable, "-m", "fedpace", "simulate", "--app", str(fleet.app), *options]
    environment = {**os.environ, **ENVIRONMENT}
    command += ["--replay", str(fleet.directory / "recording"), "--out", str(fleet.directory / "replayed")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def decisions(out: Path) -> list[dict[str, Any]]:
    """A decision log without its column of times."""
    entries = [json.loads(line) for line in (out / "decisions.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in entries]


def assert_same(fleet: LocalFleet) -> list[dict[str, Any]]:
    """The recorded run and its replay decided the same, at the same times, and made the same model."""
    out, again = fleet.out, fleet.directory / "replayed"
    recorded, replayed = (json.loads((folder / "result.json").read_text()) for folder in (out, again))
    log = decisions(out)
    assert decisions(again) == log
    assert (again / "decisions.jsonl").read_bytes() == (out / "decisions.jsonl").read_bytes()  # even the times
    assert replayed["replay"]["difference"] is None and replayed["replay"]["other_models_from_task"] is None
    assert replayed["model_sha256"] == recorded["model_sha256"] is not None
    assert replayed["status"] == recorded["status"]
    assert (again / "metrics.jsonl").read_text() == (out / "metrics.jsonl").read_text()
    return log


def versions(fleet: LocalFleet) -> int:
    metrics = fleet.out / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


@pytest.mark.parametrize("strategy", ["FedBuff", "FedAvg", "Paced", "flwr:FedAvg"])
def test_a_replay_decides_what_the_recorded_run_did(tmp_path: Path, strategy: str) -> None:
    with LocalFleet(tmp_path, APP, environment=ENVIRONMENT) as fleet:
        rounds = 6 if strategy in ("FedBuff", "Paced") else 3
        start(fleet, "--run-config", f'strategy="{strategy}" num-rounds={rounds}')
        assert fleet.wait(90.0) == 0, fleet.log("server")
    done = replay(fleet)
    assert done.returncode == 0, done.stderr
    log = assert_same(fleet)
    kinds = {entry["what"] for entry in log}
    if strategy == "FedAvg":
        assert "give up" in kinds, "no deadline ended a round: the test shows less than it says"
    if strategy in ("FedBuff", "Paced"):
        order = [entry["task"] for entry in log if entry["what"] == "replied"]
        assert order != sorted(order), "nobody was overtaken: the test shows less than it says"


def test_devices_that_leave_and_return_do_so_again(tmp_path: Path) -> None:
    with LocalFleet(tmp_path, APP, environment=ENVIRONMENT) as fleet:
        start(fleet, "--run-config", "num-rounds=10000", devices=(*SLOWDOWNS[:-1], 20.0))
        wait_for(lambda: versions(fleet) > 2, "the run begins")
        fleet.devices["device-7"].kill()
        fleet.stop_device("device-0")
        fleet.start_device("device-0", node_config="partition-id=0 num-partitions=8")
        wait_for(lambda: fleet.log("server").count("device-0 joined") == 2, "device-0 returns")
        returned = versions(fleet)
        wait_for(lambda: versions(fleet) > returned + 2, "the run goes on")
        assert fleet.server is not None
        fleet.server.terminate()
        assert fleet.wait(90.0) == 130, fleet.log("server")
    done = replay(fleet)
    assert done.returncode == 130, done.stderr
    assert_same(fleet)
    rows = [json.loads(line) for line in (tmp_path / "recording" / "rows.jsonl").read_text().splitlines()]
    arrived = [(row["what"], row.get("name")) for row in rows if "what" in row]
    assert arrived.count(("joined", "device-0")) == 2 and ("left", None) in arrived


def test_a_run_that_was_interrupted_is_interrupted_there_again(tmp_path: Path) -> None:
    with LocalFleet(tmp_path, APP, environment=ENVIRONMENT) as fleet:
        start(fleet, "--run-config", 'num-rounds=10000 strategy="Paced"')
        wait_for(lambda: versions(fleet) > 4, "the run begins")
        assert fleet.server is not None
        fleet.server.terminate()
        assert fleet.wait(60.0) == 130, fleet.log("server")
    done = replay(fleet)
    assert done.returncode == 130, done.stderr
    assert_same(fleet)


def test_every_kind_of_event_is_replayed(tmp_path: Path) -> None:
    """An app that looks at all that a grid offers sees it all again."""
    output = tmp_path / "seen.json"
    with LocalFleet(tmp_path / "fleet", EVERY_EVENT, environment=ENVIRONMENT) as fleet:
        record = str(fleet.directory / "recording")
        fleet.start_server("--min-nodes", "2", "--run-config", f'output="{output}"', "--record", record)
        for name in ("one", "two"):
            fleet.start_device(name)
        assert fleet.wait(60.0) == 0, fleet.log("server")
    seen = output.read_text()
    output.unlink()
    done = replay(fleet)
    assert done.returncode == 0, done.stderr
    assert output.read_text() == seen
    assert decisions(fleet.directory / "replayed") == decisions(fleet.out)


def test_a_changed_app_diverges_and_another_app_or_config_is_refused(tmp_path: Path) -> None:
    app = tmp_path / "app"
    shutil.copytree(APP, app, ignore=shutil.ignore_patterns("__pycache__"))
    with LocalFleet(tmp_path, app, environment=ENVIRONMENT) as fleet:
        start(fleet, "--run-config", "num-rounds=2")
        assert fleet.wait(60.0) == 0, fleet.log("server")
    done = replay(fleet, "--seed", "3")
    assert done.returncode == 2 and "--seed: a replay takes that from the recording" in done.stderr
    fleet.app = EVERY_EVENT
    done = replay(fleet)
    assert done.returncode == 2 and "is of the app recorded, this is paced" in done.stderr
    fleet.app = app
    module = app / "recorded.py"
    module.write_text(module.read_text().replace("FedBuff(k=3", "FedBuff(k=2"))
    done = replay(fleet)
    assert done.returncode == 1 and "the app is not quite the one recorded" in done.stderr
    assert "the run has diverged from its recording after decision" in done.stderr
    with LocalFleet(tmp_path / "again", APP) as again, pytest.raises(RunError, match="the recording of another run"):
        again.start_server("--record", str(tmp_path / "recording"))


def test_a_run_that_failed_fails_again(tmp_path: Path) -> None:
    with LocalFleet(tmp_path, APP, environment=ENVIRONMENT) as fleet:
        start(fleet, "--run-config", 'strategy="none of them"', devices=(1.0,))
        assert fleet.wait(60.0) == 1
    done = replay(fleet)
    assert done.returncode == 1 and "KeyError: 'none of them'" in done.stderr
    result = json.loads((tmp_path / "replayed" / "result.json").read_text())
    assert result["reason"] == "KeyError: 'none of them'" and result["replay"]["difference"] is None
