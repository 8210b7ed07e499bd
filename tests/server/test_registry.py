"""What is known of devices: what they say, bounded, and what was seen of them."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpace.hosting.settings import ServerSettings
from fedpace.protocol import fleet_pb2 as pb
from fedpace.server.events import after_beat, after_reply, profile_of
from fedpace.server.registry import Device, Registry
from tests.generators import law

SETTINGS = ServerSettings(first_task_seconds=3600, deadline_factor=20, deadline_min_seconds=60)
seconds = st.floats(0, 1e6)


def result(compute: float = 1.0, down: float = 0.0, up: float = 0.0) -> pb.Result:
    return pb.Result(compute_seconds=compute, download_bytes_per_second=down, upload_bytes_per_second=up)


def device() -> Device:
    return Device(7, "seven")


@law
@given(st.lists(seconds, max_size=40))
def test_a_deadline_follows_the_slowest_of_the_last_tasks_of_its_kind(times: list[float]) -> None:
    one = device()
    for time in times:
        one.observe("train", result(time))
    one.observe("evaluate", result(1e9))
    last = times[-20:]
    assert one.budget_seconds("train", SETTINGS) == (max(60, 20 * max(last)) if last else 3600)
    assert one.budget_seconds("query", SETTINGS) == 3600
    assert one.tasks_done == len(times) + 1


@law
@given(st.lists(seconds, min_size=1, max_size=40), st.lists(seconds, max_size=40))
def test_an_operator_sees_medians(train: list[float], evaluate: list[float]) -> None:
    one = device()
    for time in train:
        one.observe("train", result(time, down=1 + time, up=2 + time))
    for time in evaluate:
        one.observe("evaluate", result(time))
    medians = [statistics.median(times[-20:]) for times in (train, evaluate) if times]
    state = one.state([], now=0.0)
    assert state.seconds_per_task == one.seconds_per_task == max(medians)
    assert state.download_bytes_per_second == statistics.median([1 + time for time in train[-20:]])
    assert state.upload_bytes_per_second == statistics.median([2 + time for time in train[-20:]])


def test_what_was_never_seen_is_left_out() -> None:
    state = device().state([], now=0.0)
    for name in ("seconds_per_task", "download_bytes_per_second", "upload_bytes_per_second", "staleness", "battery"):
        assert not state.HasField(name)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_device_that_talks_nonsense_of_its_speed_is_not_believed(bad: float) -> None:
    one = device()
    one.observe("train", result(bad, down=bad, up=bad))
    one.observe("train", result(5.0, down=10.0, up=20.0))
    state = one.state([], now=0.0)
    assert (state.seconds_per_task, state.download_bytes_per_second, state.upload_bytes_per_second) == (5.0, 10.0, 20.0)
    assert one.budget_seconds("train", SETTINGS) == 100.0


@pytest.mark.parametrize(("said", "shown"), [(0.25, 0.25), (7.0, 1.0), (-1.0, 0.0), (float("nan"), 0.0)])
def test_a_load_is_a_share(said: float, shown: float) -> None:
    registry = Registry()
    one = registry.join(7, "seven", pb.Hello(), 0.0)
    registry.heartbeat(one, pb.Heartbeat(load=said, free_memory_bytes=5))
    assert (one.load, one.free_memory_bytes, one.battery) == (shown, 5, None)
    registry.heartbeat(one, pb.Heartbeat(battery=pb.Battery(percent=50, plugged=True)))
    assert one.state([], 0.0).battery == pb.Battery(percent=50, plugged=True)


def test_strategies_hear_of_a_heartbeat_that_says_something_new() -> None:
    registry = Registry()
    one = registry.join(7, "seven", pb.Hello(), 0.0)

    def heard(load: float, free: int = 1000, percent: float = 80.0, plugged: bool = False) -> bool:
        battery = pb.Battery(percent=percent, plugged=plugged)
        return registry.heartbeat(one, pb.Heartbeat(load=load, free_memory_bytes=free, battery=battery))

    assert heard(0.50) and not heard(0.50)
    assert not heard(0.53) and heard(0.56), "changes add up until they matter"
    assert not heard(0.56, free=960) and heard(0.56, free=940)
    assert not heard(0.56, free=940, percent=79.5) and heard(0.56, free=940, percent=79.0)
    assert heard(0.56, free=940, percent=79.0, plugged=True)
    registry.join(7, "seven", pb.Hello(), 0.0)
    assert heard(0.56, free=940, percent=79.0, plugged=True), "who returns tells anew"


@pytest.mark.parametrize(
    ("battery", "percent"),
    [(None, None), (pb.Battery(percent=40.0), 40.0), (pb.Battery(percent=40.0, plugged=True), None)],
)
def test_what_a_strategy_knows_follows_heartbeats(battery: pb.Battery | None, percent: float | None) -> None:
    node = pb.Node(node_id=7, name="seven", slots=2, profile=pb.Profile(cpu_count=2))
    at_first = profile_of(node, None)
    assert (at_first.load, at_first.free_memory_bytes, at_first.battery_percent) == (None, None, None)
    seen = after_reply(at_first, pb.Replied(compute_seconds=3.0, upload_bytes_per_second=5.0))
    busy = after_beat(seen, pb.Heartbeat(load=0.5, free_memory_bytes=9, battery=battery))
    assert (busy.load, busy.free_memory_bytes, busy.battery_percent) == (0.5, 9, percent)
    assert (busy.seconds_per_task, busy.upload_bytes_per_second, busy.download_bytes_per_second) == (3.0, 5.0, None)
    again = profile_of(node, busy)
    assert (again.seconds_per_task, again.load) == (3.0, None), "what was observed stays, what it said does not"


def test_a_device_that_returns_is_the_same_with_a_new_profile() -> None:
    registry = Registry()
    first = registry.join(7, "seven", pb.Hello(profile=pb.Profile(cpu_count=2), slots=2), 10.0)
    first.observe("train", result(3.0))
    first.staleness = 4
    first.connected = False
    assert (registry.connected, first.state([], 12.0).state) == (0, "gone")
    again = registry.join(7, "seven", pb.Hello(profile=pb.Profile(cpu_count=8)), 20.0)
    assert again is first is registry.get(7) and list(registry) == [first] and registry.get(8) is None
    state = again.state([3, 5], now=22.5)
    assert (state.name, state.node_id, state.state, state.running) == ("seven", 7, "working", 2)
    assert (state.slots, state.profile.cpu_count, state.staleness, state.seen_seconds_ago) == (1, 8, 4.0, 2.5)
    assert (state.tasks_done, state.tasks_failed, state.seconds_per_task) == (1, 0, 3.0)
    assert again.state([], 0.0).state == "idle" and again.state([], 0.0).seen_seconds_ago == 0.0
    assert registry.connected == 1
