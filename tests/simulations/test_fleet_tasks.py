"""Tasks on fleets whose ends are known in closed form."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedpace.simulations.fleets import OUTCOMES, REASONS, End, Ends, SimulatedFleet, describe, load_fleet
from fedpace.simulations.fleets.settings import (
    Battery,
    Compute,
    ComputeClass,
    Faults,
    FleetSettings,
    Memory,
    Misreport,
    Network,
)

# 1 s a step; 1,000,000 and 500,000 bytes a second, 0.5 s of latency.
PLAIN = FleetSettings(
    compute=Compute(seconds_per_step=1.0), network=Network(down_mbit=8.0, up_mbit=4.0, latency_ms=500.0)
)
MANY = 40_000


def make(fleet_settings: FleetSettings, size: int = 4) -> SimulatedFleet:
    return SimulatedFleet("test", fleet_settings, size, 7, Path())


def draw_each(fleet_settings: FleetSettings, steps: float = 10, at: float = 0.0) -> Ends:
    rows = np.arange(MANY)
    return make(fleet_settings, MANY).draw_many(rows, rows, at, steps, 2_000_000, 1_000_000)


def test_a_plain_task() -> None:
    end = make(PLAIN).draw(2, 1, 100.0, 10, 2_000_000, 1_000_000)
    assert end == End(115.0, "replied", 10.0, 2.5, 2.5, 10.0)


def test_transfers_share_the_servers_link() -> None:
    fleet = make(replace(PLAIN, network=replace(PLAIN.network, server_mbit=16.0)))
    times = [fleet.draw(0, 1, 0.0, 10, 2_000_000, 1_000_000, transfers) for transfers in (0, 1, 2, 4, 8)]
    assert [end.download_seconds for end in times] == [2.5, 2.5, 2.5, 4.5, 8.5]
    assert [end.upload_seconds for end in times] == [2.5, 2.5, 2.5, 2.5, 4.5]


def test_load_slows_and_is_told() -> None:
    fleet = make(replace(PLAIN, compute=replace(PLAIN.compute, load_low=0.5, load_high=0.5)))
    assert fleet.draw(0, 1, 0.0, 10, 0, 0).compute_seconds == 20.0
    assert fleet.profile(0).load == 0.5


def test_jitter_has_mean_one() -> None:
    ends = draw_each(replace(PLAIN, compute=replace(PLAIN.compute, jitter=0.4)))
    assert ends.compute_seconds.mean() == pytest.approx(10.0, rel=0.01)
    assert np.log(ends.compute_seconds).std() == pytest.approx(0.4, rel=0.02)


def test_a_class_varies_as_it_says() -> None:
    kind = ComputeClass(name="only", seconds_per_step=2.0, sd_seconds=0.3)
    ends = draw_each(replace(PLAIN, compute=Compute(model="classes", classes=(kind,))))
    assert ends.compute_seconds.mean() == pytest.approx(20.0, rel=0.01)
    assert ends.compute_seconds.std() == pytest.approx(3.0, rel=0.02)


def test_drift_goes_on_to_its_limit() -> None:
    fleet = make(replace(PLAIN, compute=replace(PLAIN.compute, drift_per_hour=0.5, drift_limit=1.3)), 1000)
    rate = fleet.devices.drift.astype(np.float64) * 3600
    assert rate.min() >= 0 and rate.max() <= 0.5 and rate.mean() == pytest.approx(0.25, abs=0.02)
    for hours in (0.0, 1.0, 10.0):
        ends = fleet.draw_many(np.arange(1000), np.arange(1000), hours * 3600, 10, 0, 0)
        np.testing.assert_allclose(ends.compute_seconds, 10 * np.minimum(1 + rate * hours, 1.3), rtol=1e-12)


# ------------------------------------------------------------ what goes wrong


def test_dropouts_and_failures_are_as_frequent_as_said() -> None:
    ends = draw_each(replace(PLAIN, faults=Faults(dropout=0.2, failure=0.1, notice_seconds=30.0)))
    dropped, failed = (ends.outcome == OUTCOMES.index(name) for name in ("dropped", "failed"))
    assert dropped.mean() == pytest.approx(0.2, abs=0.01) and failed.mean() == pytest.approx(0.1, abs=0.01)
    spent = ends.download_seconds + ends.compute_seconds + ends.upload_seconds
    # Drop-outs come at any moment of the 15 s and are noticed later; failures at any moment of the 10 s of compute.
    np.testing.assert_allclose(ends.at[dropped], spent[dropped] + 30.0)
    np.testing.assert_allclose(np.percentile(spent[dropped], (0, 50, 100)), (0, 7.5, 15), atol=0.3)
    np.testing.assert_allclose(ends.at[failed], spent[failed] + 0.5)
    np.testing.assert_allclose(np.percentile(ends.compute_seconds[failed], (0, 50, 100)), (0, 5, 10), atol=0.3)
    assert set(ends.reason[failed]) == {REASONS.index("error")}
    assert (ends.at[~dropped & ~failed] == 15.0).all()


def test_a_task_too_large_fails_at_once() -> None:
    fleet = make(replace(PLAIN, memory=Memory(total_mb=100.0, used=0.5, task_mb=10.0, task_factor=4.0)))
    fits, too_large = fleet.draw(0, 1, 0.0, 10, 10_000_000, 0), fleet.draw(0, 1, 0.0, 10, 10_000_001, 0)
    assert fits.outcome == "replied"
    assert (too_large.outcome, too_large.reason, too_large.compute_seconds) == ("failed", "memory", 0.0)
    assert too_large.at == pytest.approx(0.5 + 10.000001 + 0.5)


def test_liars_claim_another_time_and_another_profile() -> None:
    fleet = make(replace(PLAIN, misreport=Misreport(share=0.25, compute_factor=0.1, profile_factor=3.0)), MANY)
    liar, honest = int(np.flatnonzero(fleet.devices.liar)[0]), int(np.flatnonzero(~fleet.devices.liar)[0])
    assert fleet.devices.liar.mean() == pytest.approx(0.25, abs=0.01)
    ends = {row: fleet.draw(row, 1, 0.0, 10, 0, 0) for row in (liar, honest)}
    assert [ends[row].compute_seconds for row in (liar, honest)] == [10.0, 10.0]
    assert [ends[row].claimed_compute_seconds for row in (liar, honest)] == [1.0, 10.0]
    assert [fleet.profile(row).cpu_count for row in (liar, honest)] == [12, 4]
    assert fleet.profile(liar).memory_bytes == 3 * fleet.profile(honest).memory_bytes


# ------------------------------------------------------------ wear

BATTERY = replace(
    PLAIN,
    battery=Battery(
        hours_of_compute=1.0, hours_to_charge=2.0, start_low=1.0, start_high=1.0, leave_below=0.25, return_above=0.75
    ),
)


def test_a_battery_runs_down_and_is_charged() -> None:
    fleet = make(BATTERY)
    assert fleet.profile(0).battery_percent == 100.0
    assert fleet.draw(0, 1, 0.0, 900, 0, 0).at == 901.0
    assert fleet.profile(0, 900.5).battery_percent == pytest.approx(75.0)
    assert fleet.profile(0, 900.5 + 720).battery_percent == pytest.approx(85.0)
    assert fleet.profile(0, 1e6).battery_percent == 100.0

    end = fleet.draw(0, 2, 1e6, 3600, 0, 0)  # three quarters of an hour, then it leaves for an hour
    assert (end.outcome, end.reason) == ("left", "battery")
    assert end.compute_seconds == pytest.approx(2700) and end.at == pytest.approx(1e6 + 2700.5)
    back = fleet.next_change(0, end.at)
    assert back == pytest.approx(end.at + 3600)
    assert fleet.next_change(0, 1e6) == end.at
    assert [fleet.present(0, time) for time in (end.at - 1, end.at, back - 1, back)] == [True, False, False, True]
    assert fleet.draw(0, 3, end.at + 1, 1, 0, 0).reason == "absent"
    assert fleet.profile(0, back).battery_percent == pytest.approx(75.0)
    assert fleet.next_change(0, back) == math.inf


def test_a_task_called_off_gives_back_what_it_did_not_use() -> None:
    fleet = make(BATTERY)
    end = fleet.draw(0, 1, 0.0, 3600, 0, 0)
    assert end.outcome == "left"
    fleet.stop(0, 360.5)
    assert fleet.present(0, end.at) and fleet.next_change(0, 361.0) == math.inf
    assert fleet.profile(0, 360.5).battery_percent == pytest.approx(90.0)
    fleet.stop(0, 400.0)  # nothing is left to give back
    assert fleet.profile(0, 360.5).battery_percent == pytest.approx(90.0)


def test_heat_slows_and_goes() -> None:
    compute = replace(PLAIN.compute, throttle_after_seconds=60.0, throttle_factor=3.0, throttle_cool_seconds=120.0)
    fleet = make(replace(PLAIN, compute=compute))
    cool = fleet.draw(0, 1, 0.0, 40, 0, 0)
    assert cool.compute_seconds == 40.0
    warm = fleet.draw(0, 2, 40.5, 40, 0, 0)  # no time between the two computations, 20 s of room
    assert warm.compute_seconds == pytest.approx(20 + 3 * 20, abs=1)
    rested = fleet.draw(0, 3, warm.at + 120.0, 60, 0, 0)
    assert rested.compute_seconds == 60.0
    half = fleet.draw(0, 4, rested.at - 1.0 + 60.0, 60, 0, 0)  # half cool: 30 s of room
    assert half.compute_seconds == pytest.approx(30 + 3 * 30)


def test_a_hot_device_that_is_stopped_is_still_hot() -> None:
    compute = replace(PLAIN.compute, throttle_after_seconds=60.0, throttle_factor=3.0, throttle_cool_seconds=120.0)
    fleet = make(replace(PLAIN, compute=compute))
    for row, stopped, cool_seconds in ((0, 400.5, 0.0), (1, 30.5, 30.0)):
        fleet.draw(row, 1, 0.0, 1000, 0, 0)
        fleet.stop(row, stopped)
        again = fleet.draw(row, 2, stopped - 0.5, 100, 0, 0)
        assert again.compute_seconds == pytest.approx(cool_seconds + 3 * (100 - cool_seconds))


def test_wear_is_one_rows_own() -> None:
    fleet = make(BATTERY)
    fleet.draw(0, 1, 0.0, 3600, 0, 0)
    assert fleet.profile(1, 1e4).battery_percent == 100.0 and fleet.present(1, 3000.0)
    assert fleet.stateful and not make(PLAIN).stateful and make(PLAIN).state == {}


# ------------------------------------------------------------ for people


def test_the_table_says_what_is_modelled() -> None:
    uniform, edge, liars = (describe(load_fleet(name, 1000, 1)) for name in ("uniform", "edge-extreme", "liars"))
    assert uniform.splitlines()[0] == "uniform: 1,000 devices"
    assert uniform.splitlines()[2].split() == ["seconds", "a", "step"] + 5 * ["0.05"]
    assert "always" in uniform and "battery" not in uniform
    for part in ("server's link", "battery", "throttling", "drift", "at the start (sessions)", "10.0% dropped"):
        assert part in edge
    assert "misreporting" in liars and "compute time x 0.2" in liars
    assert "Pixel 4 0.4" in describe(load_fleet("flash", 100_000, 1))
