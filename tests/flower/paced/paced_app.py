"""Every kind of event that a PacedGrid tells of, once, and what was seen of it written down."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedpace.protocol.paced import Event, Expired, Failed, Joined, PacedGrid, Replied, Reported, Tick

LARGE = 200_000  # float64: 1.6 MB, a blob of its own
server = ServerApp()
client = ClientApp()


@client.train()
def work(message: Message, context: Context) -> Message:
    """Sleep, raise, or double the array received."""
    config = message.content.config_records["config"]
    time.sleep(float(str(config["seconds"])))
    if config["raises"]:
        raise ValueError("as asked")
    [array] = message.content.array_records["arrays"].to_numpy_ndarrays()
    arrays, metrics = ArrayRecord([2 * array]), MetricRecord({"sum": float(array.sum())})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def order(node: int, *, seconds: float = 0.0, raises: bool = False, size: int = 3, ttl: float = 60.0) -> Message:
    """A message that says what to do."""
    config = ConfigRecord({"seconds": seconds, "raises": raises})
    content = RecordDict({"arrays": ArrayRecord([np.arange(size, dtype=np.float64)]), "config": config})
    return Message(content, node, "train", ttl=ttl)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Go through all that can happen, and write what was seen as JSON."""
    assert isinstance(grid, PacedGrid)
    seen: dict[str, Any] = {"restored": grid.restore()}
    events: list[Event] = []

    def until(kind: type, message_id: str = "") -> Any:
        """The next event of a kind, to a message where one is named."""
        deadline = grid.now() + 30.0
        while True:
            event = grid.next_event(deadline)
            events.append(event)
            if isinstance(event, kind) and message_id in ("", getattr(event, "message_id", "")):
                return event
            assert not isinstance(event, Tick), f"no {kind.__name__} came: {events}"

    joined = [until(Joined), until(Joined)]
    nodes = {event.name: event.node_id for event in joined}
    seen["nodes"] = sorted(nodes)
    first, second = nodes["one"], nodes["two"]

    while {event.node_id for event in events if isinstance(event, Reported)} != {first, second}:
        until(Reported)
    loads = [grid.profile(node).load for node in (first, second)]
    free = [grid.profile(node).free_memory_bytes for node in (first, second)]
    seen["load"] = all(load is not None and 0.0 <= load <= 1.0 for load in loads)
    seen["free memory"] = all(bytes is not None and bytes > 0 for bytes in free)

    started = grid.now()
    tick = grid.next_event(started + 0.05)
    seen["tick"] = isinstance(tick, Tick) and tick.at >= started + 0.05

    for size in (3, LARGE):
        [sent] = grid.push_messages([order(first, size=size)])
        replied: Replied = until(Replied, sent)
        [array] = replied.update.arrays().values()
        whole = replied.update.content().array_records["arrays"].to_numpy_ndarrays()[0]
        seen[f"reply of {size}"] = {
            "right": bool(np.array_equal(array, 2.0 * np.arange(size)) and np.array_equal(array, whole)),
            "read only": not array.flags.writeable,
            "sum": replied.metrics["sum"] == sum(range(size)),
            "bytes": replied.update.nbytes > 8 * size,
        }
        replied.update.release()
        seen[f"reply of {size}"]["readable after release"] = bool(array[-1] == 2.0 * (size - 1))
        seen[f"reply of {size}"]["pulled again"] = len(list(grid.pull_messages([sent])))

    [slow] = grid.push_messages([order(second, seconds=600.0)])
    grid.cancel([slow])
    [after] = grid.push_messages([order(second)])
    seen["works after a cancel"] = until(Replied, after).metrics["sum"] == 3.0
    seen["cancelled was not heard of"] = slow not in {getattr(event, "message_id", "") for event in events}

    [wrong] = grid.push_messages([order(first, raises=True)])
    failed: Failed = until(Failed, wrong)
    seen["failed"] = [failed.code, failed.reason]
    [late] = grid.push_messages([order(second, seconds=600.0, ttl=0.5)])
    seen["expired"] = until(Expired, late).reason
    [nobody] = grid.push_messages([order(12345)])
    seen["nobody"] = until(Failed, nobody).code

    profile = grid.profile(first)
    seen["profile"] = [profile.name, profile.cpu_count > 0, profile.memory_bytes > 0, profile.slots]
    seen["observed"] = profile.seconds_per_task is not None
    sequence = [event.sequence for event in events if not isinstance(event, Tick)]
    seen["ordered"] = sequence == sorted(set(sequence))
    grid.record({"what": "decided", "why": "to see it written"})
    grid.save({"round": 1, "nodes": sorted(nodes)})
    seen["saved"] = grid.restore()
    Path(str(context.run_config["output"])).write_text(json.dumps(seen))
