"""Overlap: what was done since is not done again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedpace.errors import ConfigError
from fedpace.strategies.blocks import BLOCK
from fedpace.strategies.compensators import Overlap
from fedpace.strategies.parts import Folding, Vector


def folding(base: Vector, current: Vector, staleness: int = 1) -> Folding:
    return Folding(0, 0, 1.0, staleness, 1.0, base, current, None, 1, 1)


def vector(seed: int, size: int = 2 * BLOCK + 7) -> Vector:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def adjusted(delta: Vector, moved: Vector, part: Overlap | None = None, **changes: Any) -> Vector:
    base = np.zeros_like(delta)
    return (part or Overlap()).adjust(delta.copy(), folding(base, base + moved, **changes), {})


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_what_the_model_has_moved_in_its_direction_is_taken_off(strength: float) -> None:
    moved = vector(1)
    delta = np.float32(0.4) * moved + vector(2)
    share = float(delta @ moved) / float(moved @ moved)
    assert 0.0 < share < 1.0
    found = adjusted(delta, moved, Overlap(strength))
    np.testing.assert_allclose(found, delta - np.float32(strength * share) * moved, rtol=1e-4, atol=1e-5)


def test_no_more_is_taken_off_than_was_moved() -> None:
    moved = vector(1)
    np.testing.assert_allclose(adjusted(3.0 * moved, moved), 2.0 * moved, rtol=1e-5)


def test_devices_that_ask_for_the_same_move_the_model_by_the_root_of_their_number() -> None:
    """Ten, folded one after the other, all begun with one version, ask for a common step and one of their own each."""
    common, own = np.zeros(11, np.float32), np.eye(11, dtype=np.float32)
    common[10] = 1.0
    base: Vector = np.zeros(11, np.float32)
    current = base
    for n in range(10):
        before = current
        current = current + Overlap().adjust(common + own[n], folding(base, current, staleness=n), {})
        assert abs(float((current - before) @ before)) < 1e-4, "a right angle"
    assert 3.0 < current[10] < 4.0, "of the common direction, where without overlap it is ten"


def test_a_change_against_the_movement_and_a_fresh_one_are_left_as_they_are() -> None:
    moved, delta = vector(1), vector(2)
    against = delta if delta @ moved < 0 else -delta
    assert adjusted(against, moved).tobytes() == against.tobytes()
    assert adjusted(moved, moved, staleness=0).tobytes() == moved.tobytes()
    assert adjusted(moved, np.zeros_like(moved)).tobytes() == moved.tobytes()
    assert adjusted(moved, moved, Overlap(0.0)).tobytes() == moved.tobytes()


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_a_strength_out_of_range_is_refused(strength: float) -> None:
    with pytest.raises(ConfigError, match="overlap: strength"):
        Overlap(strength)
