"""What devices of a simulated fleet are sent, and what comes back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedpace.protocol.paced import Failed, Order, Replied
from fedpace.simulations.executors.inline import InlineExecutor
from fedpace.simulations.grid import VirtualGrid
from tests.simulations.grids import (
    EVEN,
    NODE,
    RUN_ID,
    STEP,
    STEPS,
    TASK,
    GridOf,
    content,
    events,
    orders,
    requests,
    wait_for,
)

DEVICES = 5
LIARS = EVEN + "[misreport]\nshare = 1.0\ncompute_factor = 0.25\n"

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


def told_by(grid_of: GridOf, toml: str = EVEN) -> VirtualGrid:
    return grid_of(toml, DEVICES, InlineExecutor(app, RUN_ID, DEVICES))


def test_what_is_changed_once_it_is_pushed_is_not_seen_by_devices(grid_of: GridOf) -> None:
    grid = told_by(grid_of)
    records = content(lr=0.5, list=[1.0])
    ids = grid.push_messages(requests(grid, records, 0, 1))
    change(records)
    records["arrays"] = ArrayRecord()
    replies = [*grid.send_and_receive([]), *wait_for(grid, ids)]
    assert [told(reply.content) for reply in replies] == [(4.0, 0.5, [1.0])] * 2

    grid.push_messages(requests(grid, RecordDict({**content(), "config": records["config"]}), 3))
    (event,) = events(grid)
    assert isinstance(event, Replied) and event.metrics["lr"] == 8.0, "but what is pushed then is"


def test_each_device_is_sent_its_own_config_over_the_common_one(grid_of: GridOf) -> None:
    grid = told_by(grid_of)
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
    grid = told_by(grid_of)
    records = content(lr=0.5)
    replies = list(grid.send_and_receive(requests(grid, records, *range(DEVICES))))
    assert [told(reply.content) for reply in replies] == [(4.0, 0.5, [])] * DEVICES
    assert [reply.metadata.src_node_id for reply in replies] == [NODE + row for row in range(DEVICES)]
    assert told(next(iter(grid.send_and_receive(requests(grid, records, 0)))).content) == (4.0, 0.5, [])


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


def test_an_app_tells_its_time_by_the_devices_clock(grid_of: GridOf) -> None:
    grid = told_by(grid_of)
    (reply,) = grid.send_and_receive(requests(grid, content(**STEPS), 0))
    assert reply.content.metric_records["metrics"]["compute-seconds"] == 16 * STEP
    assert grid.now() == pytest.approx(TASK, rel=1e-12)


def test_liars_lie_about_it(grid_of: GridOf) -> None:
    grid = told_by(grid_of, LIARS)
    grid.send(content(), "train", orders(0))
    (event,) = events(grid)
    assert isinstance(event, Replied)
    assert (event.compute_seconds, event.metrics["compute-seconds"]) == (4 * STEP, 4 * STEP)
    assert grid.profile(NODE).seconds_per_task == 4 * STEP
    assert grid.counts.device_seconds == 16 * STEP and event.at == pytest.approx(TASK, rel=1e-12)


def test_the_app_of_a_device_fails(grid_of: GridOf) -> None:
    grid = told_by(grid_of)
    (message_id,) = grid.send(content(), "query", orders(0))
    (event,) = events(grid)
    assert isinstance(event, Failed) and event.message_id == message_id
    assert (event.code, event.reason) == (2, "ValueError: no good")
    assert (grid.counts.failed, grid.counts.received, grid.counts.computed) == (1, 0, 1)
