"""Clip: no change is longer than is usual."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpace.errors import ConfigError
from fedpace.strategies.blocks import BLOCK
from fedpace.strategies.compensators import CachedCalibration, Clip
from fedpace.strategies.parts import Folding, Vector


def folding(row: int, size: int) -> Folding:
    zero = np.zeros(size, np.float32)
    return Folding(0, row, 1.0, 0, 1.0, zero, zero, None, 1, 10)


def clipped(part: Clip, delta: Vector, memory: dict[str, Any]) -> Vector:
    return part.adjust(delta.copy(), folding(0, len(delta)), memory)


def directions(seed: int, count: int, size: int) -> list[Vector]:
    """Of length 1."""
    drawn = np.random.default_rng(seed).standard_normal((count, size)).astype(np.float32)
    return list(drawn / np.linalg.norm(drawn, axis=1, keepdims=True))


@given(
    lengths=st.lists(st.floats(0.0, 100.0, width=32), min_size=1, max_size=20),
    quantile=st.floats(0.0, 1.0),
    window=st.integers(1, 8),
)
@settings(max_examples=50, deadline=None)
def test_nothing_is_longer_than_the_quantile_of_the_last(lengths: list[float], quantile: float, window: int) -> None:
    """Directions stay, and what is no longer than that stays as it is."""
    part, memory = Clip(quantile, window), dict[str, Any]()
    for n, (length, direction) in enumerate(zip(lengths, directions(1, len(lengths), 30), strict=True)):
        delta = np.float32(length) * direction
        bound = float(np.quantile(lengths[max(0, n + 1 - window) : n + 1], quantile))
        found = clipped(part, delta, memory)
        np.testing.assert_allclose(found, min(length, bound) * direction, rtol=1e-4, atol=1e-5)
        if length < 0.999 * bound:
            assert found.tobytes() == delta.tobytes()


def test_a_change_of_several_blocks_has_one_length() -> None:
    part, memory = Clip(0.0), dict[str, Any]()
    first, second = directions(1, 2, 2 * BLOCK + 7)
    clipped(part, first, memory)
    np.testing.assert_allclose(clipped(part, np.float32(5.0) * second, memory), second, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize(("dtype", "long"), [(np.float32, 1e30), (np.float64, 1e140), (np.float64, 1e200)])
def test_lengths_that_a_type_cannot_square_are_clipped(dtype: type, long: float) -> None:
    part, memory = Clip(0.0), dict[str, Any]()
    unit = np.eye(1, 4, dtype=dtype)[0]
    clipped(part, unit, memory)
    found = clipped(part, dtype(long) * unit, memory)
    assert 0.0 <= np.linalg.norm(found) <= 1.00001


def test_behind_the_cache_the_bias_of_clipping_vanishes() -> None:
    """Two devices that always ask for the same, one of them ten times as loudly: by clipping alone it is never heard in
    full, behind the cache it is. (After Clip21, section 3.)"""
    asked = [np.array([10.0, 0.0], np.float32), np.array([0.0, 1.0], np.float32)]
    cache, clip = CachedCalibration(quantisation=None), Clip(0.5)

    def step(parts: list[Any], memories: list[dict[str, Any]]) -> Vector:
        total = np.zeros(2, np.float32)
        folded = [Folding(row, row, 0.5, 0, 1.0, total, total, None, 2, 2) for row in range(2)]
        for update in folded:
            delta = asked[update.row].copy()
            for part, memory in zip(parts, memories, strict=True):
                delta = part.adjust(delta, update, memory)
            total = total + np.float32(update.weight) * delta
        for part, memory in zip(parts, memories, strict=True):
            total = part.finish(total, folded, memory)
        return total

    truth = (asked[0] + asked[1]) / 2
    for parts, is_heard in (([clip], False), ([cache, clip], True)):
        memories: list[dict[str, Any]] = [{} for _ in parts]
        for _ in range(50):
            found = step(parts, memories)
        assert np.allclose(found, truth, atol=1e-4) == is_heard


@pytest.mark.parametrize(
    ("given", "named"),
    [({"quantile": -0.1}, "quantile"), ({"quantile": float("nan")}, "quantile"), ({"window": 0}, "window")],
)
def test_a_number_out_of_range_is_refused(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"clip: {named}"):
        Clip(**given)
