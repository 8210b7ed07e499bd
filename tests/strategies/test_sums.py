"""Changes added up in blocks, on any number of threads: the plain formula, the same bits, and no memory for updates."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpace.strategies import sums
from fedpace.strategies.blocks import all_finite, each
from fedpace.strategies.layout import Layout, Model
from fedpace.strategies.sums import Dense, add_dense, add_vector

law = settings(deadline=None, max_examples=60)
DTYPES = [np.float16, np.float32, np.float32, np.float32, np.float64, np.int64, np.uint8, np.bool_]
shapes = st.lists(st.integers(0, 7), max_size=3).map(tuple)


def numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Any:
    found = np.asarray(100 * rng.random(shape), np.float64)
    return np.asarray(found > 50 if np.dtype(dtype).kind == "b" else found, dtype)


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[Layout, list[Dense]]:
    """A model of any kinds of arrays, and updates of several versions of it; some in columns, some of other dtypes."""
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    kinds = draw(st.lists(st.tuples(st.sampled_from(DTYPES), shapes), min_size=1, max_size=4))
    versions = []
    for _ in range(draw(st.integers(1, 3))):
        arrays = {f"a{i}": Array(np.asarray(numbers(rng, shape, dtype))) for i, (dtype, shape) in enumerate(kinds)}
        versions.append(ArrayRecord(arrays))
    layout = Layout(versions[0])
    models = [Model.of(layout, version) for version in versions]
    updates = []
    for _ in range(draw(st.integers(0, 6))):
        found = {}
        for i, (dtype, shape) in enumerate(kinds):
            wide = draw(st.booleans()) and np.dtype(dtype).kind == "f"
            array = numbers(rng, shape, np.float64 if wide else dtype)
            found[f"a{i}"] = np.asfortranarray(array) if draw(st.booleans()) and array.ndim > 1 else array
        updates.append(Dense(float(rng.random()), found, draw(st.sampled_from(models))))
    return layout, updates


def plain(layout: Layout, updates: list[Dense]) -> Any:
    """The formula, whole and in float64."""
    total = np.zeros(layout.size)
    for update in updates:
        for name, place in layout.places.items():
            change = update.arrays[name].astype(np.float64) - update.model.arrays[name].astype(np.float64)
            total[place] += update.weight * change.reshape(-1)
    return total


@law
@given(cohorts(), st.integers(1, 40), st.integers(1, 4))
def test_a_sum_in_blocks_is_the_plain_formula_and_the_same_bits_on_any_number_of_threads(
    cohort: tuple[Layout, list[Dense]], block: int, threads: int
) -> None:
    layout, updates = cohort
    with patch.object(sums, "BLOCK", block):
        one = layout.zeros()
        add_dense(layout, one, updates, 1)
        many = layout.zeros()
        add_dense(layout, many, updates, threads)
    assert one.tobytes() == many.tobytes()
    kinds = {array.dtype for update in updates for array in (*update.arrays.values(), *update.model.arrays.values())}
    tolerance = 1e-10 if kinds == {np.dtype(np.float64)} else 1e-4  # differences of float32 are taken in float32
    np.testing.assert_allclose(one, plain(layout, updates), rtol=1e-5, atol=tolerance * (1 + len(updates)))


@law
@given(cohorts(), st.data())
def test_updates_of_some_arrays_leave_the_others_alone(cohort: tuple[Layout, list[Dense]], data: st.DataObject) -> None:
    layout, updates = cohort
    kept = data.draw(st.sets(st.sampled_from(sorted(layout.places))))
    parts = [Dense(update.weight, {name: update.arrays[name] for name in kept}, update.model) for update in updates]
    whole, part = layout.zeros(), layout.zeros() + 7
    add_dense(layout, whole, updates)
    add_dense(layout, part, parts)
    for name, place in layout.places.items():
        expected = whole[place] + 7 if name in kept else np.full_like(whole[place], 7)
        np.testing.assert_allclose(part[place], expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_vector_is_added_in_blocks(dtype: Any) -> None:
    rng = np.random.default_rng(1)
    total, vector = rng.random(sums.BLOCK + 5).astype(dtype), rng.random(sums.BLOCK + 5).astype(np.float32)
    expected = total + 0.25 * vector
    add_vector(total, vector, 0.25)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert total.dtype == dtype


def test_every_piece_is_done_once_by_one_of_the_threads() -> None:
    done: list[int] = []
    barrier = threading.Barrier(3, timeout=30)

    def work(mine: Iterator[int]) -> None:
        barrier.wait()
        done.extend(mine)

    each(range(10_000), work, 3)
    assert sorted(done) == list(range(10_000))


@pytest.mark.parametrize("at_fault", [True, False])
def test_what_a_thread_raises_is_raised(at_fault: bool) -> None:
    """Of the one that asked, and of another."""
    here = threading.get_ident()

    def work(mine: Iterator[int]) -> None:
        if (threading.get_ident() == here) is at_fault:
            raise ArithmeticError("no")

    before = threading.active_count()
    with pytest.raises(ArithmeticError, match="no"):
        each(range(10), work, 2)
    assert threading.active_count() == before


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("at", [None, 0, 70_000, 99_999])
def test_numbers_are_looked_at_to_the_last(order: Any, at: int | None) -> None:
    array = np.zeros((1000, 100), np.float32, order=order)
    if at is not None:
        array[np.unravel_index(at, array.shape)] = np.nan
    assert all_finite(array) is (at is None)
