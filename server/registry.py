"""The devices of a fleet: what they say of themselves, whether they are there, and what was observed of them."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from fedpace.hosting.settings import ServerSettings
from fedpace.protocol import fleet_pb2 as pb

_LAST = 20
_TELLING_LOAD = 0.05
_TELLING_MEMORY = 0.05
_TELLING_PERCENT = 1.0


def _recent() -> deque[float]:
    return deque(maxlen=_LAST)


def _median(values: deque[float]) -> float | None:
    return statistics.median(values) if values else None


@dataclass
class Device:
    """One device, connected or gone. Speeds are the last ones seen: seconds of compute, bytes a second."""

    node_id: int
    name: str
    profile: pb.Profile = field(default_factory=pb.Profile)
    slots: int = 1
    connected: bool = False
    seen: float = 0.0
    load: float = 0.0
    free_memory_bytes: int = 0
    battery: pb.Battery | None = None
    told: pb.Heartbeat | None = None  # the last one that strategies heard of
    tasks: dict[int, pb.Progress] = field(default_factory=dict)
    tasks_done: int = 0
    tasks_failed: int = 0
    staleness: int | None = None
    compute_seconds: dict[str, deque[float]] = field(default_factory=dict)
    download: deque[float] = field(default_factory=_recent)
    upload: deque[float] = field(default_factory=_recent)

    def observe(self, kind: str, result: pb.Result) -> None:
        """Takes in what a finished task of some kind ("train", "evaluate", ...) tells of the device."""
        self.tasks_done += 1
        if 0 <= result.compute_seconds < math.inf:
            self.compute_seconds.setdefault(kind, _recent()).append(result.compute_seconds)
        if 0 < result.download_bytes_per_second < math.inf:
            self.download.append(result.download_bytes_per_second)
        if 0 < result.upload_bytes_per_second < math.inf:
            self.upload.append(result.upload_bytes_per_second)

    def budget_seconds(self, kind: str, settings: ServerSettings) -> float:
        """How long a task of some kind may take on this device: the one deadline there is."""
        seen = self.compute_seconds.get(kind)
        if not seen:
            return settings.first_task_seconds
        return max(settings.deadline_min_seconds, settings.deadline_factor * max(seen))

    @property
    def seconds_per_task(self) -> float | None:
        """Median compute time of the last tasks of its slowest kind, in seconds."""
        medians = [median for times in self.compute_seconds.values() if (median := _median(times)) is not None]
        return max(medians, default=None)

    def state(self, held: Collection[int], now: float) -> pb.DeviceState:
        """What an operator sees; `held` are the tasks the device has."""
        working = "working" if held else "idle"
        return pb.DeviceState(
            name=self.name,
            node_id=self.node_id,
            state=working if self.connected else "gone",
            slots=self.slots,
            running=len(held),
            tasks_done=self.tasks_done,
            tasks_failed=self.tasks_failed,
            seconds_per_task=self.seconds_per_task,
            download_bytes_per_second=_median(self.download),
            upload_bytes_per_second=_median(self.upload),
            staleness=self.staleness,
            seen_seconds_ago=max(0.0, now - self.seen),
            load=self.load,
            free_memory_bytes=self.free_memory_bytes,
            profile=self.profile,
            battery=self.battery,
            tasks=[progress for task_id, progress in self.tasks.items() if task_id in held],
        )


class Registry:
    """Every device that was ever seen in this run."""

    def __init__(self) -> None:
        self._devices: dict[int, Device] = {}

    def get(self, node_id: int) -> Device | None:
        return self._devices.get(node_id)

    def __iter__(self) -> Iterator[Device]:
        return iter(self._devices.values())

    @property
    def connected(self) -> int:
        return sum(device.connected for device in self)

    def join(self, node_id: int, name: str, hello: pb.Hello, now: float) -> Device:
        """A device is there, for the first time or again. What was observed of it before is kept."""
        device = self._devices.setdefault(node_id, Device(node_id, name))
        device.profile = hello.profile
        device.slots = max(1, hello.slots)
        device.told = None
        device.connected = True
        device.seen = now
        return device

    def heartbeat(self, device: Device, beat: pb.Heartbeat) -> bool:
        """Whether strategies should hear of it: of the first since it joined, and of what has changed enough since."""
        beat.load = min(1.0, max(0.0, beat.load))  # NaN is 0
        device.load = beat.load
        device.free_memory_bytes = beat.free_memory_bytes
        device.tasks.clear()
        device.battery = beat.battery if beat.HasField("battery") else None
        if device.told is not None and not _differs(device.told, beat):
            return False
        device.told = beat
        return True


def _differs(old: pb.Heartbeat, new: pb.Heartbeat) -> bool:
    return (
        abs(new.load - old.load) >= _TELLING_LOAD
        or abs(new.free_memory_bytes - old.free_memory_bytes) >= _TELLING_MEMORY * old.free_memory_bytes
        or abs(new.battery.percent - old.battery.percent) >= _TELLING_PERCENT
        or new.battery.plugged != old.battery.plugged
    )
