"""A grid in virtual time whose devices are a script: what they answer, and how long each takes over it."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedpace.protocol.paced import DeviceProfile, Event, Order, PacedGrid, Replied, Tick
from fedpace.protocol.received import RecordsUpdate

Arrays = dict[str, NDArray[Any]]
Metrics = dict[str, Any]
Script = Callable[[int, Arrays, Mapping[str, Any]], tuple[Arrays, Metrics, float]]
"""Device (0, 1, ...), the model it got and its config -> its model, its metrics, and the seconds until they arrive."""


@dataclass(frozen=True)
class Sent:
    task: str
    device: int
    arrays: Arrays
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Arrived:
    task: str
    arrays: Arrays
    metrics: Metrics


class ScriptedGrid(PacedGrid):
    """`log` is all that went out and came back, in order. Node ids are 100, 101, ..."""

    def __init__(self, script: Script, nodes: int) -> None:
        self.log: list[Sent | Arrived] = []
        self._script = script
        self._nodes = list(range(100, 100 + nodes))
        self._now = 0.0
        self._count = 0
        self._out: list[tuple[float, int, int, Arrays, Metrics]] = []

    # ------------------------------------------------------------ what a strategy needs

    def get_node_ids(self) -> Iterable[int]:
        return self._nodes

    def send(
        self,
        content: RecordDict,
        message_type: str,
        orders: Sequence[Order],
        *,
        config_name: str = "config",
        group_id: str = "",
        ttl: float | None = None,
        decision: Mapping[str, Any] | None = None,
    ) -> list[str]:
        ids = []
        for order in orders:
            self._count += 1
            device = order.node_id - self._nodes[0]
            sent = {name: array.numpy() for name, array in content.array_records["arrays"].items()}
            config = {**content.config_records[config_name], **order.config}
            self.log.append(Sent(str(self._count), device, sent, config))
            arrays, metrics, seconds = self._script(device, sent, config)
            heapq.heappush(self._out, (self._now + seconds, self._count, order.node_id, arrays, metrics))
            ids.append(str(self._count))
        return ids

    def next_event(self, until: float) -> Event:
        if not self._out or self._out[0][0] > until:
            self._now = max(self._now, until)
            return Tick(self._now)
        at, number, node, arrays, metrics = heapq.heappop(self._out)
        self._now = max(self._now, at)
        self.log.append(Arrived(str(number), arrays, metrics))
        record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
        content = RecordDict({"arrays": record, "metrics": MetricRecord(metrics)})
        return Replied(number, self._now, node, str(number), metrics, RecordsUpdate(content), float("nan"))

    def cancel(self, message_ids: Iterable[str]) -> None:
        gone = set(message_ids)
        self._out = [entry for entry in self._out if str(entry[1]) not in gone]
        heapq.heapify(self._out)

    def profile(self, node_id: int) -> DeviceProfile:
        return DeviceProfile(node_id, f"device-{node_id}", 1, 0, "", 0, (), ())

    def now(self) -> float:
        return self._now

    def record(self, decision: Mapping[str, Any]) -> None:
        """No log is kept."""

    def save(self, state: Mapping[str, Any]) -> None:
        """Nothing is kept."""

    def restore(self) -> None:
        return None

    # ------------------------------------------------------------ Flower's half, which nobody asks for here

    def set_run(self, run: Any) -> None:
        self._refuse()

    @property
    def run(self) -> Any:
        self._refuse()

    def create_message(self, *arguments: Any, **more: Any) -> Message:
        self._refuse()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        self._refuse()

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self._refuse()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise AssertionError("a strategy of fedpace asks only for what a PacedGrid has")
