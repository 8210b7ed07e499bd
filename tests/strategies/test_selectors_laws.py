"""What holds of every selector: different positions, no crash, the same choice again, memory that can be saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpace.errors import ConfigError
from fedpace.strategies import selectors
from fedpace.strategies.fleet import COLUMNS, Fleet
from fedpace.strategies.pace import observe_task
from fedpace.strategies.parts import Context, Devices, Outcome, Selector

SELECTORS: dict[str, Callable[[], Selector]] = {
    "Uniform": selectors.Uniform,
    "RoundRobin": selectors.RoundRobin,
    "ShortestJobFirst": selectors.ShortestJobFirst,
    "LongestJobFirst": selectors.LongestJobFirst,
    "Priority by node id": lambda: selectors.Priority({3: 2.0, 5: 1.0, 7: -1.0}),
    "Priority by function": lambda: selectors.Priority(lambda devices: devices.loss),
    "Tiers": lambda: selectors.Tiers(tiers=3, interval=2, profile=5, credits=(3, 2, 1)),
    "Utility": lambda: selectors.Utility(pacer_rounds=1, max_participations=2),
    "GainPerSecond": selectors.GainPerSecond,
    "Resources": selectors.Resources,
    "QLearning": selectors.QLearning,
    "Sarsa": selectors.Sarsa,
}
every_selector = pytest.mark.parametrize("name", SELECTORS)


def fleet_of(count: int) -> Fleet:
    fleet = Fleet()
    fleet.join_all(range(1, count + 1))
    return fleet


def outcome(row: int, seconds: float = 1.0, **changes: Any) -> Outcome:
    values: dict[str, Any] = {
        "steps": 1.0,
        "group": None,
        "sent_at": 0.0,
        "compute_seconds": seconds / 2,
        "bytes_moved": 1e6,
        "samples": 10.0,
        "loss": 1.0,
        "staleness": 0,
    }
    return Outcome(row=row, seconds=seconds, **(values | changes))


def test_every_selector_is_under_the_laws() -> None:
    assert {name.split()[0] for name in SELECTORS} == set(selectors.__all__)


# ---------------------------------------------------------------- any fleet, whatever its columns hold

values = st.floats(allow_nan=True, allow_infinity=True) | st.floats(0.0, 100.0) | st.just(float("nan"))
counters = {
    "selected": 0,
    "last_selected": -1,
    "folded": 0,
    "failed": 0,
    "failures_in_a_row": 0,
    "step_count": 0,
    "link_count": 0,
}


@st.composite
def fleets(draw: st.DrawFn) -> Fleet:
    fleet = fleet_of(draw(st.integers(1, 12)))
    for column, (dtype, _) in COLUMNS.items():
        if dtype == "f8" and draw(st.booleans()):
            fleet[column][:] = draw(st.lists(values, min_size=fleet.size, max_size=fleet.size))
        elif column in counters:
            few = st.integers(counters[column], 12)
            fleet[column][:] = draw(st.lists(few, min_size=fleet.size, max_size=fleet.size))
    return fleet


@st.composite
def outcomes(draw: st.DrawFn, row: int) -> Outcome:
    numbers = {name: draw(values) for name in ("seconds", "compute_seconds", "bytes_moved", "samples", "loss", "steps")}
    return outcome(row, **numbers, reason=draw(st.sampled_from(["", "", "it failed"])))


@every_selector
@settings(deadline=None, max_examples=40)
@given(st.data())
@pytest.mark.filterwarnings("ignore::RuntimeWarning:fedpace.strategies.pace")
def test_choices_are_different_in_range_and_the_same_again(name: str, data: st.DataObject) -> None:
    selector = SELECTORS[name]()
    fleet = data.draw(fleets())
    memory: dict[str, Any] = {}
    for turn in range(data.draw(st.integers(1, 5))):
        rows = np.array(data.draw(st.permutations(range(fleet.size))), dtype=np.intp)
        shown = Devices(fleet, rows[: data.draw(st.integers(1, fleet.size))])
        count = data.draw(st.integers(1, len(shown)))
        saved = json.dumps(memory, allow_nan=False)
        chosen = np.asarray(
            selector.select(shown, count, Context(fleet, np.random.default_rng(turn), round=turn, memory=memory))
        )
        assert chosen.dtype.kind == "i" and chosen.ndim == 1
        assert len(set(chosen.tolist())) == len(chosen) <= count
        assert all(0 <= position < len(shown) for position in chosen)
        assert len(chosen) == count or name in ("Resources", "Tiers")
        assert len(chosen) > 0 or name == "Resources"
        again = Context(fleet, np.random.default_rng(turn), round=turn, memory=json.loads(saved))
        assert np.asarray(selector.select(shown, count, again)).tolist() == chosen.tolist()
        assert again.memory == json.loads(json.dumps(memory, allow_nan=False))
        for row in shown.row[chosen]:
            fleet["selected"][row] += 1
            fleet["last_selected"][row] = turn
            if hasattr(selector, "observe") and data.draw(st.booleans()):
                selector.observe(
                    data.draw(outcomes(int(row))), Context(fleet, np.random.default_rng(0), round=turn, memory=memory)
                )
    json.dumps(memory, allow_nan=False)


# ---------------------------------------------------------------- nobody starves


@every_selector
def test_every_device_has_its_turn(name: str) -> None:
    """The last device is as slow, poor in memory and dull as can be, and it is selected all the same."""
    selector, fleet, memory = SELECTORS[name](), fleet_of(12), dict[str, Any]()
    rng = np.random.default_rng(5)
    fleet["memory_bytes"][:] = 1e9
    fleet["free_memory_bytes"][:] = np.where(np.arange(12) < 11, 9e8, 1e7)
    fleet["load"][:] = np.where(np.arange(12) < 11, 0.1, 0.95)
    for turn in range(400):
        context = Context(fleet, rng, round=turn, memory=memory)
        for position in np.asarray(selector.select(Devices(fleet, fleet.idle()), 2, context)):
            row = int(fleet.idle()[position])
            fleet["selected"][row] += 1
            fleet["last_selected"][row] = turn
            seconds = 100.0 if row == 11 else 1.0
            fleet["folded"][row] += 1
            fleet["samples"][row], fleet["loss"][row] = 10.0, 0.01 if row == 11 else 1.0
            observe_task(fleet, row, seconds=seconds, compute_seconds=seconds / 2, steps=1.0)
            if hasattr(selector, "observe"):
                selector.observe(outcome(row, seconds), context)
    assert fleet["selected"].min() >= (1 if name == "Utility" else 3)  # Oort promises it to devices never seen alone


# ---------------------------------------------------------------- a choice looks at the devices shown, and at no others


class Guarded(np.ndarray[Any, Any]):
    """A column that may be indexed by rows, and not read as a whole."""

    def __getitem__(self, key: Any) -> Any:
        assert isinstance(key, (int, np.integer)) or len(key) <= 4096, "a slice of the fleet was read"
        return np.asarray(self)[key]

    def __array_ufunc__(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("a whole column was computed with")

    def __array_function__(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("a whole column was read")


class GuardedFleet(Fleet):
    """A fleet whose columns may not be scanned, but for the two by which the pace module finds devices to compare with."""

    guarded = False

    def __getitem__(self, column: str) -> Any:
        values = super().__getitem__(column)
        return values.view(Guarded) if self.guarded and column not in ("step_count", "link_count") else values

    def idle(self) -> Any:
        assert not self.guarded, "all idle devices were listed"
        return super().idle()


@every_selector
def test_nothing_scans_the_fleet(name: str) -> None:
    selector, fleet = SELECTORS[name](), GuardedFleet()
    fleet.join_all(range(1, 5001))
    fleet["step_mean"][:10] = fleet["link_mean"][:10] = 0.0
    fleet["step_count"][:10] = fleet["link_count"][:10] = 1
    assert not getattr(selector, "needs_all", False)
    context = Context(fleet, np.random.default_rng(1))
    fleet.guarded = True
    for turn in range(8):
        context.round = turn
        rows = np.arange(turn, 40 + turn, dtype=np.intp)
        chosen = np.asarray(selector.select(Devices(fleet, rows), 4, context))
        for row in rows[chosen]:
            if hasattr(selector, "observe"):
                selector.observe(outcome(int(row)), context)
    assert len(json.dumps(context.memory)) < 20_000


def test_the_guard_sees_a_scan() -> None:
    fleet = GuardedFleet()
    fleet.join_all(range(1, 5001))
    fleet.guarded = True
    for scan in (lambda: np.flatnonzero(fleet["loss"]), lambda: fleet["loss"] > 1, lambda: fleet["loss"][:]):
        with pytest.raises((AssertionError, TypeError)):
            scan()


# ---------------------------------------------------------------- numbers out of range


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: selectors.ShortestJobFirst(explore=1.5), "explore is 1.5; choose from 0 to 1"),
        (lambda: selectors.LongestJobFirst(explore=float("nan")), "explore is nan"),
        (lambda: selectors.Priority({-1: 1.0}), "-1 is no node id"),
        (lambda: selectors.Priority({1: float("inf")}), "the priority of 1 is inf"),
        (lambda: selectors.Priority({}, default=float("nan")), "the priority of default is nan"),
        (lambda: selectors.Tiers(tiers=0), "tiers is 0; choose 1 or more"),
        (lambda: selectors.Tiers(credits=(1, 2)), "for each of the 5 tiers"),
        (lambda: selectors.Tiers(credits=0), "credits is 0"),
        (lambda: selectors.Utility(cut_off=-0.1), "cut_off is -0.1"),
        (lambda: selectors.Utility(clip_percentile=101), "clip_percentile is 101"),
        (lambda: selectors.Utility(max_participations=0), "max_participations is 0"),
        (lambda: selectors.Resources(min_battery_percent=101), "min_battery_percent is 101"),
        (lambda: selectors.Resources(memory=0, idle=0, battery=0), "are all 0"),
        (lambda: selectors.QLearning(discount=1.0), "QLearning: discount is 1"),
        (lambda: selectors.Sarsa(a=0, b=0), "Sarsa: a and b are both 0"),
        (lambda: selectors.Sarsa(learning_rate=2), "learning_rate is 2"),
    ],
)
def test_numbers_out_of_range_are_refused(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("(", r"\(")):
        make()
