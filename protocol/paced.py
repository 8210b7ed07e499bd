"""`PacedGrid`: what fedpace's grids offer beyond Flower's `Grid` to a strategy that asks.

Events come in one total order. A reply's arrays are behind a handle, so that a folder can read them in blocks where
they lie; Flower `Message`s are built only for those who call `pull_messages` or `send_and_receive`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from flwr.app import DEFAULT_TTL, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """What is known of a device: what it says of itself, then what was observed (None until it was).

    `memory_bytes` and `gpu_memory_bytes` are bytes, `seconds_per_task` is the compute time of its last task, bandwidths
    are bytes a second. `load` (share of its processors in use, 0 to 1), `free_memory_bytes` and `battery_percent` are
    those of its last heartbeat; without a battery, or plugged in, a device has no `battery_percent`.
    """

    node_id: int
    name: str
    slots: int
    cpu_count: int
    cpu_model: str
    memory_bytes: int
    gpus: tuple[str, ...]
    gpu_memory_bytes: tuple[int, ...]
    seconds_per_task: float | None = None
    download_bytes_per_second: float | None = None
    upload_bytes_per_second: float | None = None
    load: float | None = None
    free_memory_bytes: int | None = None
    battery_percent: float | None = None


@dataclass(slots=True)
class Order:
    """One device's share of what is sent to many: values laid over the config record they all get."""

    node_id: int
    config: Mapping[str, Any]


class UpdateHandle(ABC):
    """The content of a reply, where it lies. Views stay readable until `release`."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Size of the content in bytes."""

    @abstractmethod
    def arrays(self, record: str | None = None) -> Mapping[str, NDArray[np.generic]]:
        """The numpy arrays of a record by their names, as read-only views without a copy; of all records if none is
        named, where later ones win over earlier ones. Empty where there is no such record.
        """

    def place(self, record: str) -> tuple[NDArray[np.floating[Any]], int] | None:
        """Where the arrays of many updates lie together: a matrix of shape (updates, numbers), and which row is this
        one's: the arrays of a record one after the other, in the order, the shapes and the dtype that were sent.
        None where they do not lie so.
        """
        return None

    def encoded(self, record: str) -> memoryview | None:
        """The bytes of a record's compressed update (`fedpace.protocol.encoded`), where it has one in place of arrays."""
        return None

    @abstractmethod
    def content(self) -> RecordDict:
        """The content as Flower records, copied."""

    @abstractmethod
    def release(self) -> None:
        """Nobody will read this any more."""


@dataclass(frozen=True, slots=True)
class Joined:
    sequence: int
    at: float
    node_id: int
    name: str


@dataclass(frozen=True, slots=True)
class Left:
    sequence: int
    at: float
    node_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class Reported:
    """A device is more or less busy than it was, or has more or less charge: its `profile` has changed."""

    sequence: int
    at: float
    node_id: int


@dataclass(slots=True)
class Replied:
    sequence: int
    at: float
    node_id: int
    message_id: str
    metrics: Mapping[str, Any]
    update: UpdateHandle
    compute_seconds: float


@dataclass(frozen=True, slots=True)
class Failed:
    """The device answered with an error, or its answer was rejected, or it is gone. `code` is one of Flower's."""

    sequence: int
    at: float
    node_id: int
    message_id: str
    code: int
    reason: str


@dataclass(frozen=True, slots=True)
class Expired:
    """No answer came within the message's time to live, or the task's deadline."""

    sequence: int
    at: float
    node_id: int
    message_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Tick:
    """Nothing happened until the time asked for."""

    at: float


Event = Joined | Left | Reported | Replied | Failed | Expired | Tick


class PacedGrid(Grid):
    """A Flower grid with a clock, an order of events, and knowledge of its devices. Times are seconds.

    `checks_arrays`: every reply's arrays are known to be finite numbers of the kinds and shapes that were sent.
    `keeps_state`: whether `save` is worth calling.
    """

    checks_arrays: ClassVar[bool] = False
    keeps_state: ClassVar[bool] = True

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """As Flower's grids make them, which warn that theirs are no longer to be used."""
        return Message(content, dst_node_id, message_type, ttl=DEFAULT_TTL if ttl is None else ttl, group_id=group_id)

    @abstractmethod
    def now(self) -> float:
        """Seconds since the run began, on the grid's clock."""

    @abstractmethod
    def next_event(self, until: float) -> Event:
        """The next event in order, or `Tick` once the clock reaches `until`. Waits on the grid's clock.

        A reply reported here is not handed out by `pull_messages` or `send_and_receive` again, nor the reverse.
        """

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
        """Sends the same content to many devices, each with its own values in the config record `config_name`.

        Neither `content` nor the orders may be changed afterwards; the same object sent again is the same content.
        Returns the message ids in the order of `orders`. `ttl` is in seconds. `decision`, which tells of all that is
        sent, is recorded first, and stands in the decision log for the grid's own entries.
        """
        shared = content[config_name]
        messages = []
        for order in orders:
            own = RecordDict(dict(content.items()))
            own[config_name] = ConfigRecord({**shared, **order.config})  # type: ignore[dict-item]
            messages.append(self.create_message(own, message_type, order.node_id, group_id, ttl))
        if decision is None:
            return list(self.push_messages(messages))
        self.record(decision)
        return self.push_recorded(messages)

    def push_recorded(self, messages: Sequence[Message]) -> list[str]:
        """`push_messages` of what the decision log tells of already; for grids that write into it themselves."""
        return list(self.push_messages(messages))

    @abstractmethod
    def cancel(self, message_ids: Iterable[str]) -> None:
        """Nobody waits for these any more. What is running stops; no event follows."""

    @abstractmethod
    def profile(self, node_id: int) -> DeviceProfile:
        """What is known of a device. Raises KeyError for one that never joined."""

    def census(self, node_ids: Sequence[int]) -> Mapping[str, NDArray[np.float64]]:
        """What is known of many devices at once: arrays of shape (devices,), NaN where nothing is.

        Columns: `slots`, `cpu_count`, `gpu_count`, `memory_bytes`, `free_memory_bytes`, `load`, `battery_percent`.
        """
        return census_of([self.profile(node_id) for node_id in node_ids])

    @abstractmethod
    def record(self, decision: Mapping[str, Any]) -> None:
        """Appends a decision (plain values) to the decision log, with the next counter and the time."""

    @abstractmethod
    def save(self, state: Mapping[str, Any]) -> None:
        """Keeps a strategy's plain state; the last one saved is what `restore` returns."""

    @abstractmethod
    def restore(self) -> dict[str, Any] | None:
        """The state last saved for this run, or None."""


def census_of(profiles: Sequence[DeviceProfile]) -> dict[str, NDArray[np.float64]]:
    """The columns of `PacedGrid.census`."""
    columns = {
        "slots": [profile.slots for profile in profiles],
        "cpu_count": [profile.cpu_count or None for profile in profiles],
        "gpu_count": [len(profile.gpus) for profile in profiles],
        "memory_bytes": [profile.memory_bytes or None for profile in profiles],
        "free_memory_bytes": [profile.free_memory_bytes for profile in profiles],
        "load": [profile.load for profile in profiles],
        "battery_percent": [profile.battery_percent for profile in profiles],
    }
    return {name: np.array(values, dtype=np.float64) for name, values in columns.items()}
