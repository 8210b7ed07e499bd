"""Flower's own kinds of app, as they come, with a thousand devices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.simulations.simulated import APPS, Left, finished

NUMPY, TORCH = APPS / "quickstart_numpy", APPS / "quickstart_torch"
DEVICES = ("--devices", "1000")


def sent_at(left: Left) -> list[float]:
    return [float(at) for at in np.unique(left.trace["sent_seconds"])]


@pytest.mark.parametrize(
    ("app", "accuracy", "better_than"),
    [(NUMPY, "accuracy", 0.5), pytest.param(TORCH, "eval_acc", 0.05, marks=pytest.mark.slow)],
)
def test_a_quickstart(tmp_path: Path, app: Path, accuracy: str, better_than: float) -> None:
    """A NumPyClient and a legacy strategy; the message API. Twenty devices of a thousand train, and evaluate, each round."""
    left = finished(app, tmp_path, *DEVICES)
    result = left.result
    assert result["versions"] == 3 and result["final"][accuracy] > better_than
    assert result["updates"]["received"] == 120 and result["updates"]["folded"] == 60
    assert result["tasks"] == {"sent": 120, "failed": 0, "expired": 0, "cancelled": 0, "computed": 120}
    assert len(sent_at(left)) == 6, "all of a round at once"
    assert 3 < result["virtual_seconds"] < 5, "six times half a second of work, and what it takes to send a small model"
    assert result["wall_seconds"] < 60
    assert len(np.unique(left.trace["node_id"])) > 60


@pytest.mark.slow
@pytest.mark.parametrize("app", [NUMPY, TORCH])
def test_a_quickstart_on_phones(tmp_path: Path, app: Path) -> None:
    """Sessions, drop-outs, failures; and again with another number of workers: the same bits."""
    options = ("--fleet", "flash", "--seed", "3", "--executor", "pool", "--workers")
    one, two = (finished(app, tmp_path / n, *DEVICES, *options, n) for n in ("1", "2"))
    assert one.bits == two.bits and one.result["versions"] == 3
    kinds = [one.trace["kinds"][kind] for kind in one.trace["kind"].tolist()]
    assert {"joined", "left", "replied"} <= set(kinds)
    assert one.result["wall_seconds"] < 60
