"""Apps that sleep, poll and look at the clock finish in virtual time; everybody else keeps the wall's."""

from __future__ import annotations

import queue
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from time import sleep
from typing import Any

import pytest
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import strategy_utils

from fedpace.hosting.virtualtime import EPOCH, virtual_time, wall_time
from fedpace.simulations.executors.inline import InlineExecutor
from tests.simulations.grids import EVEN, RUN_ID, GridOf, content

NAMES = ("sleep", "time", "time_ns", "monotonic", "monotonic_ns", "perf_counter")
REAL: dict[str, Callable[..., Any]] = {name: getattr(time, name) for name in NAMES}
SESSIONS = """
[availability]
model = "sessions"
session_median_seconds = 30.0
day_share = 0.3
night_share = 0.5
"""


class Clock:
    """Stands where a simulation does."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, 0

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += 1


@pytest.fixture
def clock() -> Iterator[Clock]:
    clock = Clock()
    with virtual_time(lambda: clock.now, clock.sleep):
        yield clock


@pytest.fixture
def quick() -> Iterator[None]:
    """Fails where more than a few seconds really pass."""
    started = REAL["monotonic"]()
    yield
    assert REAL["monotonic"]() - started < 10


# ---------------------------------------------------------------- the functions of `time`


def test_time_is_the_simulations(clock: Clock) -> None:
    clock.now = 2.5
    assert time.time() == EPOCH + 2.5 and time.time_ns() == round((EPOCH + 2.5) * 1e9)
    assert time.monotonic() == time.perf_counter() == 2.5 and time.monotonic_ns() == 2_500_000_000
    time.sleep(3600.0)
    sleep(1)
    time.sleep(0)
    assert clock.now == 3603.5
    with wall_time():
        assert time.monotonic() == pytest.approx(REAL["monotonic"](), abs=5)
    assert time.monotonic() == 3603.5


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf"), "1"])
def test_sleeping_refuses_what_it_always_does(clock: Clock, seconds: Any) -> None:
    with pytest.raises((ValueError, OverflowError, TypeError)) as real:
        REAL["sleep"](seconds)
    with pytest.raises(real.type):
        time.sleep(seconds)
    assert clock.now == 0.0


def test_a_loop_that_only_looks_at_the_clock_ends(clock: Clock, quick: None) -> None:
    until, looks = time.monotonic() + 60.0, 0
    while time.monotonic() < until:
        looks += 1
    assert clock.now >= 60.0 and looks < 200_000
    before = clock.now
    time.sleep(1.0)
    for _ in range(1_000):
        time.time()
    assert clock.now == before + 1.0, "but looking now and then costs nothing"


def test_all_is_put_back_at_the_end() -> None:
    old, flower = types.ModuleType("an_old_app"), vars(strategy_utils)
    app = vars(old)
    app.update(sleep=time.sleep, clock=time.monotonic)
    sys.modules["an_old_app"] = old
    before = {name: getattr(time, name) for name in NAMES}, flower["sleep"], dict(app)
    try:
        with pytest.raises(ZeroDivisionError), virtual_time(lambda: 7.0, lambda seconds: None):
            assert time.time() == EPOCH + 7.0
            assert flower["sleep"] is time.sleep is not REAL["sleep"]
            app["sleep"](1e6)
            assert app["clock"]() == 7.0, "names that were imported before are the simulation's too"
            kept = time.monotonic
            raise ZeroDivisionError
        assert ({name: getattr(time, name) for name in NAMES}, flower["sleep"], app) == before
        assert kept() == pytest.approx(REAL["monotonic"](), abs=5), "and what was imported inside is real afterwards"
    finally:
        del sys.modules["an_old_app"]


def test_other_threads_and_the_standard_library_keep_the_walls_time(clock: Clock) -> None:
    seen: list[float] = []

    def look() -> None:
        time.sleep(0.01)
        seen.append(time.monotonic())

    thread = threading.Thread(target=look)
    thread.start()
    thread.join(10.0)
    assert seen == [pytest.approx(REAL["monotonic"](), abs=10)]
    started = REAL["monotonic"]()
    with pytest.raises(queue.Empty):
        queue.Queue[int]().get(timeout=0.05)
    assert not threading.Event().wait(0.05)
    assert REAL["monotonic"]() - started >= 0.09
    assert clock.now == 0.0 and clock.slept == 0


# ---------------------------------------------------------------- apps

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Looks at the clock, and really sleeps."""
    started = time.time(), time.monotonic()
    time.sleep(0.02)
    metrics = MetricRecord({"at": started[0], "took": time.monotonic() - started[1]})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def test_a_client_app_sees_the_walls_time(grid_of: GridOf) -> None:
    grid = grid_of(EVEN, 2, InlineExecutor(app, RUN_ID, 2), clock=True)
    (reply,) = grid.send_and_receive([grid.create_message(content(), "train", 1000, "")])
    metrics: Any = reply.content.metric_records["metrics"]
    assert metrics["at"] == pytest.approx(REAL["time"](), abs=60) and 0.015 < metrics["took"] < 5
    assert time.time() == EPOCH + grid.now() and grid.now() < 5


