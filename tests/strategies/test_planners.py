from __future__ import annotations

import json
import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedpace.errors import ConfigError
from fedpace.strategies.fleet import Fleet
from fedpace.strategies.gates import All, Arrivals, Deadline
from fedpace.strategies.pace import observe_task, task_seconds
from fedpace.strategies.parts import Context, Devices, Outcome, Standing, Updates, Work
from fedpace.strategies.planners import Fixed, Split, StepsForDeadline, Together
from fedpace.strategies.planners.split import divide
from fedpace.strategies.weighers.samples import Samples


def fleet_of(paces: list[float], overhead: float = 0.0, tasks: int = 1) -> Fleet:
    """Devices of known seconds a step (NaN: never seen), each with so many observed tasks of ten steps."""
    fleet = Fleet()
    fleet.join_all(range(100, 100 + len(paces)))
    for row, pace in enumerate(paces):
        for _ in range(0 if math.isnan(pace) else tasks):
            compute = 10 * pace if overhead else math.nan
            observe_task(fleet, row, seconds=10 * pace + overhead, compute_seconds=compute, steps=10.0)
    return fleet


def planned(planner: Any, fleet: Fleet, rows: list[int], now: float = 0.0, memory: Any = None) -> list[Work]:
    here = Context(fleet, np.random.default_rng(0), now=now, memory={} if memory is None else memory)
    return list(planner.plan(Devices(fleet, np.array(rows, dtype=np.intp)), here))


# ---------------------------------------------------------------- fixed, and for a deadline


def test_fixed_gives_everybody_the_same() -> None:
    fleet = fleet_of([1.0, math.nan])
    assert planned(Fixed(7), fleet, [1, 0]) == [Work(steps=7)] * 2
    assert planned(Fixed(), fleet, [0]) == [Work()]


paces = st.lists(st.floats(1e-3, 1e3) | st.just(math.nan), min_size=1, max_size=6)


@given(paces=paces, seconds=st.floats(1e-3, 1e5), low=st.integers(1, 50), more=st.integers(0, 500))
@settings(max_examples=60, deadline=None)
def test_steps_for_a_deadline_are_the_most_that_fit(paces: list[float], seconds: float, low: int, more: int) -> None:
    fleet, high = fleet_of(paces, overhead=0.5), low + more
    planner = StepsForDeadline(seconds, low, high, confidence=0.8)
    rows = np.arange(len(paces), dtype=np.intp)
    for row, work in enumerate(planned(planner, fleet, rows.tolist())):
        steps = work.steps
        assert steps is not None and low <= steps <= high
        # 0.8416 standard deviations: a normal variable is below in 80 of 100 cases
        took, longer = (
            float(task_seconds(fleet, rows, np.full(len(rows), float(n)), quantile_sd=0.8416)[row])
            for n in (steps, steps + 1)
        )
        if math.isnan(took):
            assert steps == low, "nothing is known of any device"
            continue
        assert took <= seconds * 1.0001 or steps == low
        assert longer > seconds * 0.9999 or steps == high


def test_more_confidence_is_fewer_steps() -> None:
    fleet = fleet_of([0.1], overhead=0.1)
    steps = [planned(StepsForDeadline(20.0, 1, 1000, c), fleet, [0])[0].steps for c in (0.5, 0.8, 0.99)]
    assert steps[0] > steps[1] > steps[2] > 1  # type: ignore[operator]


# ---------------------------------------------------------------- arriving together


def compass(
    groups: list[dict[str, float]], speeds: list[float], now: float, q_min: int, q_max: int, slack: float
) -> list[tuple[int, int]]:
    """The scheduler of arXiv:2309.14675, section 3, in its own terms: S seconds a step, T_a and T_max of a group, and
    its fastest S. Returns (steps, group) by device; the fastest devices come first."""
    answers = []
    for s in speeds:
        joins = [(math.floor((g["T_a"] - now) / s + 1e-6), -i) for i, g in enumerate(groups)]
        joins = [join for join in joins if q_min <= join[0] <= q_max]
        if joins:
            q, i = max(joins)
            groups[-i]["S"] = min(groups[-i]["S"], s)
            answers.append((q, -i))
            continue
        news = [math.floor((g["T_max"] + g["S"] * q_max - now) / s + 1e-6) for g in groups if now < g["T_max"]]
        q = max([q for q in news if q <= q_max], default=q_max)
        q = max(q, q_min)
        groups.append({"T_a": now + q * s, "T_max": now + slack * q * s, "S": s})
        answers.append((q, len(groups) - 1))
    return answers


