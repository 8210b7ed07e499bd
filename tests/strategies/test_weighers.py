"""Weighers: their formulas beside a few lines from the papers, and laws that hold whatever comes in."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpace.errors import ConfigError
from fedpace.strategies.fleet import Fleet, Floats
from fedpace.strategies.parts import AbsoluteWeigher, Context, Updates, Weigher
from fedpace.strategies.weighers.error import ErrorWeight
from fedpace.strategies.weighers.mixing import Absolute, Mixing
from fedpace.strategies.weighers.samples import Samples
from fedpace.strategies.weighers.speed import Speed
from fedpace.strategies.weighers.staleness import Constant, Hinge, Polynomial
from fedpace.strategies.weighers.steps import NormalisedSteps

RELATIVE: list[Weigher] = [Samples(), Polynomial(), Hinge(), Constant(), Speed(), ErrorWeight()]
ABSOLUTE: list[AbsoluteWeigher] = [Mixing(0.3), Absolute(Polynomial()), Absolute(Hinge()), NormalisedSteps()]


def fleet_of(count: int) -> Fleet:
    fleet = Fleet()
    fleet.join_all(range(100, 100 + count))
    return fleet


def context_of(fleet: Fleet) -> Context:
    return Context(fleet, np.random.default_rng(0))


def batch(fleet: Fleet, rows: list[int] | None = None, **columns: Any) -> Updates:
    rows = list(range(fleet.size)) if rows is None else rows
    return Updates(fleet, range(len(rows)), rows, **columns)


def weigh(weigher: Weigher, updates: Updates) -> Floats:
    return np.asarray(weigher.weigh(updates, context_of(updates.fleet)))


def test_samples() -> None:
    updates = batch(fleet_of(6), samples=[10.0, np.nan, 0.0, -3.0, np.inf, 30.0])
    assert weigh(Samples(), updates).tolist() == [10.0, 0.0, 0.0, 0.0, 0.0, 30.0]


def test_staleness_is_fedasyncs_and_fedbuffs() -> None:
    """Xie et al. 2019, section 5.2, d = t - tau; Nguyen et al. 2022, section 5."""
    d = [0, 1, 4, 5, 9]
    updates = batch(fleet_of(5), staleness=d)
    assert weigh(Constant(), updates).tolist() == [1.0] * 5
    assert weigh(Polynomial(0.3), updates) == pytest.approx([(x + 1) ** -0.3 for x in d])
    assert weigh(Polynomial(), updates) == pytest.approx([1 / np.sqrt(1 + x) for x in d])
    assert weigh(Hinge(10.0, 4.0), updates) == pytest.approx([1, 1, 1, 1 / 11, 1 / 51])
    weird = batch(fleet_of(3), staleness=[np.nan, -2.0, np.inf])
    for weigher in (Polynomial(), Hinge()):
        assert weigh(weigher, weird) == pytest.approx([1.0, 1.0, 0.0], abs=1e-6)


def test_absolute_is_the_same_and_has_the_name_of_what_it_holds() -> None:
    updates = batch(fleet_of(3), staleness=[0, 3, 8])
    wrapped = Absolute(Polynomial())
    assert wrapped.scale(updates, np.ones(3), context_of(updates.fleet)).tolist() == [1.0, 0.5, 1.0 / 3.0]
    assert wrapped.__name__ == "Absolute Polynomial" and not hasattr(wrapped, "weigh")
    assert Absolute(ErrorWeight()).needs_scores and not wrapped.needs_scores
    from_function = Absolute(lambda updates, context: [2.0] * len(updates))
    assert from_function.scale(updates, np.ones(3), context_of(updates.fleet)).tolist() == [2.0] * 3


def test_fedasync_mixes_as_in_the_paper() -> None:
    """x_t = (1 - alpha_t) x_{t-1} + alpha_t x_new, alpha_t = alpha * s(t - tau): algorithm 1."""
    updates = batch(fleet_of(1), staleness=[3])
    context, one = context_of(updates.fleet), np.ones(1)
    alpha_t = 0.6 * (3 + 1) ** -0.5
    factor = Mixing(0.6).scale(updates, one, context) * Absolute(Polynomial(0.5)).scale(updates, one, context)
    x, x_new = 2.0, 5.0
    assert x + factor[0] * (x_new - x) == pytest.approx((1 - alpha_t) * x + alpha_t * x_new)


def test_normalised_steps_are_fednovas() -> None:
    """Wang et al. 2020, eq. 8 with a_i = (1, ..., 1): x moves by tau_eff * sum p_i Delta_i / tau_i."""
    rng = np.random.default_rng(3)
    p, tau, delta = np.array([0.5, 0.2, 0.3]), np.array([5.0, 20.0, 1.0]), rng.standard_normal((3, 8))
    updates = batch(fleet_of(3), steps=tau)
    a = NormalisedSteps().scale(updates, p, context_of(updates.fleet))
    np.testing.assert_allclose((p * a) @ delta, (p @ tau) * (p @ (delta / tau[:, None])))


def test_unknown_steps_count_as_the_mean_of_the_known() -> None:
    fleet, p = fleet_of(4), np.full(4, 0.25)
    told = NormalisedSteps().scale(batch(fleet, steps=[10, 30, 20, 20]), p, context_of(fleet))
    untold = NormalisedSteps().scale(batch(fleet, steps=[10, 30, np.nan, -1]), p, context_of(fleet))
    np.testing.assert_allclose(untold, told)
    assert NormalisedSteps().scale(batch(fleet), p, context_of(fleet)).tolist() == [1.0] * 4


def test_normalised_steps_refuse_changes_that_are_no_sums_of_steps() -> None:
    refuse = NormalisedSteps().refuse
    assert refuse(SimpleNamespace(folder=SimpleNamespace(against="base"))) is None
    assert "steps" in (refuse(SimpleNamespace(folder=SimpleNamespace(against="current"))) or "")


def run_folds(weigher: Speed, fleet: Fleet, folds: list[list[int]]) -> list[Floats]:
    """Weighs and then counts, as the machine does."""
    context, results = context_of(fleet), []
    for rows in folds:
        results.append(np.asarray(weigher.weigh(batch(fleet, rows), context)))
        np.add.at(fleet["folded"], rows, 1)
    return results


def test_speed_evens_out_who_comes_often() -> None:
    """A device that comes three times as often as another has a third of its weight each time."""
    fleet = fleet_of(1000)
    fast_and_slow = run_folds(Speed(10.0), fleet, [[0, 0, 0, 1]] * 50)
    assert fast_and_slow[0].tolist() == pytest.approx([2 / 3, 2 / 3, 2 / 3, 2])
    np.testing.assert_allclose(fast_and_slow[-1], fast_and_slow[0])
    assert fast_and_slow[-1][:3].sum() == pytest.approx(fast_and_slow[-1][3])


def test_speed_is_one_for_all_where_all_come_alike() -> None:
    for factors in run_folds(Speed(), fleet_of(6), [[0, 1, 2, 3, 4, 5]] * 4):
        assert factors.tolist() == [1.0] * 6


def test_speed_goes_on_from_a_fleet_that_has_a_history() -> None:
    fleet, again = fleet_of(5), fleet_of(5)
    folds = [[0, 1], [0, 2], [0, 1], [0, 3]]
    expected = run_folds(Speed(), fleet, folds)[-1]
    run_folds(Speed(), again, folds[:2])
    np.testing.assert_allclose(run_folds(Speed(), again, folds[2:])[-1], expected)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=6), min_size=1, max_size=12), st.floats(1.0, 50.0))
def test_speed_is_bounded(folds: list[list[int]], bound: float) -> None:
    for factors in run_folds(Speed(bound), fleet_of(8), folds):
        assert (factors >= 1 / bound).all() and (factors <= bound).all()


def fold_errors(
    weigher: ErrorWeight, folds: int, seen: Callable[[np.random.Generator], Floats]
) -> tuple[Fleet, Floats]:
    rng = np.random.default_rng(5)
    fleet = fleet_of(len(seen(rng)))
    context, factors = context_of(fleet), np.ones(fleet.size)
    for _ in range(folds):
        factors = np.asarray(weigher.weigh(batch(fleet, agreement=seen(rng)), context))
    return fleet, factors


def test_devices_that_differ_from_each_other_are_not_punished() -> None:
    """Cosines as of devices with data of their own: low, scattered, and each device's its own."""
    own = np.linspace(0.05, 0.6, 20)
    _, factors = fold_errors(ErrorWeight(), 30, lambda rng: own + 0.05 * rng.standard_normal(20))
    assert (factors == 1.0).all()


