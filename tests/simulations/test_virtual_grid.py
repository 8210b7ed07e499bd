"""What an app sees of a simulated fleet, case by case. The laws are in test_virtual_grid_laws.py."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict

from fedpace.errors import RunError
from fedpace.hosting.flower import RunNotRunningException
from fedpace.protocol.failures import Code
from fedpace.protocol.paced import Expired, Failed, Order, Replied, Reported, census_of
from fedpace.simulations import results
from fedpace.simulations.trace import CANCELLED, EXPIRED, REPLIED
from tests.simulations.grids import (
    EVEN,
    NODE,
    STEPS,
    TASK,
    Counter,
    GridOf,
    content,
    events,
    orders,
    requests,
    wait_for,
)

DEVICES = 5

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
    grid = grid_of(EVEN, DEVICES, executor)
    ids = grid.send(content(), "train", orders(2, 2, 2))
    found = events(grid)
    assert [event.message_id for event in found if isinstance(event, Replied)] == ids
    assert [event.at for event in found] == pytest.approx([TASK, 2 * TASK, 3 * TASK], rel=1e-12)
    assert executor.states == [0, 1, 2]


def test_a_task_that_waits_lives_no_longer_than_it_may(grid_of: GridOf) -> None:
    executor = Counter()
    grid = grid_of(EVEN, DEVICES, executor)
    records = content(**STEPS)
    first, second, third = grid.push_messages(
        [*requests(grid, records, 2, 2, ttl=1.5 * TASK), *requests(grid, records, 2, ttl=2.5 * TASK)]
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
    grid = grid_of(EVEN, DEVICES, executor)
    records = content(**STEPS)
    going, waiting = grid.push_messages([*requests(grid, records, 2), *requests(grid, records, 2, ttl=ttl)])
    grid.push_messages(requests(grid, records, 3))
    fates = {event.message_id: type(event) for event in events(grid) if isinstance(event, Replied | Expired)}
    assert fates == {going: Replied, waiting: Expired, str(int(waiting) + 1): Replied}
    assert len(executor.seen) == 2


def test_a_task_that_ends_just_in_time_while_others_do(grid_of: GridOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waited for its device, and its time to live passes at the very moment of its end, which is another's too."""
    monkeypatch.setattr(results, "LOOKAHEAD", 1)
    executor = Counter()
    at_once = "down_mbit = 1e12\nup_mbit = 1e12\nlatency_ms = 0.0\n"  # less than a float of 1,000 s can tell
    grid = grid_of(f"[compute]\nseconds_per_step = 1.0\n[network]\n{at_once}", DEVICES, executor)
    one, two = (RecordDict({"config": ConfigRecord({"local-steps": steps})}) for steps in (1000, 2000))
    grid.push_messages([*requests(grid, one, 0), *requests(grid, one, 0, ttl=2000.0), *requests(grid, two, 1)])
    found = events(grid)
    assert [(type(event), event.at) for event in found] == [(Replied, 1000.0), (Replied, 2000.0), (Replied, 2000.0)]
    assert len({event.message_id for event in found if isinstance(event, Replied)}) == 3


def test_cancelling_what_waits_and_what_runs(grid_of: GridOf) -> None:
    executor = Counter()
    grid = grid_of(EVEN, DEVICES, executor)
    one, two, three, four = grid.send(content(), "train", orders(2, 2, 2, 2))
    grid.sleep(TASK / 2)
    grid.cancel([one, three, "unknown"])
    found = events(grid)
    assert [event.message_id for event in found if isinstance(event, Replied)] == [two, four]
    assert [event.at for event in found] == pytest.approx([1.5 * TASK, 2.5 * TASK], rel=1e-12)
    assert grid.trace.columns()["kind"].tolist()[:2] == [CANCELLED, CANCELLED]
    assert executor.states == [0, 1], "what was cancelled left no state"
    assert [computation.task for computation in executor.seen] == [2, 4]


def test_what_was_computed_ahead_and_then_cancelled_leaves_nothing(grid_of: GridOf) -> None:
    executor = Counter(cohort=2)
    grid = grid_of(EVEN, DEVICES, executor)
    first, second = grid.send(content(), "train", [*orders(0), Order(NODE + 1, {"local-steps": 17})])
    assert isinstance(event := grid.next_event(2 * TASK), Replied) and event.message_id == first
    assert executor.batches == [2], "computed together, though only one was needed"
    grid.cancel([second])
    (third,) = grid.send(content(), "train", orders(1))
    assert [event.message_id for event in events(grid) if isinstance(event, Replied)] == [third]
    assert executor.states == [0, 0, 0]
    assert (grid.counts.computed, grid.counts.received, grid.counts.cancelled) == (3, 2, 1)


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
    sent = [*requests(grid, content(**STEPS), 0), *requests(grid, content(**{"local-steps": 160}), 1)]
    (reply,) = grid.send_and_receive(sent, timeout=2 * TASK)
    assert reply.metadata.src_node_id == NODE and grid.now() == 2 * TASK
    (late,) = wait_for(grid, [sent[1].metadata.message_id])
    assert late.metadata.src_node_id == NODE + 1 and late.has_content()
    assert late.metadata.reply_to_message_id == sent[1].metadata.message_id


def test_pulling_what_is_not_known_takes_no_time(grid_of: GridOf) -> None:
    grid = grid_of()
    assert list(grid.pull_messages(["5", "x"])) == [] and grid.now() == 0.0


def test_waiting_for_ever_for_nothing_ends(grid_of: GridOf) -> None:
    grid = grid_of()
    with pytest.raises(RunError, match="nothing"):
        grid.next_event(math.inf)
    grid.send(content(), "train", orders(0))
    assert isinstance(grid.next_event(math.inf), Replied)


def test_reports_of_wear_are_kept_only_for_whoever_takes_events(grid_of: GridOf) -> None:
    grid = grid_of("[battery]\nhours_of_compute = 10.0\n")
    for _ in range(3):
        assert len(list(grid.send_and_receive(requests(grid, content(), 0, 1)))) == 2
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
