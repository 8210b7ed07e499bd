"""Compensators: their formulas beside a few lines from the papers, and what the cache promises after any sequence."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedpace.errors import ConfigError
from fedpace.strategies.blocks import BLOCK
from fedpace.strategies.compensators.cached import CHUNK, CachedCalibration
from fedpace.strategies.compensators.control import ControlVariates
from fedpace.strategies.compensators.delay import DelayCompensation
from fedpace.strategies.compensators.overlap import Overlap
from fedpace.strategies.parts import Compensator, ControlCompensator, Folding, Vector

DEVICES = 6
ALL: list[Compensator] = [DelayCompensation(), CachedCalibration(), ControlVariates(), Overlap()]


def folding(row: int, weight: float = 1.0, size: int = 3, **given: Any) -> Folding:
    zero = np.zeros(size, np.float32)
    values: dict[str, Any] = {"base": zero, "current": zero, "extra": None, "staleness": 0, "devices": DEVICES}
    values.update(given)
    return Folding(task=row, row=row, weight=weight, steps=5.0, count=1, **values)


def fold(
    compensator: Compensator, deltas: Sequence[tuple[int, Vector]], memory: dict[str, Any], **given: Any
) -> Vector:
    """A whole fold with equal weights: what the model moves by."""
    foldings = [folding(row, 1 / len(deltas), len(delta), **given) for row, delta in deltas]
    step = np.zeros_like(deltas[0][1])
    for (_, delta), update in zip(deltas, foldings, strict=True):
        step += np.float32(update.weight) * compensator.adjust(delta.copy(), update, memory)
    return compensator.finish(step, foldings, memory)


def vectors(seed: int, count: int, size: int = 40) -> list[Vector]:
    return list(np.random.default_rng(seed).standard_normal((count, size)).astype(np.float32))


# ------------------------------------------------------------ delay compensation


def stale(current: Vector, base: Vector) -> Folding:
    return folding(0, size=len(current), current=current, base=base, staleness=2)


@pytest.mark.parametrize("size", [4, BLOCK + 7])
def test_delay_compensation_with_a_constant_lambda(size: int) -> None:
    """Zheng et al. 2017, eq. 10: g(w_t) + lambda * g(w_t) * g(w_t) * (w_{t+tau} - w_t)."""
    delta, now, old = vectors(1, 3, size)
    g = -delta
    expected = g + 0.04 * g * g * (now - old)
    part = DelayCompensation(0.04, adaptive=False, bound=np.inf)
    np.testing.assert_allclose(-part.adjust(delta.copy(), stale(now, old), {}), expected, rtol=1e-5, atol=1e-6)


def test_delay_compensation_with_an_adaptive_lambda() -> None:
    """DC-ASGD-a: lambda_t = lambda_0 / sqrt(MeanSquare(t)), MeanSquare(t) = m MeanSquare(t-1) + (1-m) g^2."""
    part, memory, mean_square = DelayCompensation(2.0, momentum=0.9, bound=np.inf), dict[str, Any](), None
    for seed in range(5):
        delta, now, old = vectors(seed, 3)
        g = -delta
        mean_square = g**2 if mean_square is None else 0.9 * mean_square + 0.1 * g**2
        expected = g + 2.0 / np.sqrt(mean_square) * g * g * (now - old)
        np.testing.assert_allclose(-part.adjust(delta.copy(), stale(now, old), memory), expected, rtol=1e-4, atol=1e-5)


def test_adaptive_compensation_does_not_ask_for_the_scale_of_the_pseudo_gradient() -> None:
    one, other = dict[str, Any](), dict[str, Any]()
    for seed in range(4):
        delta, now, old = vectors(seed, 3)
        plain = DelayCompensation().adjust(delta.copy(), stale(now, old), one)
        scaled = DelayCompensation().adjust(np.float32(0.01) * delta, stale(now, old), other)
        np.testing.assert_allclose(scaled, 0.01 * plain, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("adaptive", [True, False])
def test_what_is_not_stale_is_not_compensated(adaptive: bool) -> None:
    delta, now = vectors(2, 2)
    found = DelayCompensation(adaptive=adaptive).adjust(delta.copy(), folding(0, size=40, current=now, base=now), {})
    assert found.tobytes() == delta.tobytes()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(*[st.floats(-(2.0**100), 2.0**100, width=32)] * 3), min_size=1, max_size=8),
    st.booleans(),
    st.floats(0.1, 1.0),
)
def test_a_bounded_compensation_is_no_larger_than_what_it_corrects(
    numbers: list[tuple[float, ...]], adaptive: bool, bound: float
) -> None:
    delta, now, old = np.array(numbers, np.float32).T.copy()
    found = DelayCompensation(adaptive=adaptive, bound=bound).adjust(delta.copy(), stale(now, old), {})
    assert np.isfinite(found).all()
    assert (np.abs(found - delta) <= bound * np.abs(delta) * 1.0001 + 1e-37).all()


# ------------------------------------------------------------ control variates


def test_control_variates_are_scaffolds() -> None:
    """Karimireddy et al. 2020, algorithm 1: c <- c + |S| / N * mean of delta c_i; x takes the mean of delta y_i."""
    part: ControlCompensator = ControlVariates()
    assert part.record == "control"
    memory, c = dict[str, Any](), np.zeros(40, np.float32)
    for seed in range(3):
        changes, deltas = vectors(seed, 4), vectors(seed + 10, 4)
        before = part.outgoing(deltas[0], memory)
        np.testing.assert_allclose(before, c, atol=1e-6)
        kept = before.copy()
        foldings = [folding(row, 0.25, 40, extra=change) for row, change in enumerate(changes)]
        for delta, update in zip(deltas, foldings, strict=True):
            assert part.adjust(delta.copy(), update, memory).tobytes() == delta.tobytes()
        part.finish(np.zeros(40, np.float32), foldings, memory)
        c = c + 4 / DEVICES * np.mean(changes, axis=0)
        np.testing.assert_array_equal(before, kept)  # what is on its way to devices does not change
    np.testing.assert_allclose(part.outgoing(c, memory), c, atol=1e-6)
    assert set(memory) == {"control"}


def test_a_device_that_sends_no_control_changes_none() -> None:
    memory: dict[str, Any] = {}
    (delta, change) = vectors(4, 2)
    some = [folding(0, 0.5, 40, extra=change), folding(1, 0.5, 40)]
    for update in some:
        ControlVariates().adjust(delta.copy(), update, memory)
    ControlVariates().finish(delta.copy(), some, memory)
    np.testing.assert_allclose(memory["control"], change / DEVICES, rtol=1e-6)
    assert fold(ControlVariates(), [(0, delta)], {}).tobytes() == delta.tobytes()


# ------------------------------------------------------------ cached-update calibration


class Ca2fl:
    """Wang et al. 2024, algorithm 2, with every h_i kept: v_t = h_t + 1/K sum (delta_i - h_i), h = 1/N sum h_i."""

    def __init__(self, size: int, devices: int = DEVICES) -> None:
        self.h_i = np.zeros((devices, size))

    def fold(self, deltas: Sequence[tuple[int, Vector]]) -> NDArray[np.float64]:
        h = self.h_i.mean(axis=0)
        v = h + np.mean([delta - self.h_i[row] for row, delta in deltas], axis=0)
        for row, delta in deltas:
            self.h_i[row] = delta
        result: NDArray[np.float64] = v
        return result


@pytest.mark.parametrize("size", [40, BLOCK + CHUNK + 7])
def test_cached_calibration_is_ca2fls(size: int) -> None:
    part, memory, paper = CachedCalibration(quantisation=None, unseen="zero"), dict[str, Any](), Ca2fl(size)
    rng = np.random.default_rng(0)
    for seed in range(6):
        rows = rng.choice(DEVICES, 3, replace=False).tolist()
        deltas = list(zip(rows, vectors(seed, 3, size), strict=True))
        np.testing.assert_allclose(fold(part, deltas, memory), paper.fold(deltas), rtol=1e-4, atol=1e-5)


def test_both_ways_with_unseen_devices_agree_once_all_were_seen() -> None:
    zero, mean = dict[str, Any](), dict[str, Any]()
    everybody = list(enumerate(vectors(1, DEVICES)))
    for deltas in (everybody, [(2, vectors(2, 1)[0])], [(4, vectors(3, 1)[0]), (1, vectors(4, 1)[0])]):
        first = fold(CachedCalibration(unseen="zero"), deltas, zero)
        second = fold(CachedCalibration(unseen="mean"), deltas, mean)
        np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-6)


def test_a_device_not_in_the_cache_is_not_calibrated_where_it_counts_as_the_mean() -> None:
    memory: dict[str, Any] = {}
    fold(CachedCalibration(), list(enumerate(vectors(1, 3))), memory)
    new = vectors(2, 1)[0]
    np.testing.assert_allclose(fold(CachedCalibration(), [(5, new)], memory), new, atol=1e-6)


def test_where_nothing_changes_the_step_is_the_mean_of_all_devices_whoever_comes() -> None:
    everybody = list(enumerate(vectors(1, DEVICES)))
    mean = np.mean([delta for _, delta in everybody], axis=0)
    for quantisation, tolerance in ((None, 1e-5), ("int8", 0.05)):
        part, memory = CachedCalibration(quantisation=quantisation), dict[str, Any]()
        fold(part, everybody, memory)
        for rows in ([0], [3, 4], [5, 1, 2]):
            found = fold(part, [everybody[row] for row in rows], memory)
            np.testing.assert_allclose(found, mean, atol=tolerance)


def test_weights_that_do_not_sum_to_one_scale_the_whole_step() -> None:
    part, memory = CachedCalibration(quantisation=None), dict[str, Any]()
    fold(part, list(enumerate(vectors(1, DEVICES))), memory)
    delta, twin = vectors(2, 1)[0], copy.deepcopy(memory)
    full = part.finish(part.adjust(delta.copy(), folding(1, 1.0, 40), memory), [folding(1, 1.0, 40)], memory)
    half = np.float32(0.5) * part.adjust(delta.copy(), folding(1, 0.5, 40), twin)
    np.testing.assert_allclose(part.finish(half, [folding(1, 0.5, 40)], twin), 0.5 * full, rtol=1e-5, atol=1e-6)


def test_no_trust_is_no_calibration() -> None:
    memory: dict[str, Any] = {}
    for seed in range(3):
        deltas = list(enumerate(vectors(seed, 4)))
        plain = fold(ControlVariates(), deltas, {})  # which leaves changes alone
        assert fold(CachedCalibration(trust=0.0), deltas, memory).tobytes() == plain.tobytes()
    assert not memory


def test_trust_counts_the_calibration_in_part() -> None:
    folds = [list(zip(rows, vectors(i, 2), strict=True)) for i, rows in enumerate([(0, 1), (1, 2), (0, 2), (2, 1)])]

    def last(trust: float) -> Vector:
        memory: dict[str, Any] = {}
        return [fold(CachedCalibration(trust=trust), deltas, memory) for deltas in folds][-1]

    np.testing.assert_allclose(last(0.3), 0.3 * last(1.0) + 0.7 * last(0.0), rtol=1e-4, atol=1e-5)
    assert np.abs(last(1.0) - last(0.0)).max() > 0.1


def test_the_cache_ages_by_its_decay_a_version() -> None:
    """The same as the paper's rule on a cache that is multiplied by the decay after every fold."""
    part, memory, paper = CachedCalibration(decay=0.8, quantisation=None, unseen="zero"), dict[str, Any](), Ca2fl(40)
    rng = np.random.default_rng(1)
    for seed in range(8):
        deltas = list(zip(rng.choice(DEVICES, 2, replace=False).tolist(), vectors(seed, 2), strict=True))
        np.testing.assert_allclose(fold(part, deltas, memory), paper.fold(deltas), rtol=1e-4, atol=1e-5)
        paper.h_i *= 0.8


