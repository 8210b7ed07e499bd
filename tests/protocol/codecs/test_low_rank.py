"""PowerSGD: products that come near, a start that is remembered, and arrays that stay as they are."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedpace.protocol.codecs import Half, LowRank, encode, open_frame
from fedpace.protocol.codecs.lowrank import MEMORY
from tests.generators import law
from tests.protocol.codecs.vectors import square

Array = NDArray[np.float32]


def matrix(rows: int, columns: int, rank: int, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    factors = rng.standard_normal((rows, rank)), rng.standard_normal((rank, columns))
    return (factors[0] @ factors[1]).astype(np.float32)


def sent(codec: LowRank, array: Array, seed: int, memory: dict[str, Array] | None = None) -> Array:
    data = encode(codec, array.ravel(), seed=seed, shapes=[array.shape], memory=memory)
    return open_frame(data, size=array.size).dense().reshape(array.shape)


@law
@given(st.integers(1, 3), st.integers(0, 99), st.sampled_from([0, 60, -60]))
def test_a_matrix_of_that_rank_comes_back(rank: int, seed: int, exponent: int) -> None:
    array = matrix(30, 20, rank, seed) * np.float32(2.0**exponent)
    np.testing.assert_allclose(sent(LowRank(rank), array, seed), array, atol=1e-2 * np.abs(array).max())


def test_remembering_comes_as_near_as_the_best_of_that_rank() -> None:
    rng = np.random.default_rng(1)
    array = rng.standard_normal((60, 40)).astype(np.float32) * np.linspace(3, 0.1, 40, dtype=np.float32)
    best = square(np.linalg.svd(array, compute_uv=False)[4:])
    memory: dict[str, Array] = {}
    errors = [square(array - sent(LowRank(4), array, step, memory)) for step in range(30)]
    forgetful = [square(array - sent(LowRank(4), array, step)) for step in range(30)]
    assert errors[-1] < best * 1.01 and np.mean(forgetful) > best * 1.1
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))
    assert memory[MEMORY].shape == (160,)


def test_a_memory_that_catches_nothing_or_is_of_another_model_is_replaced() -> None:
    array = np.zeros((60, 10), np.float32)
    array[:, 0] = 1
    blind = np.zeros((10, 2), np.float32)
    blind[1, 0] = blind[2, 1] = 1  # at right angles to every row
    for start in (blind.ravel(), np.full(20, np.nan, np.float32), np.ones(7, np.float32)):
        memory = {MEMORY: start}
        np.testing.assert_allclose(sent(LowRank(2), array, 0, memory), array, atol=1e-5)
        assert memory[MEMORY].shape == (20,) and np.isfinite(memory[MEMORY]).all()


@pytest.mark.parametrize("rank", [1, 4])
def test_the_mean_error_over_random_starts_is_within_the_bound(rank: int) -> None:
    array = np.random.default_rng(2).standard_normal((12, 30)).astype(np.float32)
    errors = [square(array - sent(LowRank(rank), array, seed)) for seed in range(200)]
    assert max(errors) <= square(array) * (1 + 1e-6)
    assert np.mean(errors) <= square(array) * (1 - 1 / 12)
    assert np.mean(errors) <= square(array) * LowRank(rank).error_bound(array.size)


def test_halves_of_the_factors_keep_their_bound() -> None:
    array = np.random.default_rng(4).standard_normal((40, 30)).astype(np.float32)
    for codec in (LowRank(1) >> Half(), LowRank(3) >> Half("bfloat16")):
        errors = []
        for seed in range(100):
            data = encode(codec, array.ravel(), seed=seed, shapes=[array.shape])
            errors.append(square(array.ravel() - open_frame(data, size=array.size).dense()))
        assert codec.contractive and np.mean(errors) <= square(array) * codec.error_bound(array.size) < square(array)


def test_a_model_keeps_its_small_arrays_to_the_bit() -> None:
    shapes = [(5,), (16, 3, 3, 3), (16,), (), (2, 2), (10, 400), (10,)]
    sizes = [int(np.prod(shape)) for shape in shapes]
    vector = np.random.default_rng(3).standard_normal(sum(sizes)).astype(np.float32)
    data = encode(LowRank(2), vector, seed=0, shapes=shapes)
    decoded = open_frame(data, size=vector.size).dense()
    starts = np.cumsum([0, *sizes])
    same = [np.array_equal(vector[a:b], decoded[a:b]) for a, b in pairwise(starts)]
    assert same == [True, False, True, True, True, False, True]
    assert len(data) < 4 * (2 * (16 + 27 + 10 + 400) + 36) + 30


def test_a_zero_matrix_and_halves() -> None:
    assert not sent(LowRank(3), np.zeros((8, 9), np.float32), 0).any()
    array = matrix(40, 30, 2, 5) * np.float32(1e-6)  # both factors are written at one magnitude, so halves hold them
    data = encode(LowRank(2) >> Half(), array.ravel(), seed=0, shapes=[array.shape])
    decoded = open_frame(data, size=array.size).dense().reshape(array.shape)
    assert square(array - decoded) < 1e-5 * square(array)
