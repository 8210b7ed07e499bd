"""Laws that every fleet obeys, whatever its settings."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpace.simulations.fleets import REASONS, End, SimulatedFleet, load_fleet, preset_names
from fedpace.simulations.fleets.settings import (
    Availability,
    Battery,
    Compute,
    ComputeClass,
    Faults,
    FleetSettings,
    Memory,
    Misreport,
    Network,
    NetworkClass,
)

SIZE = 12
SEEDS = st.integers(0, 2**64 - 1)
NIGHTLY = Availability(model="sessions", session_median_seconds=60.0, day_share=0.5, night_share=0.8)

computes = st.builds(
    Compute,
    model=st.sampled_from(["constant", "lognormal"]),
    seconds_per_step=st.floats(1e-3, 10),
    jitter=st.sampled_from([0.0, 0.4]),
    load_high=st.sampled_from([0.0, 0.6]),
    drift_per_hour=st.sampled_from([0.0, 2.0]),
) | st.just(
    Compute(model="classes", classes=(ComputeClass("slow", 3.0, 2.0, 0.5, 1), ComputeClass("fast", 1.0, 0.1, 0.0, 8)))
)
networks = st.builds(
    Network,
    model=st.sampled_from(["constant", "lognormal", "normal"]),
    jitter=st.sampled_from([0.0, 0.5]),
    latency_sigma=st.sampled_from([0.0, 0.5]),
    server_mbit=st.sampled_from([math.inf, 200.0]),
) | st.just(Network(model="classes", classes=(NetworkClass("a", 1.0, 10.0, 1.0), NetworkClass("b", 2.0, 1.0, 0.1))))
settings_of_fleets = st.builds(
    FleetSettings,
    compute=computes,
    network=networks,
    availability=st.sampled_from([Availability(), NIGHTLY]),
    faults=st.builds(
        Faults, dropout=st.sampled_from([0.0, 0.5]), notice_seconds=st.just(100.0), failure=st.sampled_from([0.0, 0.3])
    ),
    memory=st.sampled_from([Memory(), Memory(total_mb=100.0, sigma=0.5, task_mb=20.0, task_factor=4.0)]),
    misreport=st.sampled_from([Misreport(), Misreport(share=0.5, compute_factor=0.3, profile_factor=4.0)]),
)
wears = st.sampled_from(["none", "battery", "heat", "both"])


def worn(fleet_settings: FleetSettings, wear: str) -> FleetSettings:
    """The same settings with devices that wear."""
    if wear in ("battery", "both"):
        fleet_settings = replace(fleet_settings, battery=Battery(hours_of_compute=0.02, start_low=0.2))
    if wear in ("heat", "both"):
        hot = replace(fleet_settings.compute, throttle_after_seconds=20.0, throttle_factor=3.0)
        fleet_settings = replace(fleet_settings, compute=hot)
    return fleet_settings


def make(fleet_settings: FleetSettings, seed: int, size: int = SIZE) -> SimulatedFleet:
    return SimulatedFleet("test", fleet_settings, size, seed, Path())


@st.composite
def task_lists(draw: st.DrawFn) -> list[tuple[int, int, float, float, int, int, int]]:
    """Arguments of `draw`, in the order of their times."""
    count = draw(st.integers(1, 25))
    span = draw(st.sampled_from([300.0, 2e5]))
    times = sorted(draw(st.lists(st.floats(0, span), min_size=count, max_size=count)))
    whole = st.integers(0, 10_000_000)
    one = st.tuples(st.integers(0, SIZE - 1), whole, st.floats(0, 200), whole, whole, st.integers(1, 50))
    return [(row, task, at, *rest) for at, (row, task, *rest) in zip(times, (draw(one) for _ in times), strict=True)]


def draw_all(fleet: SimulatedFleet, tasks: list[tuple[Any, ...]]) -> list[End]:
    return [fleet.draw(*task) for task in tasks]


def batches(tasks: list[tuple[Any, ...]]) -> Iterator[list[tuple[Any, ...]]]:
    """The tasks in their order, cut wherever a row would come twice: what a stateful fleet draws together."""
    batch: dict[int, tuple[Any, ...]] = {}
    for task in tasks:
        if task[0] in batch:
            yield list(batch.values())
            batch = {}
        batch[task[0]] = task
    yield list(batch.values())


@settings(max_examples=75, deadline=None)
@given(settings_of_fleets, wears, SEEDS, task_lists())
def test_one_by_one_and_together_are_the_same_bits(
    fleet_settings: FleetSettings, wear: str, seed: int, tasks: list[Any]
) -> None:
    fleet_settings = worn(fleet_settings, wear)
    together = make(fleet_settings, seed).draw_many(*(np.array(column) for column in zip(*tasks, strict=True)))
    one_by_one = draw_all(make(fleet_settings, seed), tasks)
    assert [together[index] for index in range(len(together))] == one_by_one

    fleet, found = make(fleet_settings, seed), []
    for batch in batches(tasks):
        ends = fleet.draw_many(*(np.array(column) for column in zip(*batch, strict=True)))
        found += [ends[index] for index in range(len(ends))]
    assert found == one_by_one


@settings(max_examples=75, deadline=None)
@given(settings_of_fleets, SEEDS, task_lists())
def test_draws_do_not_depend_on_their_order(fleet_settings: FleetSettings, seed: int, tasks: list[Any]) -> None:
    forwards, backwards = make(fleet_settings, seed), make(fleet_settings, seed)
    assert draw_all(forwards, tasks) == draw_all(backwards, tasks[::-1])[::-1]


@settings(max_examples=150, deadline=None)
@given(settings_of_fleets, wears, SEEDS, task_lists())
def test_ends_are_finite_and_in_order(fleet_settings: FleetSettings, wear: str, seed: int, tasks: list[Any]) -> None:
    fleet = make(worn(fleet_settings, wear), seed)
    free = dict.fromkeys(range(SIZE), 0.0)
    for row, task, at, *rest in tasks:
        at = max(at, free[row])  # a device works on one task at a time
        there = fleet.present(row, at)
        end = fleet.draw(row, task, at, *rest)
        free[row] = end.at
        seconds = (end.download_seconds, end.compute_seconds, end.upload_seconds)
        assert math.isfinite(end.at) and all(second >= 0 for second in seconds)
        slack = 1e-9 * max(1.0, end.at)
        assert at + sum(seconds) <= end.at + slack
        assert (end.reason == "absent") == (not there)
        assert (end.outcome == "left") == (end.reason in ("session", "battery", "absent"))
        if end.outcome == "replied":
            assert at + sum(seconds) == pytest.approx(end.at, abs=slack)
            assert end.at <= fleet.next_change(row, at)
        if end.outcome == "left":
            assert not fleet.present(row, end.at)
            back = fleet.next_change(row, end.at)
            assert not fleet.present(row, math.nextafter(back, 0)) and fleet.present(row, back)
        factor = fleet.settings.misreport.compute_factor if fleet.devices.liar[row] else 1.0
        assert end.claimed_compute_seconds == end.compute_seconds * factor


@settings(max_examples=75, deadline=None)
@given(settings_of_fleets, wears, SEEDS, st.integers(0, 2**32))
def test_same_seed_same_devices_and_larger_fleets_begin_with_smaller_ones(
    fleet_settings: FleetSettings, wear: str, seed: int, task: int
) -> None:
    fleet_settings = worn(fleet_settings, wear)
    small, large = make(fleet_settings, seed), make(fleet_settings, seed, 3 * SIZE)
    for field in small.devices.__dataclass_fields__:
        assert np.array_equal(getattr(small.devices, field), getattr(large.devices, field)[:SIZE])
    assert np.array_equal(small.initial_changes(), large.initial_changes()[:SIZE])
    assert small.draw(SIZE - 1, task, 0.0, 5, 100, 100) == large.draw(SIZE - 1, task, 0.0, 5, 100, 100)


def test_another_seed_is_another_fleet() -> None:
    one, other = load_fleet("flash", 1000, 1), load_fleet("flash", 1000, 2)
    assert not np.array_equal(one.devices.down, other.devices.down)
    assert not np.array_equal(one.initially_present(), other.initially_present())
    first, second = (f.draw_many(np.arange(1000), np.arange(1000), 0.0, 5, 100, 100) for f in (one, other))
    assert not np.array_equal(first.at, second.at)


@settings(max_examples=75, deadline=None)
@given(settings_of_fleets, wears, SEEDS, st.floats(0, 3e5))
def test_census_says_what_profiles_say(fleet_settings: FleetSettings, wear: str, seed: int, at: float) -> None:
    fleet = make(worn(fleet_settings, wear), seed)
    for row in range(0, SIZE, 2):
        fleet.draw(row, row, 0.0, 20, 1000, 1000)
    rows = np.array([3, 0, 7, 4])
    columns = fleet.census(rows, at)
    for index, row in enumerate(rows.tolist()):
        profile = fleet.profile(row, at)
        for name, column in columns.items():
            value = len(profile.gpus) if name == "gpu_count" else getattr(profile, name)
            np.testing.assert_array_equal(column[index], math.nan if value is None else value)
    everyone = fleet.census(at=at)
    assert all(np.array_equal(everyone[name][rows], column, equal_nan=True) for name, column in columns.items())


# ------------------------------------------------------------ presence


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.sampled_from([200.0, 3000.0]), st.sampled_from([0.01, 0.5, 0.9]), st.integers(0, SIZE - 1))
def test_presence_toggles(seed: int, median: float, share: float, row: int) -> None:
    availability = Availability(
        model="sessions", session_median_seconds=median, day_share=share, night_share=0.7, phase_spread_hours=24
    )
    fleet, late = (make(FleetSettings(availability=availability), seed) for _ in range(2))
    there, at = bool(fleet.initially_present()[row]), 0.0
    changes = [fleet.next_change(row, 0.0)]
    assert changes == [fleet.initial_changes()[row]]
    for _ in range(40):
        until = changes[-1]
        assert until > at
        for moment in (at, (at + until) / 2, math.nextafter(until, 0)):
            assert fleet.present(row, moment) == there
            assert fleet.next_change(row, moment) == until
        assert fleet.present(row, until) != there
        at, there = until, not there
        changes.append(fleet.next_change(row, at))
    # Another fleet is asked about the end first, then about the past.
    assert [late.next_change(row, moment) for moment in reversed([0.0, *changes[:-1]])] == changes[::-1]


def test_shares_follow_the_night() -> None:
    fleet = load_fleet("flash", 20_000, 3)
    rows = np.arange(20_000)
    for day, (hour, share) in itertools.product((0, 2), ((4, 0.2), (14, 0.05))):  # the simulation starts at 22 h
        ends = fleet.draw_many(rows, rows, (24.0 * day + hour) * 3600, 1, 1, 1)
        absent = ends.reason == REASONS.index("absent")
        assert 1 - absent.mean() == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("starts_at_hour", [2.0, 12.0])
def test_a_fleet_starts_in_the_middle_of_its_life(starts_at_hour: float) -> None:
    """As many are there in every minute, and as many come and go, as before the start."""
    steady = replace(NIGHTLY, day_share=0.3, night_share=0.3, starts_at_hour=starts_at_hour)
    fleet = make(FleetSettings(availability=steady), 5, 20_000)
    present, changes = [], []
    for at in (0.0, 20.0, 60.0, 200.0, 1000.0):
        present.append(np.mean([fleet.present(row, at) for row in range(fleet.size)]))
        soon = [fleet.present(row, at) and fleet.next_change(row, at) < at + 20.0 for row in range(fleet.size)]
        changes.append(np.mean(soon))
    assert present == pytest.approx([0.3] * 5, abs=0.015)
    assert changes == pytest.approx([changes[-1]] * 5, rel=0.1)


def test_state_is_all_that_draws_change() -> None:
    fleet, again, fresh = (make(worn(FleetSettings(), "both"), 1) for _ in range(3))
    rows = np.arange(SIZE)
    fleet.draw_many(rows, rows, 0.0, 300, 1000, 1000)
    for name, values in copy.deepcopy(fleet.state).items():
        again.state[name][:] = values
    expected, found, other = (each.draw_many(rows, rows + SIZE, 60.0, 600, 1, 1) for each in (fleet, again, fresh))
    assert [found[i] for i in range(SIZE)] == [expected[i] for i in range(SIZE)]
    assert not np.array_equal(other.at, expected.at)


@pytest.mark.parametrize("name", preset_names())
def test_a_fleet_takes_few_bytes_a_device(name: str) -> None:
    assert load_fleet(name, 10_000, 1).nbytes <= 112 * 10_000
