"""What a fleet's TOML file may say: a dataclass a section, each field with its default, what is allowed, and which models
of the section use it (all, where none is named). docs/fleets.md explains them."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedpace.simulations.tomlfile import INF, number, one_of, positive, tables, text, whole


@dataclass(frozen=True, slots=True)
class ComputeClass:
    """`[[compute.classes]]`: devices of one kind."""

    name: str = text()
    share: float = positive(1.0)
    seconds_per_step: float = positive(0.05)
    sd_seconds: float = number(0.0, 0)
    processors: int = whole(4, 1, 4096)


_NO_CLASSES = ("constant", "lognormal", "file")


@dataclass(frozen=True, slots=True)
class Compute:
    model: str = one_of("constant", "classes", "lognormal", "file")
    seconds_per_step: float = positive(0.05, models=("constant", "lognormal"))
    sigma: float = number(0.93, 0, 5, models=("lognormal",))
    file: str = text(models=("file",))
    classes: tuple[ComputeClass, ...] = tables(ComputeClass, models=("classes",))
    jitter: float = number(0.0, 0, 3, models=_NO_CLASSES)
    processors: int = whole(4, 1, 4096, models=_NO_CLASSES)
    load_low: float = number(0.0, 0, 0.95)
    load_high: float = number(0.0, 0, 0.95)
    throttle_after_seconds: float = number(INF, 0, INF)
    throttle_factor: float = number(1.5, 1, 100)
    throttle_cool_seconds: float = positive(300.0)
    drift_per_hour: float = number(0.0, 0, 100)
    drift_limit: float = number(2.0, 1, 1000)


@dataclass(frozen=True, slots=True)
class NetworkClass:
    """`[[network.classes]]`: devices on one kind of network."""

    name: str = text()
    share: float = positive(1.0)
    down_mbit: float = positive(100.0)
    up_mbit: float = positive(50.0)
    latency_ms: float = number(20.0, 0, 1e6)


_ONE_NETWORK = ("constant", "lognormal", "normal")


@dataclass(frozen=True, slots=True)
class Network:
    model: str = one_of("constant", "classes", "lognormal", "normal")
    down_mbit: float = positive(100.0, models=_ONE_NETWORK)
    up_mbit: float = positive(50.0, models=_ONE_NETWORK)
    sigma: float = number(0.5, 0, 5, models=("lognormal",))
    down_sd_mbit: float = number(10.0, 0, models=("normal",))
    up_sd_mbit: float = number(10.0, 0, models=("normal",))
    least_mbit: float = positive(1.0, models=("normal",))
    classes: tuple[NetworkClass, ...] = tables(NetworkClass, models=("classes",))
    jitter: float = number(0.0, 0, 3)
    latency_ms: float = number(20.0, 0, 1e6, models=_ONE_NETWORK)
    latency_sigma: float = number(0.0, 0, 3)
    server_mbit: float = positive(INF, INF)


_SESSIONS, _TRACE = ("sessions",), ("trace",)


@dataclass(frozen=True, slots=True)
class Availability:
    model: str = one_of("always", "sessions", "trace")
    session_median_seconds: float = number(300.0, 1, models=_SESSIONS)
    session_sigma: float = number(1.32, 0, 3, models=_SESSIONS)
    day_share: float = number(0.05, 0.001, 0.99, models=_SESSIONS)
    night_share: float = number(0.2, 0.001, 0.99, models=_SESSIONS)
    night_starts_at_hour: float = number(22.0, 0, 24, models=_SESSIONS)
    night_hours: float = number(8.0, 1, 23, models=_SESSIONS)
    starts_at_hour: float = number(22.0, 0, 24, models=_SESSIONS)
    phase_spread_hours: float = number(3.0, 0, 24, models=_SESSIONS)
    file: str = text(models=_TRACE)
    cycle_seconds: float = number(0.0, 0, models=_TRACE)


@dataclass(frozen=True, slots=True)
class Faults:
    dropout: float = number(0.0, 0, 1)
    notice_seconds: float = number(15.0, 0)
    failure: float = number(0.0, 0, 1)


@dataclass(frozen=True, slots=True)
class Battery:
    hours_of_compute: float = positive(INF, INF)
    hours_to_charge: float = positive(2.0)
    start_low: float = number(0.5, 0, 1)
    start_high: float = number(1.0, 0, 1)
    leave_below: float = number(0.2, 0, 0.99)
    return_above: float = number(0.5, 0, 1)


@dataclass(frozen=True, slots=True)
class Memory:
    total_mb: float = number(4096.0, 1)
    sigma: float = number(0.0, 0, 3)
    used: float = number(0.5, 0, 0.99)
    task_mb: float = number(0.0, 0)
    task_factor: float = number(0.0, 0, 1000)


@dataclass(frozen=True, slots=True)
class Misreport:
    share: float = number(0.0, 0, 1)
    compute_factor: float = number(1.0, 0.001, 1000)
    profile_factor: float = number(1.0, 0.001, 1000)


@dataclass(frozen=True, slots=True)
class FleetSettings:
    """All that a fleet's file says."""

    description: str = text()
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
