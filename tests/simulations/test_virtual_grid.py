"""What an app sees of a simulated fleet, case by case. The laws are in test_virtual_grid_laws.py."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedpace.errors import RunError
from fedpace.hosting.flower import RunNotRunningException
from fedpace.protocol.failures import Code
from fedpace.protocol.paced import Event, Expired, Failed, Order, Replied, Reported, Tick, census_of
from fedpace.simulations import grid as module
from fedpace.simulations.executors.inline import InlineExecutor
from fedpace.simulations.grid import REPLY_BYTES, VirtualGrid
from fedpace.simulations.trace import CANCELLED, EXPIRED, REPLIED
from fedpace.simulations.work import Executor
from tests.simulations.grids import (
    DOWN,
    EVEN,
    LATENCY,
    RUN_ID,
    STEP,
    UP,
    Counter,
    content,
    make_fleet,
    nbytes,
    virtual_grid,
)

DEVICES = 5
NODE = 1000
TASK = 2 * LATENCY + (nbytes(content()) + REPLY_BYTES) * (1 / DOWN + 1 / UP) + 16 * STEP
"""Seconds of a task of 16 steps."""
STEPS = {"local-steps": 16}

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Says what it was sent, and spoils it."""
    config, arrays = message.content.config_records["config"], message.content.array_records["arrays"]
    metrics: dict[str, Any] = {
        "sum": float(arrays["w"].numpy().sum()),
        "lr": config.get("lr", 0.0),
        "list": config.get("list", []),
        "compute-seconds": 77.0,
    }
    arrays["w"] = Array(np.zeros(4, np.float32))
    config["lr"] = 9.0
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


@app.query()
def fail(message: Message, context: Context) -> Message:
    raise ValueError("no good")


GridOf = Callable[..., VirtualGrid]


@pytest.fixture
def grid_of(tmp_path: Path) -> Iterator[GridOf]:
    made: list[Any] = []

    def make(toml: str = EVEN, executor: Executor | None = None, devices: int = DEVICES) -> VirtualGrid:
        fleet = make_fleet(tmp_path, toml, devices)
        context = virtual_grid(tmp_path, fleet, executor or InlineExecutor(app, RUN_ID, devices))
        made.append(context)
        return context.__enter__()

    yield make
    for context in made:
        context.__exit__(None, None, None)


def messages(grid: VirtualGrid, records: RecordDict, *rows: int, ttl: float | None = None) -> list[Message]:
    return [grid.create_message(records, "train", NODE + row, "", ttl) for row in rows]


def events(grid: VirtualGrid, seconds: float = 1e5) -> list[Event]:
    """Everything that happens within some seconds."""
    until = grid.now() + seconds
    found: list[Event] = []
    while not isinstance(event := grid.next_event(until), Tick):
        found.append(event)
    return found


def orders(*rows: int, **config: Any) -> list[Order]:
    return [Order(NODE + row, {**STEPS, **config}) for row in rows]


# ---------------------------------------------------------------- what is sent


def test_what_is_changed_once_it_is_pushed_is_not_seen_by_devices(grid_of: GridOf) -> None:
    grid = grid_of()
    records = content(lr=0.5, list=[1.0])
    ids = grid.push_messages(messages(grid, records, 0, 1))
    change(records)
    records["arrays"] = ArrayRecord()
    replies = [*grid.send_and_receive([]), *wait_for(grid, ids)]
    assert [told(reply.content) for reply in replies] == [(4.0, 0.5, [1.0])] * 2

    grid.push_messages(messages(grid, RecordDict({**content(), "config": records["config"]}), 3))
    (event,) = events(grid)
    assert isinstance(event, Replied) and event.metrics["lr"] == 8.0, "but what is pushed then is"


def test_each_device_is_sent_its_own_config_over_the_common_one(grid_of: GridOf) -> None:
    grid = grid_of()
    first, second = content(lr=0.5, list=[1.0]), content(lr=2.0, list=[1.0])
    grid.send(first, "train", [Order(NODE, {}), Order(NODE + 1, {"list": [3.0]})])
    grid.send(second, "train", [Order(NODE + 2, {}), Order(NODE + 3, {"list": [4.0]})])
    found = {event.node_id - NODE: event.metrics for event in events(grid) if isinstance(event, Replied)}
    assert [(metrics["sum"], metrics["lr"], metrics["list"]) for _, metrics in sorted(found.items())] == [
        (4.0, 0.5, [1.0]),
        (4.0, 0.5, [3.0]),
        (4.0, 2.0, [1.0]),
        (4.0, 2.0, [4.0]),
    ]


