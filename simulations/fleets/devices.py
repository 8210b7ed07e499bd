"""What each simulated device is, drawn once from the fleet's settings: a struct of arrays, one row a device.

Each property has a generator of its own, read row by row: a larger fleet of the same seed begins with the smaller one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedpace.hosting.seeds import derive_seed
from fedpace.simulations.fleets.hashing import Floats, lognormal_table, normal_table
from fedpace.simulations.fleets.reading import read_speeds
from fedpace.simulations.fleets.settings import Compute, FleetSettings, Network

Float32s = NDArray[np.float32]
BYTES_PER_MBIT = 125_000.0
BYTES_PER_MB = 1e6


@dataclass(slots=True)
class Devices:
    """Arrays of shape (devices,): `kind` indexes `compute.classes`; seconds a step; bytes a second; seconds of latency a
    transfer; bytes of memory; the share of the processors that others use; slowing a second of virtual time; who lies."""

    kind: NDArray[np.uint8]
    step_seconds: Float32s
    down: Float32s
    up: Float32s
    latency: Float32s
    memory_bytes: Float32s
    load: Float32s
    drift: Float32s
    liar: NDArray[np.bool_]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(getattr(self, field.name).nbytes for field in fields(self))


def draw_devices(settings: FleetSettings, size: int, seed: int, folder: Path) -> Devices:
    """The fleet's devices. Files of one's own are sought from `folder` on. Raises ConfigError for a file that is wrong."""
    compute, network, memory = settings.compute, settings.network, settings.memory
    kind, seconds = _compute(compute, size, seed, folder)
    load = compute.load_low + (compute.load_high - compute.load_low) * _generator(seed, "load").random(size)
    down, up, latency = _network(network, size, seed)
    drift = compute.drift_per_hour / 3600.0 * _generator(seed, "drift").random(size)
    return side_by_side(
        Devices(
            kind=kind,
            step_seconds=(seconds / (1.0 - load)).astype(np.float32),
            down=(down * BYTES_PER_MBIT).astype(np.float32),
            up=(up * BYTES_PER_MBIT).astype(np.float32),
            latency=(latency / 1000.0).astype(np.float32),
            memory_bytes=(_lognormal(memory.total_mb, memory.sigma, size, seed, "memory") * BYTES_PER_MB).astype(
                np.float32
            ),
            load=load.astype(np.float32),
            drift=drift.astype(np.float32),
            liar=_generator(seed, "liars").random(size) < settings.misreport.share,
        )
    )


def side_by_side(devices: Devices) -> Devices:
    """The same, a device's numbers next to one another: they are fetched from memory together, and not one by one."""
    columns = {field.name: getattr(devices, field.name) for field in fields(devices)}
    names = sorted(columns, key=lambda name: -columns[name].itemsize)
    record = np.empty(len(devices.kind), np.dtype([(name, columns[name].dtype) for name in names], align=True))
    for name in names:
        record[name] = columns[name]
    return Devices(**{name: record[name] for name in columns})


def compute_tables(compute: Compute) -> Floats:
    """Quantiles of a task's compute time over the device's own mean, a row a class; the mean is 1.

    FLASH draws a normal time a task from each class's mean and deviation, and so does this; elsewhere it is log-normal.
    """
    if compute.model == "classes":
        return np.stack([normal_table(entry.sd_seconds / entry.seconds_per_step) for entry in compute.classes])
    return jitter_table(compute.jitter)[np.newaxis]


def jitter_table(sigma: float) -> Floats:
    """Quantiles of a log-normal factor with mean 1."""
    return lognormal_table(math.exp(-(sigma**2) / 2), sigma)


def _generator(seed: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng(derive_seed(seed, f"fleet {purpose}"))


def _compute(compute: Compute, size: int, seed: int, folder: Path) -> tuple[NDArray[np.uint8], Floats]:
    if compute.model == "classes":
        kind = _classes([entry.share for entry in compute.classes], size, seed, "compute")
        return kind, np.array([entry.seconds_per_step for entry in compute.classes])[kind]
    one_kind = np.zeros(size, np.uint8)
    if compute.model == "file":
        speeds = read_speeds(folder / Path(compute.file).expanduser())
        return one_kind, np.resize(speeds, size).astype(np.float64)
    sigma = compute.sigma if compute.model == "lognormal" else 0.0
    return one_kind, _lognormal(compute.seconds_per_step, sigma, size, seed, "compute")


def _network(network: Network, size: int, seed: int) -> tuple[Floats, Floats, Floats]:
    """Mbit/s down and up, and milliseconds."""
    if network.model == "classes":
        kind = _classes([entry.share for entry in network.classes], size, seed, "network")
        down = np.array([entry.down_mbit for entry in network.classes])[kind]
        up = np.array([entry.up_mbit for entry in network.classes])[kind]
        latency = np.array([entry.latency_ms for entry in network.classes])[kind]
        return down, up, latency * _lognormal(1.0, network.latency_sigma, size, seed, "latency")
    latency = _lognormal(network.latency_ms, network.latency_sigma, size, seed, "latency")
    if network.model == "normal":
        down = _truncated(network.down_mbit, network.down_sd_mbit, network.least_mbit, size, seed, "download")
        return down, _truncated(network.up_mbit, network.up_sd_mbit, network.least_mbit, size, seed, "upload"), latency
    sigma = network.sigma if network.model == "lognormal" else 0.0
    factor = _lognormal(1.0, sigma, size, seed, "network")  # who is slow one way is slow the other way
    return network.down_mbit * factor, network.up_mbit * factor, latency


def _lognormal(median: float, sigma: float, size: int, seed: int, purpose: str) -> Floats:
    if not sigma:
        return np.full(size, median)
    return median * _generator(seed, purpose).lognormal(0.0, sigma, size)


def _truncated(mean: float, sd: float, least: float, size: int, seed: int, purpose: str) -> Floats:
    """Normal numbers; those under `least`, which is at most `mean`, are drawn again, from a generator for each time."""
    drawn = mean + sd * _generator(seed, purpose).standard_normal(size)
    again = 0
    while (low := drawn < least).any():
        again += 1
        drawn[low] = (mean + sd * _generator(seed, f"{purpose} {again}").standard_normal(size))[low]
    return drawn


def _classes(shares: Sequence[float], size: int, seed: int, purpose: str) -> NDArray[np.uint8]:
    """The class of each device; shares need not sum to 1."""
    edges = np.cumsum(shares)
    drawn = _generator(seed, f"{purpose} class").random(size) * edges[-1]
    kind: NDArray[np.uint8] = np.minimum(np.searchsorted(edges, drawn, side="right"), len(shares) - 1).astype(np.uint8)
    return kind
