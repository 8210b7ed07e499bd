"""Presets against the figures that they cite."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedpace.simulations.fleets import OUTCOMES, REASONS, SimulatedFleet, load_fleet, preset_names
from fedpace.simulations.fleets.devices import BYTES_PER_MBIT

SIZE = 50_000


@pytest.fixture(scope="module")
def fleets() -> dict[str, SimulatedFleet]:
    return {name: load_fleet(name, SIZE, 1) for name in preset_names()}


def spread(values: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> tuple[float, float]:
    """Standard deviation of ln, and p95 / p5."""
    low, high = np.percentile(values, (5, 95))
    return float(np.log(values).std()), float(high / low)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_says_what_it_is_and_works(fleets: dict[str, SimulatedFleet], name: str) -> None:
    fleet = fleets[name]
    assert fleet.name == name and len(fleet.settings.description) > 40
    ends = fleet.draw_many(np.arange(2000), np.arange(2000), 0.0, 20, 400_000, 400_000)
    assert np.isfinite(ends.at).all() and (ends.outcome == OUTCOMES.index("replied")).sum() > 50


def test_uniform_is_a_closed_form(fleets: dict[str, SimulatedFleet]) -> None:
    ends = fleets["uniform"].draw_many(np.arange(SIZE), np.arange(SIZE), 1000.0, 20, 2_500_000, 2_500_000)
    # 20 ms and 20 Mbit at 100 Mbit/s; 20 steps of 50 ms; 20 ms and 20 Mbit at 50 Mbit/s
    np.testing.assert_allclose(ends.at, 1000.0 + 0.02 + 0.2 + 1.0 + 0.02 + 0.4, rtol=1e-9)
    assert (ends.outcome == OUTCOMES.index("replied")).all()


def test_flash_has_the_published_classes(fleets: dict[str, SimulatedFleet]) -> None:
    fleet = fleets["flash"]
    shares = np.bincount(fleet.devices.kind) / SIZE
    np.testing.assert_allclose(shares, (0.53, 0.46, 0.004), atol=0.01)
    rows = np.repeat(np.flatnonzero(fleet.initially_present()), 10)
    # One step, so that a task is one of the batches that were measured; sent as nothing, so that few sessions end first.
    ends = fleet.draw_many(rows, np.arange(len(rows)), 0.0, 1, 0, 0)
    replied = ends.outcome == OUTCOMES.index("replied")
    for kind, (mean, sd) in enumerate(((1.642, 0.0995), (0.588, 0.0239), (0.179, 0.0023))):
        seconds = ends.compute_seconds[replied & (fleet.devices.kind[rows] == kind)]
        assert seconds.mean() == pytest.approx(mean, rel=0.01)
        assert seconds.std() == pytest.approx(sd, rel=0.1)


def test_flash_loses_as_many_as_published(fleets: dict[str, SimulatedFleet]) -> None:
    fleet = fleets["flash"]
    present = np.flatnonzero(fleet.initially_present())
    ends = fleet.draw_many(present, present, 0.0, 20, 400_000, 400_000)
    dropped = ends.outcome == OUTCOMES.index("dropped")
    assert 0.06 <= dropped.mean() <= 0.10  # Google
    assert (ends.outcome != OUTCOMES.index("replied")).mean() > 0.10  # FLASH: for all reasons
    assert not (ends.reason == REASONS.index("absent")).any()


def test_sessions_are_as_long_as_published(fleets: dict[str, SimulatedFleet]) -> None:
    """REFL: half of all sessions last at most 5 minutes, 70 % at most 10."""
    fleet = fleets["flash"]
    lengths = []
    for row in range(3000):
        at = fleet.next_change(row, 0.0)
        if fleet.present(row, at):
            lengths.append(fleet.next_change(row, at) - at)
    assert np.mean(np.array(lengths) <= 300) == pytest.approx(0.5, abs=0.03)
    assert np.mean(np.array(lengths) <= 600) == pytest.approx(0.7, abs=0.03)


def test_day_and_night_are_four_apart(fleets: dict[str, SimulatedFleet]) -> None:
    availability = fleets["flash"].settings.availability
    assert availability.night_share / availability.day_share == pytest.approx(4.0)  # Google


@pytest.mark.parametrize("name", ["flash", "liars"])
def test_networks_are_normal(fleets: dict[str, SimulatedFleet], name: str) -> None:
    for speeds in (fleets[name].devices.down, fleets[name].devices.up):
        mbit = speeds / BYTES_PER_MBIT
        assert mbit.min() >= 1.0
        np.testing.assert_allclose(np.percentile(mbit, (25, 50, 75)), (20 - 6.745, 20, 20 + 6.745), atol=1.0)


def test_edge_spreads_as_accelerators_do(fleets: dict[str, SimulatedFleet]) -> None:
    """AI Benchmark, FP32 on the accelerator: sd of ln 1.55, p95 / p5 = 162, the load of each device apart."""
    devices = fleets["edge-extreme"].devices
    sd, ratio = spread(devices.step_seconds * (1 - devices.load))
    assert sd == pytest.approx(1.55, rel=0.02) and ratio == pytest.approx(162, rel=0.1)
    mean = np.average((12.8, 5.2, 2.0, 0.52), weights=(0.4, 0.3, 0.2, 0.1))
    assert devices.down.mean() / BYTES_PER_MBIT == pytest.approx(mean, rel=0.02)


def test_liars_spread_as_processors_do(fleets: dict[str, SimulatedFleet]) -> None:
    """AI Benchmark, the CPU: sd of ln 0.93. Its p95 / p5 = 17 is a little less than that of a log-normal."""
    sd, ratio = spread(fleets["liars"].devices.step_seconds)
    assert sd == pytest.approx(0.93, rel=0.02) and ratio == pytest.approx(17, rel=0.3)
    assert fleets["liars"].devices.liar.mean() == pytest.approx(0.2, abs=0.01)


def test_cross_silo_is_fast_and_there(fleets: dict[str, SimulatedFleet]) -> None:
    fleet = fleets["cross-silo"]
    assert fleet.always_present and math.isfinite(fleet.server_bytes_per_second)
    assert np.percentile(fleet.devices.step_seconds, 95) < fleets["flash"].devices.step_seconds.min()