def test_devices_that_are_sent_the_same_do_not_see_what_others_do_to_it(grid_of: GridOf) -> None:
    grid = grid_of()
    records = content(lr=0.5)
    replies = list(grid.send_and_receive(messages(grid, records, *range(DEVICES))))
    assert [told(reply.content) for reply in replies] == [(4.0, 0.5, [])] * DEVICES
    assert [reply.metadata.src_node_id for reply in replies] == [NODE + row for row in range(DEVICES)]
    assert told(next(iter(grid.send_and_receive(messages(grid, records, 0)))).content) == (4.0, 0.5, [])


def change(records: RecordDict) -> None:
    config: Any = records["config"]
    config["list"].append(2.0)
    config["lr"] = 8.0
    arrays = records.array_records["arrays"]
    arrays["w"].data = Array(np.full(4, 7, np.float32)).data
    arrays["w"] = Array(np.full(4, 9, np.float32))


def told(records: RecordDict) -> tuple[Any, ...]:
    metrics = records.metric_records["metrics"]
    return metrics["sum"], metrics["lr"], metrics["list"]


def wait_for(grid: VirtualGrid, ids: Any) -> list[Message]:
    ids = list(ids)
    found: list[Message] = []
    while len(found) < len(ids):
        before = grid.now()
        found += grid.pull_messages(ids)
        assert found or before < grid.now() <= before + 1, "a pull in vain lets time pass"
    return found


def test_an_app_tells_its_time_by_the_devices_clock(grid_of: GridOf) -> None:
    grid = grid_of()
    (reply,) = grid.send_and_receive(messages(grid, content(**STEPS), 0))
    assert reply.content.metric_records["metrics"]["compute-seconds"] == 16 * STEP
    assert grid.now() == pytest.approx(TASK, rel=1e-12)


def test_liars_lie_about_it(grid_of: GridOf) -> None:
    grid = grid_of(EVEN + "[misreport]\nshare = 1.0\ncompute_factor = 0.25\n")
    grid.send(content(), "train", orders(0))
    (event,) = events(grid)
    assert isinstance(event, Replied)
    assert (event.compute_seconds, event.metrics["compute-seconds"]) == (4 * STEP, 4 * STEP)
    assert grid.profile(NODE).seconds_per_task == 4 * STEP
    assert grid.counts.device_seconds == 16 * STEP and event.at == pytest.approx(TASK, rel=1e-12)


# ---------------------------------------------------------------- nobody there


def test_a_message_to_nobody_fails_at_once(grid_of: GridOf) -> None:
    grid = grid_of()
    there = grid.create_message(content(), "train", NODE, "")
    nowhere = [grid.create_message(content(), "train", node, "") for node in (0, 1, NODE - 1, NODE + DEVICES, 1 << 62)]
    replies = list(grid.send_and_receive([*nowhere[:3], there, *nowhere[3:]]))
    assert [reply.has_error() for reply in replies] == [True, True, True, False, True, True]
    assert {reply.error.code for reply in replies if reply.has_error()} == {int(Code.NODE_UNAVAILABLE)}
    assert (grid.counts.failed, grid.counts.received) == (5, 1)
    grid.send(content(), "train", [Order(NODE + 99, {})])
    (event,) = events(grid)
    assert isinstance(event, Failed) and "no such device" in event.reason


def test_a_device_that_is_away_fails_at_once(grid_of: GridOf, tmp_path: Path) -> None:
    (tmp_path / "there.csv").write_text("device,start,end\n0,5,10\n")
    grid = grid_of('[availability]\nmodel = "trace"\nfile = "there.csv"\ncycle_seconds = 20.0\n')
    assert list(grid.get_node_ids()) == []
    grid.send(content(), "train", orders(0))
    event = grid.next_event(1.0)
    assert isinstance(event, Failed) and (event.at, event.code) == (0.0, Code.NODE_UNAVAILABLE)
    while not list(grid.get_node_ids()):  # a loop that only looks
        assert grid.now() < 7
    assert len(list(grid.get_node_ids())) == DEVICES and 5 <= grid.now() <= 7


