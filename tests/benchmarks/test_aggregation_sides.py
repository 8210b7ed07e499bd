"""The sides of the benchmark of aggregation make the same of the same updates, and leave them where they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import aggregation
from benchmarks.engines import aggregation as engine

COUNT, NUMBERS = 7, 1000


@pytest.fixture
def updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (aggregation, engine):
        monkeypatch.setattr(module, "NUMBERS", NUMBERS)
    monkeypatch.setattr(aggregation, "UPDATES", COUNT)
    sizes = aggregation.write_updates(tmp_path)
    assert sizes["topk"] < sizes["8bit"] < sizes["dense"]
    return tmp_path


def test_sides_agree(updates: Path) -> None:
    dense: list[Any] = [update.arrays("arrays")[engine.NAME] for update in engine.stored(updates / "dense")]
    mean = np.average(dense, axis=0, weights=engine.weights_of(COUNT))
    for kind, side, tolerance in [
        ("dense", "fedpace", 1e-6),
        ("dense", "flower", 1e-6),
        ("dense", "flower, 10 arrays", 1e-6),
        ("dense", "numpy", 1e-6),
        ("8bit", "fedpace", 0.02),
    ]:
        found = engine.SIDES[side](engine.stored(updates / kind))()
        assert found is not None
        whole = np.concatenate([array.numpy().reshape(-1) for array in found.values()])
        np.testing.assert_allclose(whole, mean, atol=tolerance)
    kept = engine.SIDES["fedpace"](engine.stored(updates / "topk"))()
    assert kept is not None and 10 <= np.count_nonzero(kept[engine.NAME].numpy()) <= 10 * COUNT
