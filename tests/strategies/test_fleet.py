"""The table of devices: its idle set against a naive model, draws, and what is saved."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpace.protocol.paced import DeviceProfile
from fedpace.strategies.fleet import COLUMNS, USUAL, Fleet
from fedpace.strategies.pace import observe_task
from fedpace.strategies.usual import WIDTH, Window

moves = st.lists(st.tuples(st.sampled_from(["join", "leave", "begin", "end", "slots"]), st.integers(0, 5)), max_size=60)


def profile(node_id: int, slots: int) -> DeviceProfile:
    return DeviceProfile(node_id, f"d{node_id}", slots, 4, "", 8 << 30, ("A GPU",), (1 << 30,), load=0.25)


def replay(steps: list[tuple[str, int]]) -> tuple[Fleet, dict[int, list[int]]]:
    """A fleet, and the naive model: node id -> [alive, running, slots], for those that ever joined."""
    fleet, model = Fleet(), dict[int, list[int]]()
    for move, which in steps:
        node_id = 1000 + which
        row = fleet.row(node_id)
        if move == "join":
            fleet.join(node_id)
            model.setdefault(node_id, [0, 0, 1])[0] = 1
        elif row is None:
            continue
        elif move == "leave":
            fleet.leave(row)
            model[node_id][0] = 0
        elif move == "begin":
            fleet.begin(row)
            model[node_id][1] += 1
        elif move == "end" and model[node_id][1]:
            fleet.end(row)
            model[node_id][1] -= 1
        elif move == "slots":
            fleet.describe(row, profile(node_id, which))
            model[node_id][2] = max(1, which)
    return fleet, model


@settings(deadline=None, max_examples=80)
@given(moves)
def test_the_idle_are_those_alive_with_a_slot_free(steps: list[tuple[str, int]]) -> None:
    fleet, model = replay(steps)
    expected = {node_id for node_id, (alive, running, slots) in model.items() if alive and running < slots}
    idle = fleet.idle()
    assert sorted(fleet["node_id"][idle].tolist()) == sorted(expected)
    assert fleet.idle_count == len(expected)
    assert fleet.alive_count == sum(alive for alive, _, _ in model.values())
    assert [fleet["place"][row] for row in idle] == list(range(len(idle)))
    assert (fleet["place"] >= 0).sum() == len(idle)
    assert fleet.size == len(model)


@settings(deadline=None, max_examples=60)
@given(moves, st.integers(0, 8), st.integers(0, 2**32 - 1))
def test_a_draw_is_of_different_idle_devices(steps: list[tuple[str, int]], count: int, seed: int) -> None:
    fleet, _ = replay(steps)
    drawn = fleet.draw_idle(count, np.random.default_rng(seed))
    assert len(drawn) == len(set(drawn)) == min(count, fleet.idle_count)
    assert set(drawn) <= set(fleet.idle().tolist())


def test_draws_are_uniform() -> None:
    fleet, rng = Fleet(), np.random.default_rng(1)
    fleet.join_all(range(100, 120))
    for count in (1, 5):
        drawn = np.concatenate([fleet.draw_idle(count, rng) for _ in range(2000)])
        times = np.bincount(drawn, minlength=20)
        expected = 2000 * count / 20
        assert ((times - expected) ** 2 / expected).sum() < 45.3  # chi-square with 19 degrees of freedom, 99.94 %


@settings(deadline=None, max_examples=60)
@given(moves, st.lists(st.tuples(st.integers(0, 5), st.floats(0.1, 100), st.floats(0.01, 100)), max_size=20))
def test_saved_as_json_and_restored_it_is_the_same(
    steps: list[tuple[str, int]], tasks: list[tuple[int, float, float]]
) -> None:
    fleet, _ = replay(steps)
    for which, seconds, claimed in tasks:
        row = fleet.row(1000 + which)
        if row is not None:
            observe_task(fleet, row, seconds=seconds, compute_seconds=claimed, steps=3, bytes_moved=1e6 * claimed)
    back = Fleet.from_plain(json.loads(json.dumps(fleet.to_plain())))
    assert back.size == fleet.size and back.alive_count == fleet.alive_count
    assert back.idle().tolist() == fleet.idle().tolist()
    for name, (dtype, _) in COLUMNS.items():
        assert back[name].dtype == np.dtype(dtype)
        np.testing.assert_array_equal(back[name], fleet[name], err_msg=name)
    for name in USUAL:
        assert back.usual[name].recent == fleet.usual[name].recent
        np.testing.assert_equal(back.usual[name].median(), fleet.usual[name].median())
    again = [fleet.row(1000 + which) == back.row(1000 + which) for which in range(6)]
    assert all(again)
    for table in (fleet, back):  # both go on alike
        table.join_all(range(5000, 5200) if fleet.size else ())
        if table.row(1003) is not None:
            table.leave(table.row(1003) or 0)
    assert back.idle().tolist() == fleet.idle().tolist()
    assert back.to_plain()["idle"] == fleet.to_plain()["idle"]


def test_a_fleet_saved_empty_is_joined_after() -> None:
    assert Fleet.from_plain(Fleet().to_plain()).join(5) == 0


def test_rows_last_and_grow() -> None:
    fleet = Fleet()
    rows = [fleet.join(node_id) for node_id in range(7, 1007)]
    fleet["loss"][:] = np.arange(1000.0)
    fleet.leave(rows[3])
    assert fleet.join(10) == rows[3] == 3
    fleet.join(9999)
    assert fleet["loss"][:1000].tolist() == list(range(1000)) and np.isnan(fleet["loss"][1000])
    with pytest.raises(KeyError):
        fleet["colour"]


def test_a_profile_is_taken_over() -> None:
    fleet = Fleet()
    row = fleet.join(5)
    fleet.describe(row, profile(5, 3))
    assert (fleet["slots"][row], fleet["cpu_count"][row], fleet["gpu_count"][row]) == (3, 4, 1)
    assert fleet["memory_bytes"][row] == 8 << 30 and fleet["load"][row] == 0.25
    assert np.isnan(fleet["battery_percent"][row])


def test_held_updates_are_counted() -> None:
    fleet = Fleet()
    row = fleet.join(5)
    fleet.hold(row, 1)
    fleet.hold(row, 1)
    fleet.hold(row, -1)
    assert fleet["held"][row] == 1


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(-100, 100) | st.sampled_from([0.0, 1.0]), max_size=2 * WIDTH + 20))
def test_a_window_has_the_quantiles_of_its_last_values(values: list[float]) -> None:
    window = Window()
    for value in values:
        window.add(value)
    last = values[-WIDTH:]
    assert window.recent == last
    if not last:
        assert np.isnan(window.median()) and np.isnan(window.spread())
        return
    assert window.median() == pytest.approx(np.median(last), abs=1e-9)
    low, high = np.quantile(last, [0.1, 0.9])
    assert window.spread() == pytest.approx((high - low) / 2.5631, abs=1e-9)
