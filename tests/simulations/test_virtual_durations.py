"""The virtual clock is right: with fixed speeds a run takes what its closed form says."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import strategy as flower

from fedpace.simulations.executors.inline import InlineExecutor
from fedpace.simulations.fleets import SimulatedFleet, load_fleet
from fedpace.simulations.grid import VirtualGrid
from fedpace.simulations.taskgrid import DEFAULT_STEPS
from fedpace.simulations.transfers import REPLY_BYTES
from fedpace.strategies import FedAsync, FedAvg, FedBuff
from tests.simulations.grids import DOWN, EVEN, LATENCY, RUN_ID, STEP, UP, GridOf, nbytes, virtual_grid

DEVICES = 24
CLASSES = f"""
[[compute.classes]]
name = "fast"
share = 0.5
seconds_per_step = {STEP}
[[compute.classes]]
name = "slow"
share = 0.5
seconds_per_step = {3.25 * STEP}
"""
TWO_CLASSES = EVEN.replace(f"seconds_per_step = {STEP}", 'model = "classes"') + CLASSES

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    metrics = MetricRecord({"num-examples": 1 + int(context.node_config["partition-id"])})
    return Message(RecordDict({"arrays": message.content["arrays"], "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1, "loss": 0.5})}), reply_to=message)


def model() -> ArrayRecord:
    return ArrayRecord({"w": Array(np.ones(5_000, np.float32)), "b": Array(np.zeros((), np.float64))})


def duration(step_seconds: float, steps: float = DEFAULT_STEPS, up_bytes: int | None = None) -> float:
    """A task's seconds on a device of `EVEN`: there, computed, and back."""
    down = nbytes(RecordDict({"arrays": model()})) + REPLY_BYTES
    return LATENCY + down / DOWN + steps * step_seconds + LATENCY + (down if up_bytes is None else up_bytes) / UP


def class_seconds(fleet: SimulatedFleet) -> list[float]:
    """Seconds a step of every device, by the class it was drawn into."""
    return [(STEP, 3.25 * STEP)[kind] for kind in fleet.devices.kind.tolist()]


def arrival(durations: list[float], count: int) -> float:
    """When the `count`th result arrives of devices that begin again as soon as they are done."""
    due = [(seconds, 1, seconds) for seconds in durations]
    heapq.heapify(due)
    at = 0.0
    for _ in range(count):
        at, times, seconds = heapq.heappop(due)
        heapq.heappush(due, ((times + 1) * seconds, times + 1, seconds))
    return at


def even(grid_of: GridOf, toml: str = EVEN) -> VirtualGrid:
    return grid_of(toml, DEVICES, InlineExecutor(app, RUN_ID, DEVICES), clock=True)


def run(strategy: flower.Strategy, grid: VirtualGrid, rounds: int, **config: Any) -> float:
    result = strategy.start(grid, model(), num_rounds=rounds, train_config=ConfigRecord(config))
    np.testing.assert_allclose(result.arrays["w"].numpy(), np.ones(5_000, np.float32), rtol=1e-6)
    return grid.now()


def exactly(seconds: float) -> Any:
    return pytest.approx(seconds, rel=1e-9, abs=0)


# ---------------------------------------------------------------- rounds


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_rounds_of_like_devices(grid_of: GridOf, share: float) -> None:
    strategy = FedAvg(fraction_train=share, fraction_evaluate=0.0)
    assert run(strategy, even(grid_of), 7) == exactly(7 * duration(STEP))


def test_flowers_own_rounds_of_like_devices(grid_of: GridOf) -> None:
    strategy = flower.FedAvg(fraction_train=0.5, fraction_evaluate=0.0)
    assert run(strategy, even(grid_of), 7) == exactly(7 * duration(STEP))