def test_messages_tell_virtual_times(grid_of: GridOf) -> None:
    grid = grid_of(EVEN, 2, clock=True)
    time.sleep(100.0)
    message = grid.create_message(content(), "train", 1000, "", 60.0)
    (reply,) = grid.send_and_receive([message])
    assert message.metadata.created_at == EPOCH + 100.0
    assert reply.metadata.created_at == EPOCH + grid.now()


def test_waiting_for_nodes(grid_of: GridOf, quick: None) -> None:
    """Sleeping between looks as Flower's apps do, sleeping by another name, and not sleeping at all."""
    grid = grid_of(SESSIONS, 200, clock=True)
    there = len(list(grid.get_node_ids()))
    waits: list[Callable[[], None]] = [lambda: time.sleep(3), lambda: sleep(1), lambda: None]
    for more, wait in enumerate(waits, 1):
        while len(list(grid.get_node_ids())) < there + more:
            wait()
    assert len(list(grid.get_node_ids())) > there and grid.now() > 1.0
    while len(list(grid.get_node_ids())) > there - 3:  # and for some to go
        pass


def test_polling_with_a_time_out(grid_of: GridOf, quick: None) -> None:
    """The loop of apps that push and pull themselves; what is late is given up."""
    slow = "[[compute.classes]]\nname = 'a'\nseconds_per_step = 0.5\n[[compute.classes]]\nname = 'b'\nseconds_per_step = 500.0"
    grid = grid_of(f"[compute]\nmodel = 'classes'\n{slow}", 40, clock=True)
    fast = int((grid.fleet.devices.kind == 0).sum())
    ids = list(grid.push_messages([grid.create_message(content(), "train", node, "") for node in grid.get_node_ids()]))
    replies: list[Message] = []
    started = time.time()
    while len(replies) < len(ids) and time.time() < started + 60:
        replies += grid.pull_messages(ids)
        time.sleep(3)
    assert len(replies) == fast and 0 < fast < 40
    assert 60 <= time.monotonic() == grid.now() <= 64, "the clock of the loop is the grid's"


def test_polling_without_sleep(grid_of: GridOf, quick: None) -> None:
    grid = grid_of(EVEN, 40, clock=True)
    ids = set(grid.push_messages([grid.create_message(content(), "train", node, "") for node in grid.get_node_ids()]))
    while ids:
        ids -= {reply.metadata.reply_to_message_id for reply in grid.pull_messages(ids)}
    assert 0.6 < grid.now() < 2


def test_giving_up_by_the_clock_alone(grid_of: GridOf, quick: None) -> None:
    """A task of two hours, a time-out of one minute, a loop that asks the grid and the clock and does nothing else."""
    grid = grid_of("[compute]\nseconds_per_step = 720.0", 1, clock=True)
    (message_id,) = grid.push_messages([grid.create_message(content(), "train", 1000, "")])
    started = time.monotonic()
    while not list(grid.pull_messages([message_id])) and time.monotonic() - started < 60:
        pass
    assert 60 <= grid.now() <= 62
