"""Laws of the ratios: what must hold for any runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpace.simulations.comparison.statistics import Estimate, Runs

A, B, C = ("A", True), ("B", True), ("C", False)
NAN = math.nan


def run(
    strategy: tuple[str, bool],
    seed: int,
    to_target: float = NAN,
    *,
    app: str = "one",
    end: float = 100.0,
    status: str = "completed",
    final: float = 0.8,
) -> dict[str, Any]:
    """A run that needed so many seconds, twice the device seconds and three times the bytes; NaN: it never arrived."""
    return {
        "app": app,
        "fleet": "f",
        "strategy": strategy[0],
        "tuned": strategy[1],
        "seed": seed,
        "status": status,
        "virtual_seconds": end,
        "device_seconds": 2 * end,
        "bytes_up": end,
        "bytes_down": 2 * end,
        "seconds_to_target": to_target,
        "device_seconds_to_target": 2 * to_target,
        "bytes_to_target": 3 * to_target,
        "final_accuracy": final,
    }


def of(strategy: tuple[str, bool], times: Sequence[float], app: str = "one") -> list[dict[str, Any]]:
    return [run(strategy, seed, time, app=app) for seed, time in enumerate(times)]


def close(one: Estimate, other: Estimate) -> bool:
    return bool(np.allclose((one.value, one.low, one.high), (other.value, other.low, other.high)))


times = st.lists(st.floats(0.1, 99.0), min_size=3, max_size=6)
few = settings(max_examples=25, deadline=None)


@few
@given(times, st.data())
def test_ratios_are_of_pairs_and_turn_around(own: list[float], data: st.DataObject) -> None:
    theirs = data.draw(st.lists(st.floats(0.1, 99.0), min_size=len(own), max_size=len(own)))
    runs = Runs([*of(A, own), *of(B, theirs)])
    there, back = runs.speedup(A, B, "f", ["one"]), runs.speedup(B, A, "f", ["one"])
    assert math.isclose(there.value, math.exp(np.mean(np.log(theirs) - np.log(own))), rel_tol=1e-9)
    assert close(back, Estimate(1 / there.value, 1 / there.high, 1 / there.low))
    assert there.low <= there.value * (1 + 1e-9) and there.value <= there.high * (1 + 1e-9) and there.bound == ""


@few
@given(times, st.floats(0.2, 5.0))
def test_a_constant_factor_is_certain(own: list[float], factor: float) -> None:
    """However much seeds differ: they are paired."""
    runs = Runs([*of(A, own), *of(B, [factor * time for time in own])])
    for measure in ("seconds", "device_seconds", "bytes"):
        assert close(runs.speedup(A, B, "f", ["one"], measure), Estimate(factor, factor, factor))


@few
@given(times, st.randoms(use_true_random=False))
def test_the_order_of_rows_is_nothing(own: list[float], random: Any) -> None:
    rows = [*of(A, own), *of(B, own[::-1]), *of(A, own, "two"), *of(B, own, "two")]
    before = Runs(rows).speedup(A, B, "f", ["one", "two"])
    random.shuffle(rows)
    assert Runs(rows).speedup(A, B, "f", ["one", "two"]) == before


@few
@given(times)
def test_apps_count_alike(own: list[float]) -> None:
    rows = [*of(A, own), *of(B, [8 * time for time in own]), *of(A, own, "two"), *of(B, [2 * t for t in own], "two")]
    assert math.isclose(Runs(rows).speedup(A, B, "f", ["one", "two"]).value, 4.0)


@few
@given(times, st.data())
def test_the_best_of_several_is_no_slower_than_each(own: list[float], data: st.DataObject) -> None:
    same = st.lists(st.floats(0.1, 99.0), min_size=len(own), max_size=len(own))
    runs = Runs([*of(A, own), *of(B, data.draw(same)), *of(C, data.draw(same))])
    best = runs.speedup_on_best(A, [B, C], "f", ["one"])
    alone = [runs.speedup(A, other, "f", ["one"]) for other in (B, C)]
    assert math.isclose(best.value, min(each.value for each in alone))
    assert best.low <= min(each.low for each in alone) * (1 + 1e-9)
    assert best.high <= min(each.high for each in alone) * (1 + 1e-9)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """With 30 seeds; with five the bootstrap is known to promise too much, and docs say so."""
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(60):
        logs = rng.normal(0.7, 0.5, 30)
        runs = Runs([*of(A, [1.0] * 30), *of(B, np.exp(logs).tolist())])
        found = runs.speedup(A, B, "f", ["one"])
        held += found.low <= math.exp(0.7) <= found.high
    assert 50 <= held <= 60


# ---------------------------------------------------------------- runs that do not arrive


def test_a_run_that_does_not_arrive_is_a_bound_not_a_gap() -> None:
    runs = Runs([*of(A, [10, 10]), *of(B, [50, NAN])])
    found = runs.speedup(A, B, "f", ["one"])
    assert math.isclose(found.value, math.sqrt(5 * 10)) and found.bound == "at least"
    assert runs.speedup(B, A, "f", ["one"]).bound == "at most"
    assert runs.costs("one", "f", B, "seconds").bound == "at least"
    assert math.isclose(runs.costs("one", "f", B, "device_seconds").value, 2 * math.sqrt(50 * 100))
    neither = Runs([*of(A, [NAN, 10]), *of(B, [50, NAN])]).speedup(A, B, "f", ["one"])
    assert neither.bound == "unclear" and math.isclose(neither.value, math.sqrt(0.5 * 10))


@few
@given(times, st.integers(0, 2))
def test_arriving_later_than_the_end_looks_no_better_than_arriving(own: list[float], seed: int) -> None:
    """A censored run counts for less than it would have needed, whoever it is: speed-ups on it are understated."""
    late = [*own]
    late[seed] = 250.0
    cut = [*own]
    cut[seed] = NAN
    true, seen = (Runs([*of(A, own), *of(B, times)]).speedup(A, B, "f", ["one"]) for times in (late, cut))
    assert seen.value < true.value and seen.bound == "at least"


def test_a_run_that_died_early_counts_as_the_costliest() -> None:
    died = run(A, 0, end=1.0, status="failed")
    runs = Runs([died, run(A, 1, 20.0), run(B, 0, 40.0, end=300.0), run(B, 1, 40.0)])
    cost = runs.cost(died, "seconds")
    assert cost.value == 300.0 and cost.censored
    assert math.isclose(runs.speedup(A, B, "f", ["one"]).value, math.sqrt(40 / 300 * 40 / 20))


def test_seeds_that_one_of_them_lacks_are_left_out() -> None:
    runs = Runs([*of(A, [10, 10, 10]), *of(B, [20, 20])])
    assert close(runs.speedup(A, B, "f", ["one"]), Estimate(2, 2, 2))
    nothing = runs.speedup(A, ("Z", True), "f", ["one"])
    assert math.isnan(nothing.value)
    alone = Runs([run(A, 1, 10.0), run(B, 1, 30.0)]).speedup(A, B, "f", ["one"])
    assert math.isclose(alone.value, 3.0) and math.isnan(alone.low) and math.isnan(alone.high)


# ---------------------------------------------------------------- accuracies


@few
@given(st.lists(st.floats(0, 1), min_size=2, max_size=6), st.floats(-0.2, 0.2))
def test_gaps(finals: list[float], shift: float) -> None:
    rows = [run(A, seed, 1.0, final=value) for seed, value in enumerate(finals)]
    rows += [run(B, seed, 1.0, final=value + shift) for seed, value in enumerate(finals)]
    runs = Runs(rows)
    there, back = runs.gap(A, B, "f", ["one"]), runs.gap(B, A, "f", ["one"])
    assert np.allclose((there.value, there.low, there.high), shift, atol=1e-9)
    assert np.allclose((back.value, back.low, back.high), -shift, atol=1e-9)
    assert math.isclose(runs.mean("one", "f", A, "final_accuracy").value, float(np.mean(finals)), abs_tol=1e-12)


def test_which_variant_is_compared() -> None:
    runs = Runs([run(("A", True), 1), run(("A", False), 1), run(("B", False), 1)])
    assert runs.variant("A") == ("A", True) and runs.variant("B") == ("B", False)
    with pytest.raises(LookupError, match="there are no runs of C; there are A, "):
        runs.variant("C")
