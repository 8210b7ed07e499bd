"""Drawing, turns, lengths of tasks, priorities, resources: against what anybody can count."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpace.errors import ConfigError
from fedpace.strategies.fleet import Fleet
from fedpace.strategies.pace import observe_task
from fedpace.strategies.parts import Context, Devices, Selector
from fedpace.strategies.selectors import LongestJobFirst, Priority, Resources, RoundRobin, ShortestJobFirst, Uniform
from fedpace.strategies.selectors.drawing import best, by_weight, expected_seconds, portion


def fleet_of(count: int) -> Fleet:
    fleet = Fleet()
    fleet.join_all(range(1, count + 1))
    return fleet


def choose(selector: Selector, fleet: Fleet, count: int, seed: int = 0) -> list[int]:
    chosen = selector.select(Devices(fleet, fleet.idle()), count, Context(fleet, np.random.default_rng(seed)))
    return [int(position) for position in chosen]


# ---------------------------------------------------------------- drawing


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12), st.integers(0, 14))
def test_the_best_are_those_that_sorting_finds(keys: list[tuple[int, int]], count: int) -> None:
    first, second = np.array(keys).T
    found = best(count, np.random.default_rng(0), first, second)
    assert len(set(found.tolist())) == len(found)
    assert [keys[i] for i in found] == sorted(keys)[:count]


def test_ties_are_drawn_uniformly() -> None:
    rng = np.random.default_rng(0)
    counts = np.bincount([best(1, rng, np.zeros(4))[0] for _ in range(4000)], minlength=4)
    assert abs(counts / 4000 - 0.25).max() < 0.03


def test_draws_by_weight_are_successive_draws_in_proportion() -> None:
    """The first of two is drawn by p_i, and a pair (i, j) by p_i p_j / (1 - p_i)."""
    p = np.array([0.5, 0.3, 0.2, 0.0])
    rng = np.random.default_rng(0)
    pairs = np.array([by_weight(2, rng, p * 7) for _ in range(6000)])
    for i, j in ((0, 1), (1, 0), (2, 1)):
        share = float(((pairs[:, 0] == i) & (pairs[:, 1] == j)).mean())
        assert share == pytest.approx(p[i] * p[j] / (1 - p[i]), abs=0.02)
    assert not (pairs == 3).any()
    assert sorted(by_weight(4, rng, p)) == [0, 1, 2, 3], "a weight of 0 comes last, and comes"


def test_a_portion_holds_on_average() -> None:
    rng = np.random.default_rng(0)
    assert np.mean([portion(1, 0.1, rng) for _ in range(4000)]) == pytest.approx(0.1, abs=0.02)
    assert np.mean([portion(10, 0.25, rng) for _ in range(4000)]) == pytest.approx(2.5, abs=0.05)
    assert {portion(3, 1.0, rng) for _ in range(100)} == {3} and {portion(3, 0.0, rng) for _ in range(100)} == {0}


def test_expected_seconds_are_own_steps_at_own_pace() -> None:
    fleet = fleet_of(4)
    for row, (took, steps) in enumerate([(11.0, 10.0), (21.0, 20.0)]):
        observe_task(fleet, row, seconds=took, compute_seconds=took - 1.0, steps=steps)
        fleet["steps"][row] = steps
    observe_task(fleet, 2, seconds=5.0, compute_seconds=4.0, steps=1.0)  # it does not say how many steps
    devices = Devices(fleet, np.arange(4))
    seconds = expected_seconds(devices, Context(fleet, np.random.default_rng(0)))
    assert seconds[:3] == pytest.approx([11.0, 21.0, 5.0])
    assert seconds[3] == pytest.approx(15 * 1.0 + 1.0), "the median of steps, seconds a step and overhead of the others"


def test_nothing_known_is_one_second_for_all() -> None:
    fleet = fleet_of(3)
    devices = Devices(fleet, np.arange(3))
    assert expected_seconds(devices, Context(fleet, np.random.default_rng(0))).tolist() == [1.0, 1.0, 1.0]


# ---------------------------------------------------------------- orders


def test_uniform_is_uniform() -> None:
    fleet, rng, counts = fleet_of(5), np.random.default_rng(0), np.zeros(5)
    for _ in range(3000):
        counts[Uniform().select(Devices(fleet, fleet.idle()), 2, Context(fleet, rng))] += 1
    assert abs(counts / 3000 - 0.4).max() < 0.04


def test_round_robin_takes_turns() -> None:
    fleet = fleet_of(7)
    for turn in range(30):
        fleet["last_selected"][choose(RoundRobin(), fleet, 2, seed=turn)] = turn
        assert turn - fleet["last_selected"].min() <= 4, "seven devices, two at a time: nobody waits for more than four"


def test_jobs_by_length() -> None:
    fleet = fleet_of(5)
    for row, seconds in enumerate([3.0, 1.0, 5.0, 2.0, 4.0]):
        observe_task(fleet, row, seconds=seconds, compute_seconds=seconds * 0.9, steps=1.0)
    assert choose(ShortestJobFirst(explore=0.0), fleet, 3) == [1, 3, 0]
    assert choose(LongestJobFirst(explore=0.0), fleet, 3) == [2, 4, 0]


def test_a_share_goes_to_those_that_wait_longest() -> None:
    fleet = fleet_of(10)
    for row in range(10):
        observe_task(fleet, row, seconds=row + 1.0, compute_seconds=row + 0.9, steps=1.0)
    fleet["last_selected"][:] = 5
    fleet["last_selected"][[8, 9]] = [2, -1]
    assert choose(ShortestJobFirst(explore=0.5), fleet, 4) == [0, 1, 9, 8]


def test_priorities_and_who_waits() -> None:
    fleet = fleet_of(5)
    fleet["last_selected"][:] = [3, 1, 2, 0, 4]
    by_node = Priority({1: 2.0, 3: 2.0, 5: -1.0, 99: 9.0}, explore=0.0)
    assert choose(by_node, fleet, 5) == [2, 0, 3, 1, 4]
    fleet["loss"][:] = [1.0, np.nan, 3.0, 2.0, 0.5]
    assert choose(Priority(lambda devices: devices.loss, default=2.5, explore=0.0), fleet, 3) == [2, 1, 3]
    assert choose(Priority({}, explore=0.0), fleet, 2) == [3, 1]
    with pytest.raises(ConfigError, match=r"shape \(2,\) for 5 devices"):
        choose(Priority(lambda devices: [1.0, 2.0]), fleet, 2)


# ---------------------------------------------------------------- resources


def test_scores_are_what_is_free() -> None:
    fleet = fleet_of(4)
    fleet["memory_bytes"][:] = 100.0
    fleet["free_memory_bytes"][:] = [50, 100, np.nan, 0]
    fleet["load"][:] = [0.5, 0.0, 0.2, 1.0]
    fleet["battery_percent"][:] = [80, np.nan, 40, 60]
    expected = [(2 * 0.5 + 0.5 + 0.8) / 4, (2 * 1.0 + 1.0 + 0.6) / 4, (2 * 0.5 + 0.8 + 0.4) / 4, 0.6 / 4]
    assert Resources(memory=2.0).scores(Devices(fleet, np.arange(4))) == pytest.approx(expected)


def test_devices_below_a_floor_are_left_out() -> None:
    fleet = fleet_of(6)
    fleet["battery_percent"][:] = [19.9, 20.0, np.nan, 100, 100, 100]
    fleet["free_memory_bytes"][:] = [9, 9, 9, 1, 9, np.nan]
    fleet["load"][:] = [0, 0, np.nan, 0, 0.95, 0.9]
    selector = Resources(min_free_bytes=2, max_load=0.9)
    for seed in range(20):
        assert sorted(choose(selector, fleet, 6, seed)) == [1, 2, 5]
    fleet["battery_percent"][:] = 1.0
    assert choose(selector, fleet, 6) == []


def test_what_is_free_is_chosen_more_often() -> None:
    fleet, rng = fleet_of(2), np.random.default_rng(0)
    fleet["load"][:] = [0.2, 0.8]
    selector = Resources(memory=0.0, battery=0.0)
    first = [int(selector.select(Devices(fleet, np.arange(2)), 1, Context(fleet, rng))[0]) for _ in range(3000)]
    assert np.mean(first) == pytest.approx(0.2, abs=0.03)
