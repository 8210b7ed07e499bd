"""Q-learning and SARSA: the updates against the textbook, and that they learn whom to choose."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpace.strategies.fleet import Fleet, Rows
from fedpace.strategies.pace import observe_task
from fedpace.strategies.parts import Context, Devices, Outcome
from fedpace.strategies.selectors import QLearning, Sarsa
from fedpace.strategies.selectors.learned import STATES, device_states, own_log_seconds, reward, track_quartiles

both = pytest.mark.parametrize("kind", [QLearning, Sarsa])


def fleet_of(count: int) -> Fleet:
    fleet = Fleet()
    fleet.join_all(range(1, count + 1))
    return fleet


def outcome(row: int, seconds: float, compute: float = math.nan, moved: float = math.nan, reason: str = "") -> Outcome:
    return Outcome(row, math.nan, None, 0.0, seconds, compute, moved, 1.0, 1.0, 0, reason)


def states(fleet: Fleet, rows: Rows, quartiles: list[float] | None = None) -> Rows:
    devices = Devices(fleet, rows)
    return device_states(devices, own_log_seconds(devices), quartiles)


# ---------------------------------------------------------------- states and rewards


def test_states_are_told_apart_and_numbered() -> None:
    fleet = fleet_of(5)
    fleet["load"][:] = [np.nan, 0.1, 0.5, 0.9, 0.9]
    fleet["memory_bytes"][:] = 100.0
    fleet["free_memory_bytes"][:] = [np.nan, 10, 30, 80, 80]
    fleet["failures_in_a_row"][:] = [0, 1, 7, 0, 0]
    fleet["step_mean"][:] = fleet["link_mean"][:] = [np.nan, 0.0, 1.0, 2.0, 9.0]
    quartiles = [0.5, 1.5, 2.5]
    two = math.log(2.0)  # computing and the rest take e^x each
    levels = np.stack(np.unravel_index(states(fleet, np.arange(5), quartiles), (5, 4, 4, 3)))
    assert levels[0].tolist() == [0, *(1 + sum(x + two >= q for q in quartiles) for x in (0.0, 1.0, 2.0, 9.0))]
    assert levels[1:].tolist() == [[0, 1, 2, 3, 3], [0, 1, 2, 3, 3], [0, 1, 2, 0, 0]]
    assert (states(fleet, np.arange(5)) // 48 == 0).all(), "no pace is known before the first task"


def test_running_quartiles_follow() -> None:
    rng, memory = np.random.default_rng(0), dict[str, Any]()
    for shift in (0.0, 3.0):
        for _ in range(1500):
            track_quartiles(memory, rng.normal(shift, 1.0, 3))
        assert memory["quartiles"] == pytest.approx([shift - 0.674, shift, shift + 0.674], abs=0.3)
    assert track_quartiles({}, np.array([np.nan])) is None


def test_the_reward_is_in_units_of_the_medians() -> None:
    memory: dict[str, Any] = {}
    for _ in range(5):
        assert reward(outcome(0, 2.0, 1.0, 1e6), memory, 3.0, 5.0) == pytest.approx(8.0)
    # Twice as fast; twice the bytes and half of the computing cost (2 + 1/2) / 2 medians.
    off = max(0.02, 1 / 6)  # how far a median has moved by then, in logarithms
    time = math.exp(math.log(0.5) + off)
    cost = (math.exp(math.log(2.0) - off) + math.exp(math.log(0.5) + off)) / 2
    assert reward(outcome(0, 1.0, 0.5, 2e6), memory, 3.0, 5.0) == pytest.approx(3.0 / time + 5.0 / cost)
    assert reward(outcome(0, 1.0, reason="it failed"), memory, 3.0, 5.0) == 0.0
    assert reward(outcome(0, 1e-9), memory, 1.0, 0.0) == 10.0, "and it is bounded"


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(*[st.floats(allow_nan=True, allow_infinity=True)] * 3), max_size=8))
def test_rewards_are_finite_whatever_is_said(said: list[tuple[float, float, float]]) -> None:
    memory: dict[str, Any] = {}
    for numbers in said:
        assert 0.0 <= reward(outcome(0, *numbers), memory, 1.0, 1.0) <= 20.0
    json.dumps(memory, allow_nan=False)


def test_the_median_is_one() -> None:
    rng, memory = np.random.default_rng(0), dict[str, Any]()
    for seconds in rng.lognormal(2.0, 1.0, 3000):
        reward(outcome(0, float(seconds)), memory, 1.0, 1.0)
    assert memory["medians"]["seconds"][0] == pytest.approx(2.0, abs=0.2)


# ---------------------------------------------------------------- updates


def prepared(kind: type[QLearning | Sarsa]) -> tuple[Any, Fleet, dict[str, Any], int]:
    """One device of two, chosen in state s, with values in the table and a task whose reward will be a + b = 2."""
    selector = kind(learning_rate=0.25, discount=0.5, exploration=0.0, exploration_floor=0.0)
    fleet = fleet_of(2)
    fleet["load"][:] = [0.1, 0.9]
    state = int(states(fleet, np.array([0]))[0])
    memory: dict[str, Any] = {"table": [[0.0, 0.0] for _ in range(STATES)]}
    memory["table"][state] = [1.0, 4.0]
    chosen = selector.select(Devices(fleet, np.arange(2)), 1, Context(fleet, np.random.default_rng(0), memory=memory))
    assert chosen.tolist() == [0] and memory["out"] == {"0": [state]}
    return selector, fleet, memory, state


def test_q_learning_takes_the_best_that_may_follow() -> None:
    selector, fleet, memory, state = prepared(QLearning)
    assert memory["table"][state] == [0.5 * 4.0, 4.0], "idling is worth the best of the same state, discounted"
    fleet["failures_in_a_row"][0] = 1  # so the next state is another one
    after = int(states(fleet, np.array([0]))[0])
    assert after != state
    memory["table"][after] = [7.0, 3.0]
    selector.observe(outcome(0, 2.0), Context(fleet, np.random.default_rng(0), memory=memory))
    assert memory["table"][state][1] == pytest.approx(4.0 + 0.25 * (2.0 + 0.5 * 7.0 - 4.0))
    assert memory["out"] == {}


@pytest.mark.parametrize("again", [True, False])
def test_sarsa_takes_what_does_follow(again: bool) -> None:
    selector, fleet, memory, state = prepared(Sarsa)
    assert memory["table"][state] == [0.5 * 4.0, 4.0], "all devices of the state were selected"
    fleet["failures_in_a_row"][0] = 1
    after = int(states(fleet, np.array([0]))[0])
    other = int(states(fleet, np.array([1]))[0])
    memory["table"][after] = [1.0, 3.0]
    memory["table"][other] = [0.0, 0.0 if again else 9.0]
    context = Context(fleet, np.random.default_rng(0), memory=memory)
    selector.observe(outcome(0, 2.0), context)
    assert memory["table"][state][1] == 4.0, "nothing is learned before the next choice"
    chosen = selector.select(Devices(fleet, np.arange(2)), 1, context)
    assert chosen.tolist() == [0 if again else 1]
    follows = 3.0 if again else 1.0
    assert memory["table"][state][1] == pytest.approx(4.0 + 0.25 * (2.0 + 0.5 * follows - 4.0))
    share = 1.0 if again else 0.0  # of the devices in that state that were selected
    assert memory["table"][after][0] == pytest.approx(0.5 * (share * 3.0 + (1.0 - share) * 1.0))
    assert memory["ended"] == []


@both
def test_a_failure_pays_nothing(kind: type[QLearning | Sarsa]) -> None:
    selector, fleet, memory, state = prepared(kind)
    context = Context(fleet, np.random.default_rng(0), memory=memory)
    fleet["failures_in_a_row"][0] = 1
    selector.observe(outcome(0, 2.0, reason="the device is gone"), context)
    selector.select(Devices(fleet, np.array([1])), 1, context)
    assert memory["table"][state][1] == pytest.approx(0.75 * 4.0)


# ---------------------------------------------------------------- learning


def run(kind: type[QLearning | Sarsa], turns: int, fails: bool = False) -> tuple[float, dict[str, Any]]:
    """Forty devices: even ones are fast and cheap, odd ones slow and dear (or fail). Share of even ones at the end."""
    selector, fleet, memory = kind(), fleet_of(40), dict[str, Any]()
    rng, fast = np.random.default_rng(2), list[float]()
    for turn in range(turns):
        context = Context(fleet, rng, round=turn, memory=memory)
        rows = fleet.idle()[selector.select(Devices(fleet, fleet.idle()), 10, context)]
        for row in rows.tolist():
            slow = bool(row % 2)
            seconds = float(rng.lognormal(0.0, 0.2)) * (1.0 if fails or not slow else 8.0)
            failed = slow and fails
            if failed:
                fleet["failures_in_a_row"][row] += 1
            else:
                observe_task(fleet, row, seconds=seconds, compute_seconds=seconds * 0.8, steps=1.0)
            selector.observe(outcome(row, seconds, 0.8 * seconds, 1e6, "it failed" if failed else ""), context)
        fast.append(float(np.mean(rows % 2 == 0)))
    return float(np.mean(fast[-30:])), json.loads(json.dumps(memory, allow_nan=False))


@both
def test_it_learns_to_choose_the_fast_and_cheap(kind: type[QLearning | Sarsa]) -> None:
    share, memory = run(kind, 150)
    assert share > 0.85, "one in ten is chosen at random; half of all devices are fast"
    assert not memory["out"]


@both
def test_it_learns_to_avoid_those_that_fail(kind: type[QLearning | Sarsa]) -> None:
    share, _ = run(kind, 150, fails=True)
    assert share > 0.85


@both
def test_tasks_called_off_are_forgotten(kind: type[QLearning | Sarsa]) -> None:
    selector, fleet = kind(), fleet_of(1)
    context = Context(fleet, np.random.default_rng(0))
    for _ in range(5):
        selector.select(Devices(fleet, np.array([0])), 1, context)
    assert len(context.memory["out"]["0"]) == 1
    selector.observe(outcome(0, 1.0), context)
    selector.observe(outcome(0, 1.0), context)  # of nobody's choosing: nothing to learn from
    assert context.memory["out"] == {}