def test_a_device_against_all_others_is_weighed_down_and_comes_back() -> None:
    weigher, fleet = ErrorWeight(), fleet_of(12)
    context, honest = context_of(fleet), np.linspace(0.3, 0.5, 12)
    turned = honest.copy()
    turned[4] = -0.6
    history = []
    for fold in range(40):
        agreement = turned if 10 <= fold < 20 else honest
        history.append(np.asarray(weigher.weigh(batch(fleet, agreement=agreement), context)))
    assert np.array(history)[:, :4].min() == 1.0 and np.array(history)[:, 5:].min() == 1.0
    assert (np.array(history)[:10, 4] == 1.0).all()
    assert history[19][4] == weigher.floor and history[39][4] == 1.0
    falling, rising = np.array(history)[10:20, 4], np.array(history)[20:, 4]
    assert (np.diff(falling) <= 0).all() and (np.diff(rising) >= 0).all()


def test_a_loss_far_above_the_others_is_an_error_too() -> None:
    fleet = fleet_of(8)
    context, weigher = context_of(fleet), ErrorWeight()
    loss = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 9.0, 1.2]
    for _ in range(20):
        factors = np.asarray(weigher.weigh(batch(fleet, agreement=[0.4] * 8, validation_loss=loss), context))
    assert factors[6] == weigher.floor and (np.delete(factors, 6) == 1.0).all()


