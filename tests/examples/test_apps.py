"""The example apps: Flower accepts them, the digits are shared out as said, and the model they teach can be learned."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.common.config import get_project_config, validate_config
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
APPS = sorted(path.parent for room in ("examples", "tests/flower") for path in (ROOT / room).glob("*/pyproject.toml"))
DIGITS = ROOT / "examples" / "digits"


@pytest.fixture(scope="module")
def digits() -> Iterator[ModuleType]:
    """digits.task, imported as Flower does: with the app's folder first on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DIGITS)
        yield importlib.import_module("digits.task")


@pytest.mark.parametrize("app", APPS, ids=lambda app: app.name)
def test_flower_accepts_the_app(app: Path) -> None:
    config = get_project_config(app)
    assert validate_config(config, check_module=True, project_dir=app) == (True, [], [])
    assert build_fab_from_disk(app)


@settings(deadline=None)
@given(num_partitions=st.integers(1, 360), alpha=st.floats(0.01, 100), seed=st.integers(0, 2**32 - 1))
def test_every_digit_is_in_one_partition_and_no_partition_is_too_small(
    digits: ModuleType, num_partitions: int, alpha: float, seed: int
) -> None:
    labels = digits.load_split()[0][1].numpy()
    partitions = digits.dirichlet_partition(labels, num_partitions, alpha=alpha, seed=seed)
    assert np.array_equal(np.sort(np.concatenate(partitions)), np.arange(len(labels)))
    assert min(map(len, partitions)) >= min(10, len(labels) // num_partitions)
    again = digits.dirichlet_partition(labels, num_partitions, alpha=alpha, seed=seed)
    assert all(map(np.array_equal, partitions, again))


def test_a_small_alpha_skews_labels_and_a_large_one_does_not(digits: ModuleType) -> None:
    def largest_label_share(alpha: float) -> float:
        parts = [digits.load_partition(i, 8, alpha=alpha, seed=0)[0][1] for i in range(8)]
        return float(np.mean([labels.bincount(minlength=10).max() / len(labels) for labels in parts]))

    assert largest_label_share(0.05) > 0.4
    assert largest_label_share(1000) < 0.15


@pytest.mark.parametrize("partition", [-1, 8])
def test_a_partition_that_is_not_there_is_refused(digits: ModuleType, partition: int) -> None:
    with pytest.raises(ValueError, match="partition-id is"):
        digits.load_partition(partition, 8, alpha=0.3, seed=0)


def test_a_strategy_that_is_not_there_is_refused_with_those_that_are(digits: ModuleType) -> None:
    strategy_class = importlib.import_module("digits.server_app").strategy_class
    assert strategy_class("Paced").__module__.startswith("fedpace.")
    assert strategy_class("flwr:FedAdam").__module__.startswith("flwr.")
    for name in ("FedSomething", "flwr:QFedAvg", "flwr:FedXgbBagging"):
        with pytest.raises(ValueError, match=rf"{name}.*FedAdam, FedAsync, FedAvg,"):
            strategy_class(name)


def test_the_model_is_learned_centrally() -> None:
    command = [sys.executable, "-m", "digits.central"]
    done = subprocess.run(
        command, cwd=DIGITS, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True, timeout=100
    )
    assert json.loads(done.stdout)["accuracy"] >= 0.96


def test_the_numpy_app_does_without_torch() -> None:
    code = "import sys, numpy_only.client_app, numpy_only.server_app; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "examples" / "numpy-only", check=True, timeout=60)