def held(part: CachedCalibration, memory: dict[str, Any], size: int) -> dict[int, Vector]:
    """What the cache holds, by asking: a change of 0 comes back as -h_i."""
    asked = CachedCalibration(1.0, part.decay, part.limit_bytes, part.quantisation, part.unseen)
    rows = [int(row) for row in memory["cached"]]
    zero = np.zeros(size, np.float32)
    return {row: -asked.adjust(zero.copy(), folding(row, size=size), copy.deepcopy(memory)) for row in rows}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=15),
    st.sampled_from(["int8", None]),
    st.integers(1, 6),
    st.sampled_from([1.0, 0.7]),
    st.floats(1e-20, 1e20),
)
def test_after_any_sequence_h_is_the_mean_of_the_cache(
    folds: list[list[int]], quantisation: str | None, places: int, decay: float, scale: float
) -> None:
    size, memory = 5, dict[str, Any]()
    each = size + 4 if quantisation else 4 * size
    part = CachedCalibration(decay=decay, limit_bytes=each * places + 3, quantisation=quantisation)
    rng, order = np.random.default_rng(0), list[int]()
    for rows in folds:
        deltas = [(row, (scale * rng.standard_normal(size)).astype(np.float32)) for row in rows]
        assert np.isfinite(fold(part, deltas, memory)).all()
        order = [row for row in order if row not in rows] + sorted(set(rows), key=lambda row: rows[::-1].index(row))[
            ::-1
        ]
        cached = held(part, memory, size)
        assert list(cached) == order[-places:]
        stored = [kept for name, kept in memory.items() if name.startswith(("update", "scales"))]
        assert sum(kept.nbytes for kept in stored) <= part.limit_bytes
        np.testing.assert_allclose(memory["mean"], np.mean(list(cached.values()), axis=0), rtol=1e-4, atol=1e-5 * scale)


