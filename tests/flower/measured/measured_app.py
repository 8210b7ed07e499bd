"""Events from whatever grid there is: replies whose work was measured, an error, nobody there, a message too late."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedpace.clients.mods import measure
from fedpace.protocol.paced import Expired, Failed, Joined, Order, Replied, Tick
from fedpace.protocol.polled import paced

SIZE, NOBODY, SECONDS = 1000, 12345, 90.0
server = ServerApp()
client = ClientApp(mods=[measure])


@client.train()
def work(message: Message, context: Context) -> Message:
    """Double the array, or raise, as the order says, after as many seconds as it says."""
    time.sleep(float(message.content.config_records["config"]["seconds"]))  # type: ignore[arg-type]
    if message.content.config_records["config"]["raises"]:
        raise ValueError("as asked")
    [array] = message.content.array_records["arrays"].to_numpy_ndarrays()
    metrics = MetricRecord({"num-examples": array.size})
    return Message(RecordDict({"arrays": ArrayRecord([2 * array]), "metrics": metrics}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Send one message of each kind, and write what came of it as JSON."""
    output = Path(str(context.run_config["output"]))
    fleet = paced(grid, output.parent / "memory")
    config = ConfigRecord({"raises": False, "seconds": 0.0})
    content = RecordDict({"arrays": ArrayRecord([np.arange(SIZE, dtype=np.float64)]), "config": config})
    names: dict[str, str] = {}
    seen: dict[str, Any] = {"sequence": []}

    def collect(kinds: Any, count: int) -> list[Any]:
        """The next events of some kinds; fewer if the time is over."""
        found: list[Any] = []
        while len(found) < count and not isinstance(event := fleet.next_event(SECONDS), Tick):
            seen["sequence"].append(event.sequence)
            found += [event] if isinstance(event, kinds) else []
        return found

    first, second = (event.node_id for event in collect(Joined, 2))
    good = fleet.send(content, "train", [Order(first, {}), Order(second, {}), Order(NOBODY, {})])
    [wrong] = fleet.send(content, "train", [Order(first, {"raises": True})])
    # Flower answers with 500 where a message is over its time before it has come: long enough to be taken.
    [late] = fleet.send(content, "train", [Order(second, {"seconds": 3.0})], ttl=1.0)
    names |= dict(zip([*good, wrong, late], ["first", "second", "nobody", "wrong", "late"], strict=True))
    for event in collect(Replied | Failed | Expired, len(names)):
        told: dict[str, Any] = {"kind": type(event).__name__, "seconds": event.at}
        if isinstance(event, Replied):
            [array] = event.update.arrays("arrays").values()
            told |= {"right": bool(np.array_equal(array, 2.0 * np.arange(SIZE))), "metrics": dict(event.metrics)}
            told["compute_seconds"] = event.compute_seconds
            event.update.release()
        else:
            told |= {"code": getattr(event, "code", None), "reason": event.reason.removeprefix(f"{event.node_id}: ")}
        seen[names[event.message_id]] = told
    seen["profile"] = asdict(fleet.profile(first))
    fleet.save({"round": 1})
    seen["saved"] = fleet.restore()
    output.write_text(json.dumps(seen))