def test_what_is_known_of_nobody(grid_of: GridOf) -> None:
    grid = grid_of()
    for node in (0, NODE - 1, NODE + DEVICES):
        with pytest.raises(KeyError):
            grid.profile(node)
        with pytest.raises(KeyError):
            grid.census([NODE, node])


def test_a_census_is_what_the_profiles_say(grid_of: GridOf) -> None:
    grid = grid_of("[compute]\nload_high = 0.5\n[memory]\nsigma = 0.5\n[battery]\nhours_of_compute = 1.0\n")
    nodes = [NODE + row for row in (3, 0, 4)]
    expected, found = census_of([grid.profile(node) for node in nodes]), grid.census(nodes)
    for name, column in expected.items():
        np.testing.assert_array_equal(found[name], column, err_msg=name)


# ---------------------------------------------------------------- one task at a time


def test_tasks_of_one_device_follow_each_other(grid_of: GridOf) -> None:
    executor = Counter()
    grid = grid_of(EVEN, executor)
    ids = grid.send(content(), "train", orders(2, 2, 2))
    found = events(grid)
    assert [event.message_id for event in found if isinstance(event, Replied)] == ids
    assert [event.at for event in found] == pytest.approx([TASK, 2 * TASK, 3 * TASK], rel=1e-12)
    assert executor.states == [0, 1, 2]


def test_a_task_that_waits_lives_no_longer_than_it_may(grid_of: GridOf) -> None:
    executor = Counter()
    grid = grid_of(EVEN, executor)
    records = content(**STEPS)
    first, second, third = grid.push_messages(
        [*messages(grid, records, 2, 2, ttl=1.5 * TASK), *messages(grid, records, 2, ttl=2.5 * TASK)]
    )
    found = events(grid)
    assert [type(event) for event in found] == [Replied, Expired, Replied]
    assert [event.message_id for event in found] == [first, second, third]  # type: ignore[union-attr]
    # The device stops where the second expires, half way; the third has its time to live from when it was sent.
    assert [event.at for event in found] == pytest.approx([TASK, 1.5 * TASK, 2.5 * TASK], rel=1e-12)
    kinds = grid.trace.columns()["kind"].tolist()
    assert kinds == [REPLIED, EXPIRED, REPLIED] and len(executor.seen) == 2


@pytest.mark.parametrize("ttl", [TASK / 2, TASK])
def test_a_task_that_waits_till_the_end_of_its_time(grid_of: GridOf, ttl: float) -> None:
    """It is over at the very moment at which its device is free, or at which another one is."""
    executor = Counter()
    grid = grid_of(EVEN, executor)
    records = content(**STEPS)
    going, waiting = grid.push_messages([*messages(grid, records, 2), *messages(grid, records, 2, ttl=ttl)])
    grid.push_messages(messages(grid, records, 3))
    fates = {event.message_id: type(event) for event in events(grid) if isinstance(event, Replied | Expired)}
    assert fates == {going: Replied, waiting: Expired, str(int(waiting) + 1): Replied}
    assert len(executor.seen) == 2