@given(
    speeds=st.lists(st.floats(0.05, 20.0), min_size=1, max_size=8, unique=True),
    later=st.lists(st.floats(0.0, 500.0), max_size=6),
    q_min=st.integers(1, 30),
    times=st.integers(1, 8),
    slack=st.floats(1.0, 2.0),
)
@settings(max_examples=80, deadline=None)
def test_groups_are_those_of_the_paper(
    speeds: list[float], later: list[float], q_min: int, times: int, slack: float
) -> None:
    speeds = sorted(speeds)
    fleet = fleet_of(speeds)
    paces = [float(pace) for pace in Devices(fleet, np.arange(len(speeds))).seconds_per_step]
    planner, memory, theirs = Together(q_min, q_min * times, slack), {}, []  # type: ignore[var-annotated]
    expected = compass(theirs, paces, 0.0, q_min, q_min * times, slack)
    works = planned(planner, fleet, list(range(len(speeds))), memory=memory)
    assert [(work.steps, work.group) for work in works] == expected
    for i, now in enumerate(sorted(later)):
        row = i % len(speeds)
        expected = compass(theirs, [paces[row]], now, q_min, q_min * times, slack)
        works = planned(planner, fleet, [row], now, memory)
        assert [(work.steps, work.group) for work in works] == expected
        assert q_min <= (works[0].steps or 0) <= q_min * times
    for name, group in memory["groups"].items():
        assert group["expected"] == pytest.approx(theirs[int(name)]["T_a"])
        assert group["latest"] == pytest.approx(theirs[int(name)]["T_max"])
    json.dumps(memory, allow_nan=False)


def test_the_example_of_five_devices() -> None:
    """Qmin 20 and Qmax 100: four times slower still joins the fastest, six times slower opens a group of its own."""
    fleet, memory = fleet_of([1.0, 2.0, 4.0, 6.0, math.nan]), {}  # type: ignore[var-annotated]
    works = planned(Together(20, 100, 1.2), fleet, [4, 3, 2, 1, 0], memory=memory)
    unknown, slowest, slow, half, fastest = ((work.steps, work.group) for work in works)
    assert fastest == (100, 0) and half == (50, 0) and slow == (25, 0)
    # (T_max + Qmax S - now) / S_i = (120 + 100) / 6, so that the fastest can do 100 more steps and then arrive with it
    assert slowest == (36, 1)
    assert unknown == (20, None)
    assert memory["groups"]["1"]["latest"] == pytest.approx(1.2 * 216.0)


def test_transfers_count_in_an_arrival() -> None:
    fleet = fleet_of([1.0, 1.0], overhead=10.0)
    memory: dict[str, Any] = {"groups": {"5": {"expected": 70.0, "latest": 90.0, "again": 50.0}}, "next": 6}
    assert planned(Together(), fleet, [0], 0.0, memory) == [Work(steps=60, group=5)]
    assert planned(Together(), fleet, [1], 40.5, memory)[0].group == 6, "19 steps are too few"