def test_nothing_is_concluded_from_nothing() -> None:
    fleet = fleet_of(8)
    assert weigh(ErrorWeight(), batch(fleet)).tolist() == [1.0] * 8
    assert np.isnan(fleet["error"]).all()
    assert weigh(ErrorWeight(), batch(fleet, [3], agreement=[-1.0])).tolist() == [1.0]


def test_the_error_is_smoothed_and_its_memory_bounded() -> None:
    fleet = fleet_of(50)
    weigher, context = ErrorWeight(smoothing=0.25, window=10), context_of(fleet)
    weigher.weigh(batch(fleet, agreement=[0.5] * 50), context)
    weigher.weigh(batch(fleet, [7, 7], agreement=[-0.5, -0.1]), context)
    assert fleet["error"][7] == pytest.approx(0.75 * 0.5 + 0.25 * 1.3)
    assert len(context.memory["rows"]) == 10 and context.memory["rows"][-1] == 7
    newcomer = fleet.join(999)
    weigher.weigh(batch(fleet, [newcomer], agreement=[-1.0]), context)
    assert fleet["error"][newcomer] == pytest.approx(0.5 + 0.25 * 1.5)


ANY = st.floats(allow_nan=True, allow_infinity=True)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 9), ANY, ANY, ANY, ANY | st.floats(-1, 1), ANY | st.floats(0, 5)),
        min_size=1,
        max_size=12,
    )
)
def test_factors_are_finite_and_not_negative_whatever_comes(seen: list[tuple[Any, ...]]) -> None:
    rows, samples, staleness, steps, agreement, loss = (list(column) for column in zip(*seen, strict=True))
    fleet = fleet_of(10)
    updates = batch(
        fleet, rows, samples=samples, staleness=staleness, steps=steps, agreement=agreement, validation_loss=loss
    )
    relative = np.full(len(rows), 1 / len(rows))
    results = {type(weigher).__name__: weigh(weigher, updates) for weigher in RELATIVE}
    for weigher in ABSOLUTE:
        results[str(weigher)] = np.asarray(weigher.scale(updates, relative, context_of(fleet)))
    for name, factors in results.items():
        assert factors.shape == (len(rows),), name
        assert np.isfinite(factors).all() and (factors >= 0).all(), name
    for name in ("Polynomial", "Hinge", "Constant"):
        assert (results[name] <= 1).all()
    assert (results["ErrorWeight"] >= 0.1).all() and (results["ErrorWeight"] <= 1).all()
    known = fleet["error"][np.isfinite(fleet["error"])]
    assert ((known >= 0) & (known <= 2)).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Polynomial(-1.0),
        lambda: Hinge(0.0),
        lambda: Hinge(1.0, -1.0),
        lambda: Mixing(0.0),
        lambda: Mixing(float("nan")),
        lambda: Speed(0.5),
        lambda: ErrorWeight(smoothing=0.0),
        lambda: ErrorWeight(cut=0.0),
        lambda: ErrorWeight(floor=1.5),
        lambda: ErrorWeight(least_spread=0.0),
        lambda: ErrorWeight(window=4),
    ],
)
def test_numbers_out_of_range_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ConfigError, match="choose"):
        make()
