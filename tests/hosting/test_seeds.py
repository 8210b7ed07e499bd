"""Seeds: each purpose, node and task has its own, the same one every time."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpace.hosting.seeds import derive_seed, seed_globals
from tests.generators import law

sources = st.tuples(
    st.integers(0, 1 << 64), st.sampled_from(["clientapp", "serverapp"]), st.lists(st.integers(0, 1 << 64))
)


@law
@given(st.lists(sources, min_size=2, max_size=20, unique_by=str))
def test_seeds_differ_and_are_stable(given: list[tuple[int, str, list[int]]]) -> None:
    seeds = [derive_seed(seed, purpose, *ids) for seed, purpose, ids in given]
    assert len(set(seeds)) == len(seeds)
    assert seeds == [derive_seed(seed, purpose, *ids) for seed, purpose, ids in given]
    assert all(0 <= seed < 1 << 64 for seed in seeds)


def test_a_seed_is_the_same_on_every_machine() -> None:
    assert derive_seed(7, "clientapp", 1, 2) == 0xE8CF1FF909D4FA6C


@pytest.mark.parametrize("seed", [0, 1, (1 << 64) - 1])
def test_global_generators_repeat(seed: int) -> None:
    torch = pytest.importorskip("torch")

    def draw() -> list[Any]:
        return [random.random(), np.random.random(), torch.rand(2)[1].item()]

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        seed_globals(seed)
        first, second = draw(), draw()
        seed_globals(seed)
        assert draw() == first and draw() == second != first
        seed_globals(seed ^ 1)
        assert all(one != other for one, other in zip(draw(), first, strict=True))
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
