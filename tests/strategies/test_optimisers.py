"""Server optimisers give Flower's numbers, and the streaming mean is the mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpace.errors import ConfigError
from fedpace.strategies.blocks import BLOCK, blocks
from fedpace.strategies.folders import Mean
from fedpace.strategies.optimisers import SGD, Adagrad, Adam, Momentum, Yogi
from fedpace.strategies.parts import Folder, Optimiser, Vector

EVERY: list[Optimiser] = [SGD(0.5), Momentum(), Adam(), Yogi(), Adagrad()]


def record(vector: Vector) -> ArrayRecord:
    return ArrayRecord({"w": Array(vector)})


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (SGD(0.7), lambda: FedAvgM(server_learning_rate=0.7)),
        (Momentum(0.7, 0.6), lambda: FedAvgM(server_learning_rate=0.7, server_momentum=0.6)),
        (Momentum(1.0, 0.9), lambda: FedAvgM(server_momentum=0.9)),
        (Adam(), FedAdam),
        (Adam(0.03, 0.5, 0.8, 0.1), lambda: FedAdam(eta=0.03, beta_1=0.5, beta_2=0.8, tau=0.1)),
        (Yogi(), FedYogi),
        (Yogi(0.03, 0.5, 0.8, 0.1), lambda: FedYogi(eta=0.03, beta_1=0.5, beta_2=0.8, tau=0.1)),
        (Adagrad(), FedAdagrad),
        (Adagrad(0.3, 0.05), lambda: FedAdagrad(eta=0.3, tau=0.05)),
    ],
)
def test_the_numbers_are_flowers(ours: Optimiser, theirs: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's own aggregate_train after its averaging, beside our step, for rounds of a random walk."""
    monkeypatch.setattr(FedAvg, "aggregate_train", lambda self, server_round, averaged: (averaged, None))
    rng = np.random.default_rng(7)
    expected: Vector = rng.standard_normal(BLOCK + 5).astype(np.float32)
    found, memory, strategy = expected.copy(), dict[str, Any](), theirs()
    for server_round in range(1, 9):
        change = (rng.standard_normal(len(found)) * rng.choice([1e-4, 0.1, 3.0], len(found))).astype(np.float32)
        if not isinstance(strategy, FedAvgM):
            strategy.current_arrays = {"w": expected}
        elif server_round == 1:
            strategy.current_arrays = record(expected)
        result, _ = strategy.aggregate_train(server_round, record(expected + change))
        change = ((expected + change) - expected).astype(np.float32)  # as Flower sees it; its FedAdam makes it float64
        found = found + ours.step(change, memory, server_round)
        expected = result["w"].numpy()
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_sgd_of_one_is_federated_averaging() -> None:
    change = np.arange(5, dtype=np.float32)
    assert SGD().step(change.copy(), {}, 1).tobytes() == change.tobytes()


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(EVERY),
    st.lists(st.lists(st.floats(-(2.0**50), 2.0**50, width=32), min_size=3, max_size=3), min_size=1, max_size=6),
)
def test_steps_are_finite_and_zero_changes_nothing_at_first(optimiser: Optimiser, changes: list[list[float]]) -> None:
    zero = np.zeros(3, np.float32)
    assert not optimiser.step(zero, {}, 1).any()
    memory: dict[str, Any] = {}
    for step, change in enumerate(changes, start=1):
        moved = optimiser.step(np.array(change, np.float32), memory, step)
        assert moved.shape == (3,) and np.isfinite(moved).all()
        assert not any(np.shares_memory(moved, kept) for kept in memory.values())


@pytest.mark.parametrize(
    "make",
    [
        lambda: SGD(0.0),
        lambda: Momentum(momentum=1.0),
        lambda: Adam(beta_2=-0.1),
        lambda: Yogi(tau=0.0),
        lambda: Adagrad(lr=float("nan")),
        lambda: Mean(against="last"),
    ],
)
def test_numbers_out_of_range_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ConfigError, match="choose"):
        make()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1, 5, BLOCK, 2 * BLOCK + 3])
def test_the_mean_is_the_weighted_sum_and_leaves_changes_alone(size: int, dtype: type) -> None:
    rng = np.random.default_rng(size)
    folder: Folder = Mean()
    weights = rng.random(7) / 7
    changes: list[Vector] = [rng.standard_normal(size).astype(dtype) for _ in weights]
    for change in changes:
        change.flags.writeable = False
    found = folder.fold(iter(zip(weights.tolist(), changes, strict=True)), np.empty(size, dtype))
    assert found.dtype == dtype and folder.needs == "sums" and folder.against == "base"
    np.testing.assert_allclose(found, weights @ np.array(changes, np.float64), rtol=1e-5, atol=1e-5)
    assert not folder.fold(iter(()), found).any()


@given(st.integers(0, 4 * BLOCK))
@settings(max_examples=20, deadline=None)
def test_blocks_cover_everything_once(size: int) -> None:
    assert [i for block in blocks(size) for i in (block.start, block.stop)][1:-1:2] == list(range(BLOCK, size, BLOCK))
    assert sum(block.stop - block.start for block in blocks(size)) == size
