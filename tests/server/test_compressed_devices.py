"""Real devices that compress, one of which is killed again and again: what it computed is folded or kept, and no more."""

from __future__ import annotations

import json
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fedpace.localfleet import LocalFleet
from tests.fleets import QUICK_DEVICE, QUICK_SERVER, wait_for

pytestmark = pytest.mark.slow

APP = Path(__file__).parents[1] / "flower" / "compressed"
DEVICES = ("one", "two", "three")


def app_with_settings(target: Path, more: str = "") -> Path:
    shutil.copytree(APP, target, ignore=shutil.ignore_patterns("__pycache__"))
    with (target / "pyproject.toml").open("a") as file:
        for table, settings in (("server", QUICK_SERVER), ("device", QUICK_DEVICE)):
            file.write(f"\n[tool.fedpace.{table}]\n")
            file.writelines(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
            file.write(more if table == "server" else "")
    return target


def start(tmp_path: Path, strategy: str, rounds: int, pause: float, more: str = "") -> tuple[LocalFleet, Path]:
    found = tmp_path / "found.json"
    fleet = LocalFleet(tmp_path, app_with_settings(tmp_path / "app", more), insecure=True)
    config = f"strategy='{strategy}' rounds={rounds} pause={pause} output='{found}'"
    fleet.start_server("--run-config", config, "--min-nodes", str(len(DEVICES)))
    for name in DEVICES:
        fleet.start_device(name)
    return fleet, found


def joined(fleet: LocalFleet, name: str, times: int) -> bool:
    return fleet.log("server").count(f"{name} joined") == times


@pytest.mark.parametrize("strategy", ["fedbuff", "fedavg"])
def test_nothing_is_lost_by_a_device_that_is_killed(tmp_path: Path, strategy: str) -> None:
    fleet, path = start(tmp_path, strategy, 250 if strategy == "fedbuff" else 150, 0.05)
    with fleet:
        for kill in range(1, 4):
            wait_for(partial(joined, fleet, "two", kill), "the device works")
            time.sleep(0.5 + 0.02 * kill)
            fleet.devices["two"].kill()
            fleet.devices["two"].wait()
            fleet.start_device("two")
        assert fleet.wait(90) == 0, fleet.log("server")
    found: dict[str, Any] = json.loads(path.read_text())
    assert len(found["lost"]) == len(DEVICES), fleet.log("server")[-2000:]
    assert max(found["lost"].values()) < 1e-5
    assert len(found["streams"]) == len(DEVICES), "a device that returns goes on with its residual"
    assert min(found["streams"].values()) >= 5
    assert joined(fleet, "two", 4)


def test_flowers_own_fedavg_gets_plain_arrays(tmp_path: Path) -> None:
    fleet, path = start(tmp_path, "stock", 40, 0.0)
    with fleet:
        assert fleet.wait(60) == 0, fleet.log("server")
    found: dict[str, Any] = json.loads(path.read_text())
    assert found["count"] == 40 and found["distance"] < 0.3
    result = json.loads((fleet.out / "result.json").read_text())
    assert result["updates"]["folded"] == 40 * len(DEVICES)


def test_a_codec_that_the_server_does_not_allow_is_refused_at_the_door(tmp_path: Path) -> None:
    fleet, _ = start(tmp_path, "fedbuff", 5, 0.0, 'codecs = ["topk", "sign"]\n')
    with fleet:
        assert fleet.wait(60) == 1
    wrong = "array 'fedpace.step' of record 'arrays' the codec topk(0.25) >> quantise(8) is not allowed here"
    assert wrong in fleet.log("server") and wrong in fleet.log("one")