def test_a_task_that_ends_just_in_time_while_others_do(grid_of: GridOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waited for its device, and its time to live passes at the very moment of its end, which is another's too."""
    monkeypatch.setattr(module, "LOOKAHEAD", 1)
    executor = Counter()
    at_once = "down_mbit = 1e12\nup_mbit = 1e12\nlatency_ms = 0.0\n"  # less than a float of 1,000 s can tell
    grid = grid_of(f"[compute]\nseconds_per_step = 1.0\n[network]\n{at_once}", executor)
    one, two = (RecordDict({"config": ConfigRecord({"local-steps": steps})}) for steps in (1000, 2000))
    grid.push_messages([*messages(grid, one, 0), *messages(grid, one, 0, ttl=2000.0), *messages(grid, two, 1)])
    found = events(grid)
    assert [(type(event), event.at) for event in found] == [(Replied, 1000.0), (Replied, 2000.0), (Replied, 2000.0)]
    assert len({event.message_id for event in found if isinstance(event, Replied)}) == 3


def test_cancelling_what_waits_and_what_runs(grid_of: GridOf) -> None:
    executor = Counter()
    grid = grid_of(EVEN, executor)
    one, two, three, four = grid.send(content(), "train", orders(2, 2, 2, 2))
    grid.sleep(TASK / 2)
    grid.cancel([one, three, "unknown"])
    found = events(grid)
    assert [event.message_id for event in found if isinstance(event, Replied)] == [two, four]
    assert [event.at for event in found] == pytest.approx([1.5 * TASK, 2.5 * TASK], rel=1e-12)
    assert grid.trace.columns()["kind"].tolist()[:2] == [CANCELLED, CANCELLED]
    assert executor.states == [0, 1], "what was cancelled left no state"
    assert [computation.task for computation in executor.seen] == [2, 4]


def test_a_result_that_nobody_took_can_be_cancelled(grid_of: GridOf) -> None:
    grid = grid_of()
    (message_id,) = grid.send(content(), "train", orders(0))
    grid.sleep(2 * TASK)
    grid.cancel([message_id])
    assert events(grid) == [] and list(grid.pull_messages([message_id])) == []
    assert (grid.counts.received, grid.counts.cancelled) == (1, 0)


# ---------------------------------------------------------------- waiting


def test_a_time_out_leaves_what_is_late_to_be_pulled(grid_of: GridOf) -> None:
    grid = grid_of()
    sent = [*messages(grid, content(**STEPS), 0), *messages(grid, content(**{"local-steps": 160}), 1)]
    (reply,) = grid.send_and_receive(sent, timeout=2 * TASK)
    assert reply.metadata.src_node_id == NODE and grid.now() == 2 * TASK
    (late,) = wait_for(grid, [sent[1].metadata.message_id])
    assert late.metadata.src_node_id == NODE + 1 and late.has_content()
    assert late.metadata.reply_to_message_id == sent[1].metadata.message_id


def test_pulling_what_is_not_known_takes_no_time(grid_of: GridOf) -> None:
    grid = grid_of()
    assert list(grid.pull_messages(["5", "x"])) == [] and grid.now() == 0.0


def test_the_app_of_a_device_fails(grid_of: GridOf) -> None:
    grid = grid_of()
    (message_id,) = grid.send(content(), "query", orders(0))
    (event,) = events(grid)
    assert isinstance(event, Failed) and event.message_id == message_id
    assert (event.code, event.reason) == (2, "ValueError: no good")
    assert (grid.counts.failed, grid.counts.received, grid.counts.computed) == (1, 0, 1)


def test_waiting_for_ever_for_nothing_ends(grid_of: GridOf) -> None:
    grid = grid_of()
    with pytest.raises(RunError, match="nothing"):
        grid.next_event(math.inf)
    grid.send(content(), "train", orders(0))
    assert isinstance(grid.next_event(math.inf), Replied)


def test_reports_of_wear_are_kept_only_for_whoever_takes_events(grid_of: GridOf) -> None:
    grid = grid_of("[battery]\nhours_of_compute = 10.0\n")
    for _ in range(3):
        assert len(list(grid.send_and_receive(messages(grid, content(), 0, 1)))) == 2
    assert events(grid, 0.0) == []
    grid.send(content(), "train", orders(0))
    assert [type(event) for event in events(grid)] == [Replied, Reported]


def test_a_stopped_run_ends_at_the_next_look(grid_of: GridOf) -> None:
    grid = grid_of()
    grid.send(content(), "train", orders(0))
    grid.stop()
    looks: list[Callable[[], Any]] = [
        lambda: grid.next_event(5.0),
        grid.get_node_ids,
        lambda: grid.pull_messages(["1"]),
        lambda: grid.push_messages([]),
        lambda: grid.sleep(1.0),
    ]
    for look in looks:
        with pytest.raises(RunNotRunningException):
            look()


def test_other_threads_are_told_to_leave_it_alone(grid_of: GridOf) -> None:
    grid = grid_of()
    raised: list[BaseException] = []

    def use() -> None:
        try:
            grid.get_node_ids()
        except RunError as error:
            raised.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join(10)
    assert len(raised) == 1 and "thread" in str(raised[0])
