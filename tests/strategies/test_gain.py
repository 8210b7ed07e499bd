"""The selector by gain a second: whom it prefers, and that it forgets nobody."""

from __future__ import annotations

import numpy as np
import pytest

from fedpace.errors import ConfigError
from fedpace.strategies.fleet import Fleet
from fedpace.strategies.pace import observe_task
from fedpace.strategies.parts import Context, Devices
from fedpace.strategies.selectors import GainPerSecond

DRAWS = 4000


def fleet_of(seconds: list[float], losses: list[float]) -> Fleet:
    fleet = Fleet()
    fleet.join_all(range(1, len(seconds) + 1))
    for row, (duration, loss) in enumerate(zip(seconds, losses, strict=True)):
        for _ in range(5):
            observe_task(fleet, row, seconds=duration, compute_seconds=duration, steps=1.0)
        fleet["steps"][row], fleet["loss"][row] = 1.0, loss
    return fleet


def shares(part: GainPerSecond, fleet: Fleet, *, remember: bool = False) -> list[float]:
    """How often each device is drawn, one at a time."""
    context = Context(fleet, np.random.default_rng(0))
    rows = np.arange(fleet.size)
    counts = np.zeros(fleet.size)
    for _ in range(DRAWS):
        (chosen,) = part.select(Devices(fleet, rows), 1, context)
        counts[chosen] += 1
        if remember:
            fleet["selected"][chosen] += 1
    return [float(count) / DRAWS for count in counts]


def test_devices_are_drawn_by_speed_and_by_loss() -> None:
    part = GainPerSecond(speed=2.0, loss=1.0, debt=0.0)
    found = shares(part, fleet_of([1.0, 2.0, 1.0, 1.0], [1.0, 1.0, 0.5, 1.0]))
    assert found == pytest.approx(np.array([4, 1, 2, 4]) / 11, abs=0.03)


def test_in_the_long_run_devices_come_in_proportion_to_a_power_of_their_speed() -> None:
    found = shares(GainPerSecond(speed=2.0, debt=1.0), fleet_of([1.0, 4.0], [1.0, 1.0]), remember=True)
    assert found == pytest.approx([0.8, 0.2], abs=0.02)


def test_a_slow_device_that_knows_what_others_do_not_is_not_forgotten() -> None:
    fleet = fleet_of([1.0, 1.0, 12.0], [0.1, 0.1, 0.1])
    seldom = shares(GainPerSecond(), fleet, remember=True)[2]
    fleet = fleet_of([1.0, 1.0, 12.0], [0.1, 0.1, 1.2])
    often = shares(GainPerSecond(), fleet, remember=True)[2]
    assert 1 / 30 < seldom < 1 / 20, "one over its slowness, beside two others"
    assert often > 0.2


def test_a_device_that_reported_no_loss_counts_as_the_upper_quartile_and_one_beyond_all_as_the_95th_percentile() -> (
    None
):
    losses = [1.0] * 70 + [4.0] * 29 + [float("nan"), 1e9]
    fleet = fleet_of([1.0] * len(losses), losses)
    found = shares(GainPerSecond(loss=1.0, debt=0.0), fleet)
    assert found[99] == pytest.approx(4 / (70 + 31 * 4), abs=0.01)
    assert found[100] == pytest.approx(4 / (70 + 31 * 4), abs=0.01)


@pytest.mark.parametrize("name", ["speed", "loss", "debt"])
def test_powers_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        GainPerSecond(**{name: -1.0})