def test_quantised_updates_are_near_and_small() -> None:
    size = 3 * CHUNK + 5
    delta = (vectors(1, 1, size)[0] * np.repeat([1e-3, 1.0, 1e3, 1.0], CHUNK)[:size]).astype(np.float32)
    delta[CHUNK : 2 * CHUNK] = 0.0
    memory: dict[str, Any] = {}
    fold(CachedCalibration(), [(0, delta)], memory)
    (kept,) = held(CachedCalibration(), memory, size).values()
    for start in range(0, size, CHUNK):  # half a step of each chunk's own scale
        chunk = slice(start, start + CHUNK)
        assert np.abs(kept[chunk] - delta[chunk]).max() <= np.abs(delta[chunk]).max() / 127 * 0.501
    assert memory["update 0"].nbytes + memory["scales 0"].nbytes == size + 4 * 4


def test_what_the_cache_remembers_is_vectors_by_name_and_plain_values() -> None:
    memory: dict[str, Any] = {}
    fold(CachedCalibration(), list(enumerate(vectors(1, 3))), memory)
    arrays = {name: value for name, value in memory.items() if isinstance(value, np.ndarray)}
    assert all(value.ndim == 1 for value in arrays.values())
    plain = {name: value for name, value in memory.items() if name not in arrays}
    restored = {**json.loads(json.dumps(plain)), **copy.deepcopy(arrays)}
    deltas = [(1, vectors(2, 1)[0])]
    assert fold(CachedCalibration(), deltas, memory).tobytes() == fold(CachedCalibration(), deltas, restored).tobytes()


