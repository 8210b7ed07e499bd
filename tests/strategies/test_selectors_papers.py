"""TiFL and Oort against a few lines written from the papers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fedpace.strategies.fleet import Fleet
from fedpace.strategies.pace import observe_task
from fedpace.strategies.parts import Context, Devices, Outcome
from fedpace.strategies.selectors import Tiers, Utility
from fedpace.strategies.selectors.tiers import tier_losses, tier_probabilities
from fedpace.strategies.selectors.utility import statistical_utility, utility


def fleet_of(seconds: list[float]) -> Fleet:
    """Devices that were seen, one for each task time."""
    fleet = Fleet()
    fleet.join_all(range(1, len(seconds) + 1))
    for row, time in enumerate(seconds):
        observe_task(fleet, row, seconds=time, compute_seconds=0.9 * time, steps=1.0)
    fleet["selected"][:] = fleet["folded"][:] = 1
    fleet["last_selected"][:] = 0
    return fleet


def outcome(row: int, loss: float, samples: float = 1.0) -> Outcome:
    return Outcome(row, 1.0, None, 0.0, 1.0, 0.5, 1e6, samples, loss, 0)


# ---------------------------------------------------------------- TiFL (Chai et al. 2020)


def test_probabilities_rise_with_the_loss() -> None:
    assert tier_probabilities(np.array([0.2, 0.9, 0.5])) == pytest.approx(np.array([1, 3, 2]) / 6)
    assert tier_probabilities(np.array([0.2, np.nan, 0.5, 0.9, 0.4])) == pytest.approx(np.array([1, 3, 4, 5, 2]) / 15)
    assert tier_probabilities(np.array([np.nan])).tolist() == [1.0]


def test_the_loss_of_a_tier_is_the_mean_of_its_devices() -> None:
    losses = tier_losses(np.array([0, 0, 1, 2, 2]), np.array([1.0, 3.0, np.inf, np.nan, 0.5]), 3)
    assert losses[[0, 2]].tolist() == [2.0, 0.5] and math.isnan(losses[1])


def test_new_devices_are_profiled_first() -> None:
    fleet = fleet_of([1.0] * 10)
    fleet["selected"][[2, 5, 7]] = 0
    context = Context(fleet, np.random.default_rng(0))
    devices = Devices(fleet, fleet.idle())
    assert set(Tiers().select(devices, 2, context).tolist()) < {2, 5, 7}
    assert {2, 5, 7} < set(Tiers().select(devices, 5, context).tolist())
    assert context.memory == {"profiled": 5}
    assert len(set(Tiers(profile=5).select(devices, 2, context).tolist())) == 2 and "bounds" in context.memory


def test_a_choice_is_of_one_tier_of_like_speed() -> None:
    fleet = fleet_of([1.0, 10.0, 100.0, 1000.0] * 5)
    rng, memory, drawn = np.random.default_rng(0), dict[str, Any](), list[int]()
    for turn in range(40):
        context = Context(fleet, rng, round=turn, memory=memory)
        chosen = Tiers(tiers=4).select(Devices(fleet, fleet.idle()), 4, context)
        assert len(chosen) == 4 and len({int(row) % 4 for row in chosen}) == 1
        drawn.append(int(chosen[0]) % 4)
    assert set(drawn) == {0, 1, 2, 3}


def test_there_are_as_many_tiers_as_can_fill_a_round() -> None:
    fleet = fleet_of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    context = Context(fleet, np.random.default_rng(0))
    assert len(Tiers().select(Devices(fleet, fleet.idle()), 3, context)) == 3
    assert len(context.memory["bounds"]) == 1


def test_a_tier_without_credits_is_passed_over_until_all_are() -> None:
    fleet = fleet_of([1.0, 1.0, 10.0, 10.0])
    rng, memory, drawn = np.random.default_rng(0), dict[str, Any](), list[int]()
    for turn in range(12):
        context = Context(fleet, rng, round=turn, memory=memory)
        chosen = Tiers(tiers=2, credits=(3, 1)).select(Devices(fleet, fleet.idle()), 2, context)
        drawn.append(int(chosen[0]) // 2)
    assert [sum(drawn[i : i + 4]) for i in (0, 4, 8)] == [1, 1, 1]


def test_probabilities_change_where_the_tier_drawn_did_not_improve() -> None:
    """Algorithm 2: every I rounds, and only if its accuracy did not rise."""
    fleet = fleet_of([1.0, 1.0, 10.0, 10.0])
    rng, memory = np.random.default_rng(0), dict[str, Any]()
    seen = []
    for turn, losses in enumerate([(1.0, 2.0), (1.0, 2.0), (0.9, 1.9), (0.9, 1.9), (0.9, 1.9)]):
        fleet["loss"][:] = np.repeat(losses, 2)
        context = Context(fleet, rng, round=2 * turn, memory=memory)
        Tiers(tiers=2, interval=2).select(Devices(fleet, fleet.idle()), 2, context)
        seen.append(memory["probabilities"])
    even, adapted = [0.5, 0.5], pytest.approx([1 / 3, 2 / 3])
    assert seen == [even, even, even, adapted, adapted]


# ---------------------------------------------------------------- Oort (Lai et al. 2021)


def test_statistical_utility_is_that_of_the_paper() -> None:
    """|B| sqrt(1/|B| sum loss^2), where all samples of a device have the same loss."""
    samples, loss = np.array([4.0, 10.0]), np.array([0.5, 2.0])
    paper = [n * math.sqrt(sum(value**2 for _ in range(int(n))) / n) for n, value in zip(samples, loss, strict=True)]
    assert statistical_utility(samples, loss) == pytest.approx(paper)
    bad = statistical_utility(np.array([0.0, -1.0, np.nan, 5.0, 1e300]), np.array([1.0, 1.0, 1.0, np.nan, 1e300]))
    assert np.isnan(bad).all()


def test_utility_is_that_of_algorithm_1() -> None:
    rng = np.random.default_rng(3)
    u, last, t = rng.exponential(50.0, 40), rng.integers(1, 30, 40), rng.lognormal(1.0, 1.0, 40)
    now, preferred, alpha = 30, 2.5, 2.0
    paper = np.zeros(40)
    clip = np.percentile(u, 95.0)
    for i in range(40):
        paper[i] = min(u[i], clip) / clip + math.sqrt(0.1 * math.log(now) / last[i])
        if preferred < t[i]:
            paper[i] *= (preferred / t[i]) ** alpha
    # clipping interpolates the percentile, so the largest clipped utility is the percentile itself
    assert utility(u, last, now, t, preferred, alpha, 95.0) == pytest.approx(paper)
    assert len(utility(u[:0], last[:0], now, t[:0], preferred, alpha, 95.0)) == 0
    assert utility(np.zeros(2), np.ones(2, int), 1, t[:2], preferred, alpha, 95.0).tolist() == [0.0, 0.0]


def test_exploitation_draws_by_utility_above_the_cut_off() -> None:
    fleet = fleet_of([1.0] * 8)
    fleet["samples"][:] = 10.0
    fleet["loss"][:] = [10.0, 9.6, 9.0, 8.0, 7.0, 1.0, 1.0, 1.0]
    selector = Utility(exploration=0.0, exploration_floor=0.0, clip_percentile=100.0, cut_off=0.95)
    rng, counts, runs = np.random.default_rng(0), np.zeros(8), 2000
    for _ in range(runs):
        counts[selector.select(Devices(fleet, fleet.idle()), 1, Context(fleet, rng))] += 1
    assert (counts[2:] == 0).all()
    assert counts[0] / runs == pytest.approx(10.0 / 19.6, abs=0.04)


def test_exploration_draws_new_devices_by_speed_and_decays() -> None:
    fleet = fleet_of([1.0, 4.0] * 4)
    fleet["folded"][4:] = 0
    fleet["samples"][:4], fleet["loss"][:4] = 10.0, 1.0
    rng, selector = np.random.default_rng(0), Utility()
    for turn, share in ((0, 0.9), (34, 0.9 * 0.98**34), (400, 0.2)):
        first = [
            int(selector.select(Devices(fleet, fleet.idle()), 1, Context(fleet, rng, round=turn))[0])
            for _ in range(2000)
        ]
        new = [row for row in first if row >= 4]
        assert len(new) / 2000 == pytest.approx(share, abs=0.04)
        assert np.mean([row % 2 for row in new]) == pytest.approx(0.2, abs=0.05), (
            "four times as slow, a quarter as often"
        )


def test_slow_devices_are_penalised_and_worn_ones_left_out() -> None:
    fleet = fleet_of([1.0, 1.0, 1.0, 1.0, 1.0, 10.0])
    fleet["samples"][:], fleet["loss"][:] = 10.0, [1, 1, 1, 1, 5, 6]
    fleet["selected"][4] = 10
    context = Context(fleet, np.random.default_rng(0), round=50)
    selector = Utility(exploration=0.0, exploration_floor=0.0)
    chosen = [set(selector.select(Devices(fleet, fleet.idle()), 4, context).tolist()) for _ in range(20)]
    assert all(one == {0, 1, 2, 3} for one in chosen)
    assert len(selector.select(Devices(fleet, fleet.idle()), 6, context)) == 6, "none that is needed is left out"
    fleet["selected"][4] = 9
    assert 4 in selector.select(Devices(fleet, fleet.idle()), 4, context)


def test_the_pacer_relaxes_when_utility_falls() -> None:
    """Algorithm 1, pacer: T rises where the utility of the last W rounds is under that of the W before."""
    fleet = fleet_of([1.0, 2.0, 3.0])
    selector, memory = Utility(pacer_rounds=2, pacer_step=5.0, preferred_percentile=30.0), dict[str, Any]()
    percentiles = []
    for turn, loss in enumerate([4.0, 4.0, 3.0, 3.0, 3.0, 3.5, 1.0, 1.0, 1.0]):
        context = Context(fleet, np.random.default_rng(0), round=turn, memory=memory)
        selector.select(Devices(fleet, fleet.idle()), 1, context)
        selector.observe(outcome(0, loss), context)
        selector.observe(outcome(1, math.nan), context)
        percentiles.append(memory["percentile"])
    assert percentiles == [30, 30, 30, 30, 35, 35, 35, 35, 40]


def test_devices_that_report_no_loss_are_explored_once_and_then_average() -> None:
    fleet = fleet_of([1.0] * 4)
    memory: dict[str, Any] = {}
    chosen = Utility().select(Devices(fleet, fleet.idle()), 4, Context(fleet, np.random.default_rng(0), memory=memory))
    assert sorted(chosen.tolist()) == [0, 1, 2, 3]