@given(
    paces=st.lists(st.floats(0.1, 5.0), min_size=2, max_size=6),
    seed=st.integers(0, 2**32 - 1),
    lost=st.sampled_from([0.0, 0.2]),
)
@settings(max_examples=25, deadline=None)
def test_a_compass_run_goes_on_whatever_arrives_late_or_never(paces: list[float], seed: int, lost: float) -> None:
    """Planner and gate in a small loop: every update is folded once, no later than its group's latest time or at its
    own arrival; and no device is left without work for ever."""
    fleet, both, memory = fleet_of(paces, tasks=3), Together(2, 10, 1.2), {}  # type: ignore[var-annotated]
    noise = np.random.default_rng(seed)
    out: dict[int, tuple[float, int, int | None]] = {}  # task -> end, row, group
    waiting: dict[int, tuple[int, int | None]] = {}
    free, now, tasks, folded = set(range(len(paces))), 0.0, 0, 0
    for _ in range(120):
        rows = sorted(free)
        for row, work in zip(rows, planned(both, fleet, rows, now, memory), strict=True):
            assert work.steps is not None and 2 <= work.steps <= 10
            tasks += 1
            out[tasks] = (now + work.steps * paces[row] * noise.lognormal(0.0, 0.4), row, work.group)
        free = set()
        until = min((group["latest"] for group in memory["groups"].values()), default=math.inf)
        task, (end, row, group) = min(out.items(), key=lambda item: item[1]) if out else (0, (math.inf, -1, None))
        now = min(end, until)
        assert now < math.inf, "somebody is at work, or a group has its latest time"
        if end <= until:
            del out[task]
            if noise.random() < lost:
                free.add(row)
            else:
                waiting[task] = (row, group)
        asked = Standing(
            now=now,
            version=0,
            opened_at=0.0,
            target=len(paces),
            sent=0,
            out=len(out),
            late=0,
            waiting=tuple(waiting),
            waiting_groups=tuple(group for _, group in waiting.values()),
            out_groups=tuple({group for _, _, group in out.values()}),
        )
        verdict = both.decide(asked, Context(fleet, np.random.default_rng(0), now=now, memory=memory))
        for done in verdict.fold:
            free.add(waiting.pop(done)[0])
            folded += 1
        assert all(now < memory["groups"][str(group)]["latest"] for _, group in waiting.values())
        assert out or free or waiting
    assert len(memory["groups"]) <= len(paces) + 1, "groups that are over are forgotten"
    assert folded > 10


# ---------------------------------------------------------------- splitting


def ranges(works: list[Work]) -> list[tuple[int, int]]:
    assert all(work.share and work.samples is not None for work in works)
    return [work.samples for work in works if work.samples is not None]


@given(
    paces=st.lists(st.floats(1e-6, 1e6) | st.just(math.nan), min_size=1, max_size=12),
    samples=st.integers(1, 10**12),
    minimum=st.integers(1, 10**4),
)
@settings(max_examples=100, deadline=None)
def test_split_covers_all_samples_exactly_in_order(paces: list[float], samples: int, minimum: int) -> None:
    found = ranges(planned(Split(samples, minimum), fleet_of(paces), list(range(len(paces)))))
    assert found[0][0] == 0 and found[-1][1] == samples
    assert all(before[1] == after[0] for before, after in pairwise(found))
    sizes = [end - start for start, end in found]
    assert all(size >= min(minimum, samples) or size == 0 for size in sizes)
    if samples >= minimum * len(paces):
        assert all(size >= minimum for size in sizes)


@given(
    speed=st.lists(st.floats(1e-8, 1e8), min_size=1, max_size=20),
    minimum=st.integers(1, 1000),
    extra=st.integers(0, 10**9),
)
@settings(max_examples=100, deadline=None)
def test_parts_are_in_proportion_where_the_minimum_allows(speed: list[float], minimum: int, extra: int) -> None:
    total, speeds = minimum * len(speed) + extra, np.array(speed)
    parts = divide(total, speeds, minimum)
    assert parts.sum() == total and (parts >= minimum).all()
    above = parts > minimum + 1
    if above.sum() > 1:  # one rate for all who are above the minimum, to a sample
        rates, slack = parts[above] / speeds[above], 2.0 / speeds[above]
        assert (rates - slack).max() <= (rates + slack).min() * (1 + 1e-9)


def test_split_follows_the_speeds_it_sees_until_all_arrive_together() -> None:
    """Shares in proportion to samples a second, transfers included, have one fixed point: equal times."""
    split, memory, fleet = Split(10_000), {}, fleet_of([1.0, 1.0, 1.0])  # type: ignore[var-annotated]
    rates, overhead = np.array([100.0, 50.0, 5.0]), np.array([1.0, 3.0, 0.5])
    here = Context(fleet, np.random.default_rng(0), memory=memory)
    for _ in range(40):
        sizes = np.array([end - start for start, end in ranges(planned(split, fleet, [0, 1, 2], memory=memory))])
        seconds = overhead + sizes / rates
        for row in range(3):
            split.observe(outcome(row, samples=sizes[row], seconds=seconds[row]), here)
    assert seconds.max() / seconds.min() < 1.02
    assert sizes[0] > sizes[1] > sizes[2]
    json.dumps(memory, allow_nan=False)


