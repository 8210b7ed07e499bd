"""What a fleet's TOML file may say: a dataclass a section, each field with its default, what is allowed, and which models
of the section use it (all, where none is named). docs/fleets.md explains them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

INF = math.inf
LARGE = 1e12
"""What no finite number of a fleet exceeds."""


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high`, both included; `low` itself is not if `above_low`. An infinite `high` allows `inf`."""

    low: float
    high: float
    above_low: bool = False

    def __contains__(self, number: float) -> bool:
        above = self.low < number if self.above_low else self.low <= number
        return above and (number <= min(self.high, LARGE) or number == self.high)

    def __str__(self) -> str:
        low = f"{'more than' if self.above_low else 'at least'} {self.low:g}"
        return f"a number, {low}, at most {min(self.high, LARGE):g}{', or inf' if math.isinf(self.high) else ''}"


def _number(default: float, low: float, high: float = LARGE, models: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"allowed": Range(low, high), "models": models})


def _positive(default: float, high: float = LARGE, models: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"allowed": Range(0, high, above_low=True), "models": models})


def _whole(default: int, low: int, high: int, models: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"allowed": range(low, high + 1), "models": models})


def _one_of(*names: str) -> Any:
    """One of these names, by default the first."""
    return field(default=names[0], metadata={"allowed": names})


def _text(models: tuple[str, ...] = ()) -> Any:
    return field(default="", metadata={"allowed": str, "models": models})


def _tables(kind: type, models: tuple[str, ...]) -> Any:
    return field(default=(), metadata={"allowed": kind, "models": models})


@dataclass(frozen=True, slots=True)
class ComputeClass:
    """`[[compute.classes]]`: devices of one kind."""

    name: str = _text()
    share: float = _positive(1.0)
    seconds_per_step: float = _positive(0.05)
    sd_seconds: float = _number(0.0, 0)
    processors: int = _whole(4, 1, 4096)


_NO_CLASSES = ("constant", "lognormal", "file")


@dataclass(frozen=True, slots=True)
class Compute:
    model: str = _one_of("constant", "classes", "lognormal", "file")
    seconds_per_step: float = _positive(0.05, models=("constant", "lognormal"))
    sigma: float = _number(0.93, 0, 5, models=("lognormal",))
    file: str = _text(models=("file",))
    classes: tuple[ComputeClass, ...] = _tables(ComputeClass, models=("classes",))
    jitter: float = _number(0.0, 0, 3, models=_NO_CLASSES)
    processors: int = _whole(4, 1, 4096, models=_NO_CLASSES)
    load_low: float = _number(0.0, 0, 0.95)
    load_high: float = _number(0.0, 0, 0.95)
    throttle_after_seconds: float = _number(INF, 0, INF)
    throttle_factor: float = _number(1.5, 1, 100)
    throttle_cool_seconds: float = _positive(300.0)
    drift_per_hour: float = _number(0.0, 0, 100)
    drift_limit: float = _number(2.0, 1, 1000)


@dataclass(frozen=True, slots=True)
class NetworkClass:
    """`[[network.classes]]`: devices on one kind of network."""

    name: str = _text()
    share: float = _positive(1.0)
    down_mbit: float = _positive(100.0)
    up_mbit: float = _positive(50.0)
    latency_ms: float = _number(20.0, 0, 1e6)


_ONE_NETWORK = ("constant", "lognormal", "normal")


@dataclass(frozen=True, slots=True)
class Network:
    model: str = _one_of("constant", "classes", "lognormal", "normal")
    down_mbit: float = _positive(100.0, models=_ONE_NETWORK)
    up_mbit: float = _positive(50.0, models=_ONE_NETWORK)
    sigma: float = _number(0.5, 0, 5, models=("lognormal",))
    down_sd_mbit: float = _number(10.0, 0, models=("normal",))
    up_sd_mbit: float = _number(10.0, 0, models=("normal",))
    least_mbit: float = _positive(1.0, models=("normal",))
    classes: tuple[NetworkClass, ...] = _tables(NetworkClass, models=("classes",))
    jitter: float = _number(0.0, 0, 3)
    latency_ms: float = _number(20.0, 0, 1e6, models=_ONE_NETWORK)
    latency_sigma: float = _number(0.0, 0, 3)
    server_mbit: float = _positive(INF, INF)


_SESSIONS, _TRACE = ("sessions",), ("trace",)


@dataclass(frozen=True, slots=True)
class Availability:
    model: str = _one_of("always", "sessions", "trace")
    session_median_seconds: float = _number(300.0, 1, models=_SESSIONS)
    session_sigma: float = _number(1.32, 0, 3, models=_SESSIONS)
    day_share: float = _number(0.05, 0.001, 0.99, models=_SESSIONS)
    night_share: float = _number(0.2, 0.001, 0.99, models=_SESSIONS)
    night_starts_at_hour: float = _number(22.0, 0, 24, models=_SESSIONS)
    night_hours: float = _number(8.0, 1, 23, models=_SESSIONS)
    starts_at_hour: float = _number(22.0, 0, 24, models=_SESSIONS)
    phase_spread_hours: float = _number(3.0, 0, 24, models=_SESSIONS)
    file: str = _text(models=_TRACE)
    cycle_seconds: float = _number(0.0, 0, models=_TRACE)


@dataclass(frozen=True, slots=True)
class Faults:
    dropout: float = _number(0.0, 0, 1)
    notice_seconds: float = _number(15.0, 0)
    failure: float = _number(0.0, 0, 1)


@dataclass(frozen=True, slots=True)
class Battery:
    hours_of_compute: float = _positive(INF, INF)
    hours_to_charge: float = _positive(2.0)
    start_low: float = _number(0.5, 0, 1)
    start_high: float = _number(1.0, 0, 1)
    leave_below: float = _number(0.2, 0, 0.99)
    return_above: float = _number(0.5, 0, 1)


@dataclass(frozen=True, slots=True)
class Memory:
    total_mb: float = _number(4096.0, 1)
    sigma: float = _number(0.0, 0, 3)
    used: float = _number(0.5, 0, 0.99)
    task_mb: float = _number(0.0, 0)
    task_factor: float = _number(0.0, 0, 1000)


@dataclass(frozen=True, slots=True)
class Misreport:
    share: float = _number(0.0, 0, 1)
    compute_factor: float = _number(1.0, 0.001, 1000)
    profile_factor: float = _number(1.0, 0.001, 1000)


@dataclass(frozen=True, slots=True)
class FleetSettings:
    """All that a fleet's file says."""

    description: str = _text()
    compute: Compute = field(default_factory=Compute)
    network: Network = field(default_factory=Network)
    availability: Availability = field(default_factory=Availability)
    faults: Faults = field(default_factory=Faults)
    battery: Battery = field(default_factory=Battery)
    memory: Memory = field(default_factory=Memory)
    misreport: Misreport = field(default_factory=Misreport)


SECTIONS: dict[str, type] = {
    "compute": Compute,
    "network": Network,
    "availability": Availability,
    "faults": Faults,
    "battery": Battery,
    "memory": Memory,
    "misreport": Misreport,
}