def test_a_cache_too_small_for_one_update_says_so() -> None:
    with pytest.raises(ConfigError, match="limit_bytes is 10"):
        fold(CachedCalibration(limit_bytes=10), [(0, vectors(1, 1)[0])], {})


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("part", ALL, ids=lambda part: type(part).__name__)
def test_types_are_kept_and_inputs_left_alone(part: Compensator, dtype: type) -> None:
    given: list[Vector] = [vector.astype(dtype) for vector in vectors(1, 4)]
    current, base, extra, delta = given
    for fixed in (current, base, extra):
        fixed.flags.writeable = False
    memory: dict[str, Any] = {}
    for row in (0, 1, 0):
        update = folding(row, 1.0, 40, current=current, base=base, extra=extra, staleness=1)
        found = part.finish(part.adjust(delta.copy(), update, memory), [update], memory)
        assert found.dtype == dtype and found.shape == (40,) and np.isfinite(found).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: DelayCompensation(-1.0),
        lambda: DelayCompensation(momentum=1.0),
        lambda: DelayCompensation(bound=0.0),
        lambda: CachedCalibration(trust=1.1),
        lambda: CachedCalibration(decay=0.0),
        lambda: CachedCalibration(limit_bytes=0),
        lambda: CachedCalibration(quantisation="int4"),
        lambda: CachedCalibration(unseen="none"),
    ],
)
def test_numbers_out_of_range_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ConfigError, match="choose"):
        make()
