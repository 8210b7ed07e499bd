"""Simulated devices that compress, drop out and fail: nothing of what they computed is lost, and it can be repeated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.simulations.simulated import UNEVEN, Left, finished

APP = Path(__file__).parents[1] / "flower" / "compressed"


def run(folder: Path, strategy: str, *options: str) -> tuple[Left, dict[str, Any]]:
    folder.mkdir()
    (folder / "fleet.toml").write_text(UNEVEN)
    config = f"strategy='{strategy}' output='{folder / 'found.json'}' rounds=40 devices=6"
    fleet = ("--devices", "6", "--fleet", str(folder / "fleet.toml"), "--seed", "3")
    left = finished(APP, folder / "out", *fleet, "--run-config", config, *options)
    return left, json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("strategy", ["fedbuff", "fedavg"])
def test_what_was_computed_is_folded_kept_or_unsettled(tmp_path: Path, strategy: str) -> None:
    left, found = run(tmp_path / "one", strategy)
    assert left.result["tasks"]["failed"] > 3
    assert len(found["lost"]) >= 3 and max(found["lost"].values()) < 1e-5
    assert sum(found["streams"].values()) == left.result["updates"]["folded"]
    again, _ = run(tmp_path / "two", strategy, "--executor", "pool", "--workers", "2")
    assert again.bits == left.bits


def test_flowers_own_fedavg_sees_plain_arrays(tmp_path: Path) -> None:
    left, found = run(tmp_path / "one", "stock")
    assert found["distance"] < 0.6
    assert left.result["updates"]["folded"] > 40