@pytest.mark.parametrize("make", [FedAvg, flower.FedAvg])
def test_evaluation_takes_its_time_too(grid_of: GridOf, make: Callable[[], flower.Strategy]) -> None:
    """Its answer is small. It begins once a round's training is over, and the next round once it is over itself."""
    each = duration(STEP) + duration(STEP, up_bytes=REPLY_BYTES)
    assert run(make(), even(grid_of), 4) == exactly(4 * each)


@pytest.mark.parametrize("make", [FedAvg, flower.FedAvg])
def test_the_config_says_how_many_steps(grid_of: GridOf, make: Callable[..., flower.Strategy]) -> None:
    found = run(make(fraction_evaluate=0.0), even(grid_of), 3, **{"local-steps": 7})
    assert found == exactly(3 * duration(STEP, steps=7))


@pytest.mark.parametrize("make", [FedAvg, flower.FedAvg])
def test_a_round_is_as_long_as_its_slowest_device(grid_of: GridOf, make: Callable[..., flower.Strategy]) -> None:
    grid = even(grid_of, TWO_CLASSES)
    assert set(class_seconds(grid.fleet)) == {STEP, 3.25 * STEP}
    assert run(make(fraction_evaluate=0.0), grid, 5) == exactly(5 * duration(3.25 * STEP))


def test_a_round_shares_the_servers_link(grid_of: GridOf) -> None:
    """24 transfers at once over 48 Mbit/s: 2 Mbit/s each, both ways."""
    down = nbytes(RecordDict({"arrays": model()})) + REPLY_BYTES
    each = 2 * LATENCY + 2 * down / 0.25e6 + DEFAULT_STEPS * STEP
    found = run(FedAvg(fraction_evaluate=0.0), even(grid_of, EVEN + "server_mbit = 48.0\n"), 3)
    assert found == exactly(3 * each)


def test_the_preset_whose_speeds_are_rounded_to_float32(tmp_path: Path) -> None:
    fleet = load_fleet("uniform", DEVICES, 1)
    down = nbytes(RecordDict({"arrays": model()})) + REPLY_BYTES
    latency, step = (float(np.float32(seconds)) for seconds in (0.02, 0.05))
    each = 2 * latency + down / 12.5e6 + 10 * step + down / 6.25e6
    with virtual_grid(tmp_path, fleet, InlineExecutor(app, RUN_ID, DEVICES), clock=True) as grid:
        assert run(FedAvg(fraction_evaluate=0.0), grid, 6) == exactly(6 * each)


# ---------------------------------------------------------------- without rounds


@pytest.mark.parametrize("k", [1, 5, 24])
def test_fedbuff_of_like_devices(grid_of: GridOf, k: int) -> None:
    """Waves of 24: the version that takes the last of n arrivals is made in wave n / 24, rounded up."""
    waves = -(-9 * k // DEVICES)
    assert run(FedBuff(k=k), even(grid_of), 9) == exactly(waves * duration(STEP))


def test_fewer_devices_at_work_take_more_waves(grid_of: GridOf) -> None:
    assert run(FedBuff(k=4, train_nodes=6), even(grid_of), 9) == exactly(6 * duration(STEP))


@pytest.mark.parametrize("k", [1, 7])
def test_fedbuff_of_two_classes(grid_of: GridOf, k: int) -> None:
    grid = even(grid_of, TWO_CLASSES)
    durations = [duration(seconds) for seconds in class_seconds(grid.fleet)]
    assert run(FedBuff(k=k), grid, 12) == exactly(arrival(durations, 12 * k))


def test_fedasync_of_two_classes(grid_of: GridOf) -> None:
    grid = even(grid_of, TWO_CLASSES)
    durations = [duration(seconds) for seconds in class_seconds(grid.fleet)]
    assert run(FedAsync(), grid, 55) == exactly(arrival(durations, 55))


def test_what_devices_spent_is_compute_alone(grid_of: GridOf) -> None:
    grid = even(grid_of)
    run(FedAvg(fraction_evaluate=0.0), grid, 3)
    assert grid.counts.device_seconds == exactly(3 * DEVICES * DEFAULT_STEPS * STEP)