def outcome(row: int, samples: float, seconds: float, reason: str = "") -> Outcome:
    return Outcome(
        row=row,
        steps=1.0,
        group=None,
        sent_at=0.0,
        seconds=seconds,
        compute_seconds=math.nan,
        bytes_moved=0.0,
        samples=samples,
        loss=math.nan,
        staleness=0,
        reason=reason,
    )


def test_split_ignores_what_says_nothing_and_bounds_what_boasts() -> None:
    split, here = Split(100), Context(fleet_of([1.0, 1.0]), np.random.default_rng(0))
    for samples, seconds in ((math.nan, 1.0), (-5.0, 1.0), (0.0, 1.0), (10.0, 0.0), (10.0, math.nan), (10.0, math.inf)):
        split.observe(outcome(0, samples, seconds), here)
    split.observe(outcome(0, 10.0, 1.0, reason="the app raised"), here)
    assert "log_speed" not in here.memory
    split.observe(outcome(0, math.inf, 1.0), here)
    assert here.memory["log_speed"] == {"0": pytest.approx(math.log(100.0))}


def test_split_leaves_out_the_slowest_where_there_is_too_little() -> None:
    assert ranges(planned(Split(100, minimum=40), fleet_of([1.0, 3.0, 2.0]), [0, 1, 2])) == [
        (0, 60),
        (60, 60),
        (60, 100),
    ]
    assert ranges(planned(Split(5, minimum=40), fleet_of([2.0, 1.0]), [0, 1])) == [(0, 0), (0, 5)]


Array = NDArray[np.float64]


@given(
    seed=st.integers(0, 2**32 - 1),
    samples=st.integers(3, 400),
    paces=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=9),
)
@settings(max_examples=50, deadline=None)
def test_shares_merged_by_samples_are_the_undivided_task(seed: int, samples: int, paces: list[float]) -> None:
    """One full-batch gradient step of least squares, and its loss: split over devices, and merged by the samples weigher."""
    assume(len(paces) <= samples)
    rng = np.random.default_rng(seed)
    x, y, model = rng.normal(size=(samples, 4)), rng.normal(size=samples), rng.normal(size=4)

    def step(start: int, end: int) -> Array:
        residual = x[start:end] @ model - y[start:end]
        moved: Array = model - 0.1 * x[start:end].T @ residual / (end - start)
        return np.append(moved, (residual**2).mean())

    fleet = fleet_of(paces)
    shares = ranges(planned(Split(samples), fleet, list(range(len(paces)))))
    updates = Updates(
        fleet, range(len(shares)), range(len(shares)), samples=[float(end - start) for start, end in shares]
    )
    factors = np.asarray(Samples().weigh(updates, Context(fleet, rng)))
    weights = factors / factors.sum()
    merged = sum(weight * step(start, end) for weight, (start, end) in zip(weights, shares, strict=True))
    np.testing.assert_allclose(merged, step(0, samples), rtol=1e-9, atol=1e-12)


def test_split_needs_all_its_shares() -> None:
    assert Split(10).refuse(SimpleNamespace(gate=All())) is None
    for gate in (Deadline(5.0), Arrivals(2), Together()):
        assert "All" in str(Split(10).refuse(SimpleNamespace(gate=gate)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Fixed(0),
        lambda: StepsForDeadline(0.0),
        lambda: StepsForDeadline(math.nan),
        lambda: StepsForDeadline(1.0, 0),
        lambda: StepsForDeadline(1.0, 5, 4),
        lambda: StepsForDeadline(1.0, confidence=1.0),
        lambda: StepsForDeadline(1.0, confidence=math.nan),
        lambda: Split(0),
        lambda: Split(10, 0),
    ],
)
def test_numbers_out_of_range_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match="choose"):
        make()
