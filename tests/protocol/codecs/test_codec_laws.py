"""What every codec keeps: the same bytes again, its text, its error bound, its chain order, and conservation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedpace.errors import ConfigError
from fedpace.protocol.codecs import (
    QSGD,
    Chain,
    Codec,
    Frame,
    Half,
    LowRank,
    Quantise,
    RandomK,
    Raw,
    Sign,
    TopK,
    encode,
    open_frame,
    parse_codec,
)
from fedpace.protocol.codecs.codec import Coder
from tests.generators import law
from tests.protocol.codecs.plain_frames import decode
from tests.protocol.codecs.vectors import codecs, coders, nearest, shapes_of, sparsifiers, square, stochastic, vectors

seeds = st.integers(0, 1 << 64)
EPSILON = float(np.finfo(np.float32).eps)


def sent(codec: Codec, vector: NDArray[np.float32], seed: int = 0) -> Frame:
    return open_frame(encode(codec, vector, seed=seed, shapes=shapes_of(vector.size)), size=vector.size)


@law
@given(codecs, vectors(), seeds)
def test_a_frame_is_its_arguments_and_says_what_it_is(codec: Codec, vector: Any, seed: int) -> None:
    before = vector.copy()
    data = encode(codec, vector, seed=seed, shapes=shapes_of(vector.size))
    assert data == encode(codec, vector, seed=seed, shapes=shapes_of(vector.size))
    assert np.array_equal(vector, before)
    frame = open_frame(memoryview(data), size=vector.size, allowed=[str(codec)])
    assert (frame.codec, frame.size, frame.nbytes) == (str(codec), vector.size, len(data))
    assert parse_codec(frame.codec) == codec
    dense = frame.dense()
    assert dense.dtype == np.float32 and dense.shape == vector.shape and np.isfinite(dense).all()


@law
@given(codecs, vectors(400), seeds)
def test_a_reader_written_from_the_document_finds_the_same(codec: Codec, vector: Any, seed: int) -> None:
    data = encode(codec, vector, seed=seed, shapes=shapes_of(vector.size))
    dense = open_frame(data, size=vector.size).dense()
    largest = float(np.abs(dense).max(initial=0))
    np.testing.assert_allclose(dense, decode(data), rtol=1e-5, atol=1e-5 * largest)


@law
@given(nearest | st.builds(TopK, st.floats(1e-3, 1)) | st.builds(LowRank, st.integers(1, 3)), vectors())
def test_the_error_is_within_the_bound(codec: Codec, vector: Any) -> None:
    error = square(sent(codec, vector).dense().astype(np.float64) - vector)
    bound = 1.0 if isinstance(codec, LowRank) else codec.error_bound(vector.size)  # its bound is an expectation
    assert error <= square(vector) * (bound + 1e-6)


@law
@given(st.builds(TopK, st.floats(1e-3, 1)), nearest, vectors())
def test_the_error_of_a_chain_is_within_its_bound(first: TopK, then: Coder, vector: Any) -> None:
    error = square(sent(first >> then, vector).dense().astype(np.float64) - vector)
    assert error <= square(vector) * ((first >> then).error_bound(vector.size) + 1e-6)


@pytest.mark.parametrize("size", [5, 1000])
@pytest.mark.parametrize(
    "text",
    [
        "randomk(0.1)",
        "randomk(0.1, scaled=true)",
        "quantise(4, rounding=stochastic)",
        "quantise(1, rounding=stochastic, chunk=32)",
        "qsgd(1)",
        "qsgd(20)",
        "randomk(0.1) >> quantise(8)",
        "randomk(0.2, scaled=true) >> qsgd(4, chunk=32)",
        "topk(0.2) >> quantise(4, rounding=stochastic, chunk=32)",
    ],
)
def test_the_mean_error_over_seeds_is_within_the_bound(text: str, size: int) -> None:
    codec = parse_codec(text)
    vector = np.random.default_rng(1).standard_normal(size).astype(np.float32) ** 3
    errors = [square(sent(codec, vector, seed).dense() - vector) for seed in range(300)]
    assert np.mean(errors) - 4 * np.std(errors) / 300**0.5 <= codec.error_bound(size) * square(vector)


@pytest.mark.parametrize(
    "text",
    [
        "raw",
        "quantise(8, rounding=stochastic)",
        "quantise(4, rounding=stochastic, chunk=32)",
        "quantise(1, rounding=stochastic)",
        "qsgd(1)",
        "qsgd(7)",
        "qsgd(100)",
        "randomk(0.13, scaled=true)",
        "randomk(0.3, scaled=true) >> quantise(8, rounding=stochastic)",
        "randomk(0.3, scaled=true) >> qsgd(2, chunk=32)",
    ],
)
def test_unbiased_codecs_are_right_on_average(text: str) -> None:
    codec = parse_codec(text)
    assert codec.unbiased
    vector = np.random.default_rng(2).standard_normal(150).astype(np.float32)
    samples = 4000
    total, squares = np.zeros(150), np.zeros(150)
    for seed in range(samples):
        dense = sent(codec, vector, seed).dense().astype(np.float64)
        total += dense
        squares += dense**2
    mean = total / samples
    spread = np.sqrt(np.maximum(squares / samples - mean**2, 0) / samples)
    # 150 numbers at 5 standard errors: one in 10,000 such tests would fail by chance, and this one has fixed seeds.
    assert (np.abs(mean - vector) <= 5 * spread + 1e-6).all()
    # The errors, all of one sign, would not cancel in a sum either.
    assert abs((mean - vector).sum()) <= 5 * np.sqrt((spread**2).sum()) * 3 + 1e-4


@law
@given(stochastic, vectors(), seeds)
def test_stochastic_rounding_goes_to_a_neighbour(codec: Any, vector: Any, seed: int) -> None:
    dense = sent(codec, vector, seed).dense()
    levels = codec.levels
    for start in range(0, vector.size, codec.chunk):
        part, found = vector[start : start + codec.chunk], dense[start : start + codec.chunk]
        largest = float(np.abs(part).max())
        scale = square(part) ** 0.5 if isinstance(codec, QSGD) else largest
        step = scale * (2 if isinstance(codec, Quantise) and codec.bits == 1 else 1) / levels
        assert (np.abs(part - found) <= step * (1 + 1e-4) + 2.0**-99).all()


@law
@given(st.builds(Quantise, st.sampled_from([8, 4]), chunk=st.sampled_from([32, 1024])), vectors())
def test_nearest_rounding_is_within_half_a_step_and_nearer_than_zero(codec: Quantise, vector: Any) -> None:
    error = np.abs(sent(codec, vector).dense().astype(np.float64) - vector)
    assert (error <= np.abs(vector) * (1 + 4 * EPSILON)).all()
    for start in range(0, vector.size, codec.chunk):
        here = slice(start, start + codec.chunk)
        assert error[here].max() <= np.abs(vector[here]).max() / (2 * codec.levels) * (1 + 1e-4)


@law
@given(vectors())
def test_half_is_within_its_relative_error(vector: Any) -> None:
    largest = float(np.abs(vector).max(initial=0))
    error = np.abs(sent(Half("bfloat16"), vector).dense().astype(np.float64) - vector)
    assert (error <= np.maximum(2.0**-8 * np.abs(vector.astype(np.float64)), 2.0**-134)).all()
    error = np.abs(sent(Half("float16"), vector).dense().astype(np.float64) - vector)
    assert (error <= np.maximum(2.0**-11 * np.abs(vector.astype(np.float64)), 2.0**-39 * largest)).all()


@law
@given(vectors())
def test_raw_is_exact_and_sign_is_the_mean_magnitude(vector: Any) -> None:
    assert np.array_equal(sent(Raw(), vector).dense(), vector)
    if vector.size:
        mean = np.abs(vector).mean(dtype=np.float64)
        np.testing.assert_allclose(sent(Sign(), vector).dense(), np.where(vector >= 0, mean, -mean), rtol=1e-6)


@law
@given(st.floats(1e-3, 1), vectors())
def test_top_k_is_exact_and_the_first_of_equal_ones(fraction: float, vector: Any) -> None:
    codec = TopK(fraction)
    few = sent(codec, vector).sparse
    assert few is not None
    indices, numbers = few
    expected = np.sort(np.argsort(-np.abs(vector), kind="stable")[: codec.kept(vector.size)])
    assert np.array_equal(indices, expected) and np.array_equal(numbers, vector[expected])
    residual = vector - sent(codec, vector).dense()
    assert np.array_equal(residual + sent(codec, vector).dense(), vector)  # nothing is lost, to the bit


def test_top_k_of_a_vector_that_no_sample_resembles() -> None:
    """A sample of every fourth number sees none of the large ones, or only those."""
    unseen = np.zeros(1 << 18, np.float32)
    unseen[1::4] = np.arange(1 << 16)
    alone = np.linspace(0, 1, 1 << 18, dtype=np.float32)
    alone[::4] += 2
    for vector in (unseen, alone):
        for fraction in (1e-5, 1e-3, 0.2, 0.5, 0.99):
            few = sent(TopK(fraction), vector).sparse
            assert few is not None
            count = round(fraction * vector.size)
            assert np.array_equal(few[0], np.sort(np.argsort(-vector, kind="stable")[:count]))


def test_random_rounding_never_leaves_the_levels() -> None:
    """In float32 the largest of a chunk may be a little more than 127 steps, and a draw may be next to 1."""
    tried = np.linspace(1, 2, 1000, dtype=np.float32)
    beyond = tried[tried * (np.float32(127) / tried) > 127]
    vector = np.full(4_000_000, beyond[0])
    np.testing.assert_allclose(sent(Quantise(8, "stochastic"), vector).dense(), beyond[0], rtol=1e-2)


@law
@given(codecs, vectors(), seeds)
def test_what_is_sent_and_what_is_left_make_the_vector(codec: Codec, vector: Any, seed: int) -> None:
    decoded = sent(codec, vector, seed).dense()
    residual = vector - decoded
    scale = float(np.abs(vector).max(initial=0) + np.abs(decoded).max(initial=0))
    np.testing.assert_allclose(decoded + residual, vector, rtol=0, atol=4 * EPSILON * scale)


@law
@given(sparsifiers, coders, vectors(), seeds)
def test_a_chain_is_its_first_stage_then_its_second(first: Any, then: Coder, vector: Any, seed: int) -> None:
    few, alone = sent(first >> then, vector, seed).sparse, sent(first, vector, seed).sparse
    assert few is not None and alone is not None
    assert np.array_equal(few[0], alone[0])
    kept = vector[alone[0]]
    gains = np.ones(kept.size)
    if isinstance(first, RandomK) and first.scaled:
        bounds = np.arange(kept.size + 1) * vector.size // max(1, kept.size)
        gains = np.diff(bounds)
    np.testing.assert_allclose(few[1], sent(then, kept, seed).dense() * gains, rtol=1e-6)


@law
@given(coders, codecs)
def test_only_a_coder_follows_and_only_a_reducer(first: Coder, other: Codec) -> None:
    with pytest.raises(ConfigError, match="cannot follow"):
        _ = first >> other
    with pytest.raises(ConfigError, match="cannot follow"):
        _ = TopK(0.1) >> LowRank(2)
    with pytest.raises(ConfigError, match="cannot follow"):
        _ = TopK(0.1) >> Half() >> Sign()
    assert TopK(0.1) >> Raw() == TopK(0.1) and isinstance(TopK(0.1) >> Half(), Chain)


@law
@given(codecs, vectors(), seeds, st.floats(-3, 3), st.sampled_from([np.float32, np.float64]))
def test_adding_is_adding_the_dense_vector(codec: Codec, vector: Any, seed: int, weight: float, dtype: Any) -> None:
    frame = sent(codec, vector, seed)
    before = np.linspace(-1, 1, vector.size).astype(dtype)
    total = before.copy()
    frame.add_to(total, weight)
    dense = frame.dense()
    scale = float(np.abs(dense).max(initial=1))
    np.testing.assert_allclose(total, before + weight * dense.astype(np.float64), rtol=1e-5, atol=1e-5 * scale)
    if few := frame.sparse:
        untouched = np.ones(vector.size, bool)
        untouched[few[0]] = False
        assert np.array_equal(total[untouched], before[untouched])
        assert (np.diff(few[0]) > 0).all() and few[0].dtype == np.int64 and few[1].dtype == np.float32
    ones = np.zeros(vector.size, dtype)
    frame.add_to(ones)
    assert np.array_equal(ones, dense)


def test_the_random_places_are_even() -> None:
    codec, size, hits = RandomK(0.1), 103, np.zeros(103)
    for seed in range(5000):
        few = sent(codec, np.ones(size, np.float32), seed).sparse
        assert few is not None
        hits[few[0]] += 1
    lengths = np.diff(np.arange(11) * size // 10).repeat(np.diff(np.arange(11) * size // 10))
    assert (np.abs(hits - 5000 / lengths) < 5 * np.sqrt(5000 / lengths)).all()


def test_frames_are_small() -> None:
    vector = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    alone = len(encode(TopK(0.01) >> Quantise(4), vector, seed=0))
    assert alone <= 11 + 2 + 54 + 4 + 25  # head, of the indices, 50 of them at 8.5 bits, a scale, 50 codes
    assert len(encode(Quantise(8), vector[:0], seed=0)) <= 12


@pytest.mark.parametrize("text", ["topk(0.01) >> quantise(4)", "qsgd(5)", "lowrank(2)", "half(bfloat16)", "sign"])
def test_large_vectors_take_the_same_path_as_small_ones(text: str) -> None:
    """More than one block of work, and a last one that is not whole."""
    size = 200_003
    vector = np.random.default_rng(3).standard_normal(size).astype(np.float32)
    codec = parse_codec(text)
    data = encode(codec, vector, seed=1, shapes=[(400, 500), (3,)])
    np.testing.assert_allclose(open_frame(data, size=size).dense(), decode(data), rtol=1e-4, atol=1e-5)
