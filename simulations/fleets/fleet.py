"""A simulated fleet: who its devices are, when they are there, what they claim. `Draws` says how their tasks end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpace.errors import ConfigError
from fedpace.hosting.seeds import derive_seed
from fedpace.protocol.paced import DeviceProfile
from fedpace.simulations.fleets.devices import draw_devices
from fedpace.simulations.fleets.draws import Draws
from fedpace.simulations.fleets.hashing import Floats
from fedpace.simulations.fleets.presence import Presence, Sessions, Trace
from fedpace.simulations.fleets.reading import read_settings, read_trace
from fedpace.simulations.fleets.settings import FleetSettings
from fedpace.simulations.fleets.wear import Wear, wears

FIRST_NODE_ID = 1000


def load_fleet(name_or_path: str, devices: int, seed: int) -> SimulatedFleet:
    """A fleet of so many devices: a preset (`uniform`, `flash`, `cross-silo`, `edge-extreme`, `liars`) or a TOML file.

    Raises ConfigError for a file that cannot be read, or says what it may not: it names file, line and key.
    """
    if devices < 1:
        raise ConfigError(f"a fleet of {devices} devices: it takes at least 1")
    path, settings = read_settings(name_or_path)
    return SimulatedFleet(path.stem, settings, devices, seed, path.parent)


class SimulatedFleet(Draws):
    """Devices in rows 0 to `size` - 1; times are seconds of virtual time. `always_present`: presence never changes."""

    def __init__(self, name: str, settings: FleetSettings, size: int, seed: int, folder: Path) -> None:
        """`folder` is where the files that `settings` name are sought. Raises ConfigError for one that is wrong."""
        self.name, self.size = name, size
        self.node_ids: NDArray[np.uint64] = np.arange(FIRST_NODE_ID, FIRST_NODE_ID + size, dtype=np.uint64)
        battery, compute = settings.battery, settings.compute
        wear = Wear(battery, compute, size, derive_seed(seed, "fleet battery")) if wears(battery, compute) else None
        presence = _presence(settings, size, seed, folder)
        super().__init__(settings, draw_devices(settings, size, seed, folder), presence, wear, seed)
        self.always_present = presence is None and not (wear is not None and wear.has_battery)

    @property
    def stateful(self) -> bool:
        """Whether a draw depends on the row's earlier draws: devices with a battery, or that throttle."""
        return self._wear is not None

    @property
    def state(self) -> dict[str, NDArray[np.float64]]:
        """What draws have changed, as arrays of shape (size,): to be saved, and written back in place. Empty unless
        `stateful`."""
        return {} if self._wear is None else self._wear.state

    @property
    def nbytes(self) -> int:
        """Bytes of everything that grows with the fleet."""
        held = self.node_ids.nbytes + self.devices.nbytes + sum(array.nbytes for array in self.state.values())
        return held + (0 if self._presence is None else self._presence.nbytes)

    def profile(self, row: int, at: float = 0.0) -> DeviceProfile:
        """What a device claims to be at a time; liars claim `misreport.profile_factor` times what is true.

        What a coordinator observes for itself (compute time, bandwidth) is left out.
        """
        compute, memory = self.settings.compute, self.settings.memory
        factor = self.settings.misreport.profile_factor if self.devices.liar[row] else 1.0
        kind = compute.classes[self.devices.kind[row]] if compute.classes else None
        total = round(self.devices.memory_bytes.item(row) * factor)
        battery = None
        if self._wear is not None and self._wear.has_battery:
            battery = min(100.0, 100.0 * self._wear.charge(row, at) * factor)
        return DeviceProfile(
            node_id=FIRST_NODE_ID + row,
            name=f"device-{row}",
            slots=1,
            cpu_count=max(1, round((kind.processors if kind else compute.processors) * factor)),
            cpu_model=kind.name if kind else "",
            memory_bytes=total,
            gpus=(),
            gpu_memory_bytes=(),
            load=min(1.0, self.devices.load.item(row) / factor) if compute.load_high else None,
            free_memory_bytes=round(total * (1 - memory.used)),
            battery_percent=battery,
        )

    def census(self, rows: NDArray[Any] | None = None, at: float = 0.0) -> dict[str, NDArray[Any]]:
        """The numbers of `profile` of many devices (of all, without `rows`), as columns of shape (rows,) by the names of
        its fields; `gpu_count` stands for `gpus`. float64 with NaN for what is not known; `node_id` is uint64.
        """
        compute, memory, misreport = self.settings.compute, self.settings.memory, self.settings.misreport
        rows = np.arange(self.size) if rows is None else np.asarray(rows, np.int64)
        factor = np.where(self.devices.liar[rows], misreport.profile_factor, 1.0)
        processors = np.array([kind.processors for kind in compute.classes] or [compute.processors], np.float64)
        total = np.rint(self.devices.memory_bytes[rows].astype(np.float64) * factor)
        load = battery = np.full(len(rows), math.nan)
        if compute.load_high:
            load = np.minimum(1.0, self.devices.load[rows].astype(np.float64) / factor)
        if self._wear is not None and self._wear.has_battery:
            battery = np.minimum(100.0, 100.0 * self._wear.charge_many(rows, at) * factor)
        return {
            "node_id": self.node_ids[rows],
            "slots": np.ones(len(rows)),
            "cpu_count": np.maximum(1.0, np.rint(processors[self.devices.kind[rows]] * factor)),
            "memory_bytes": total,
            "gpu_count": np.zeros(len(rows)),
            "load": load,
            "free_memory_bytes": np.rint(total * (1 - memory.used)),
            "battery_percent": battery,
        }

    def initially_present(self) -> NDArray[np.bool_]:
        """Who is there at time 0, shape (size,)."""
        return np.ones(self.size, np.bool_) if self._presence is None else self._presence.initial.copy()

    def initial_changes(self) -> Floats:
        """`next_change(row, 0)` of every row before any draw, shape (size,)."""
        return np.full(self.size, math.inf) if self._presence is None else self._presence.first_until.copy()

    def present(self, row: int, at: float) -> bool:
        """Whether a device is there. One that `draw` said leaves to charge is not, from then until it is back."""
        return self.always_present or self._here_until(row, at) > at

    def next_change(self, row: int, at: float) -> float:
        """When a device's presence next changes: strictly later than `at`, `inf` for never. O(1).

        A draw that ends with "left" for want of charge moves it: ask again after such an end. Where there are batteries,
        `at` is not before the row's last draw.
        """
        if self.always_present:
            return math.inf
        away_from, away_until = (math.inf, math.inf) if self._wear is None else self._wear.away(row)
        if away_from <= at < away_until:
            return self._back(row, away_until)
        present, until = (True, math.inf) if self._presence is None else self._presence.at(row, at)
        return min(until, away_from) if present and away_from > at else until

    def _back(self, row: int, charged: float) -> float:
        """When a device that charges until `charged` is there again."""
        if self._presence is None:
            return charged
        present, until = self._presence.at(row, charged)
        return charged if present else until

    def stop(self, row: int, at: float) -> None:
        """The row's last task was called off at a time: what it had not computed yet neither drains nor heats."""
        if self._wear is not None:
            self._wear.stop(row, at)


def _presence(settings: FleetSettings, size: int, seed: int, folder: Path) -> Presence | None:
    availability = settings.availability
    if availability.model == "always":
        return None
    if availability.model == "sessions":
        return Sessions(availability, size, derive_seed(seed, "fleet sessions"), derive_seed(seed, "fleet time zones"))
    path = folder / Path(availability.file).expanduser()
    sessions = read_trace(path)
    last = max(entry[-1][1] for entry in sessions)
    if availability.cycle_seconds and availability.cycle_seconds < last:
        raise ConfigError(
            f"{path}: its last session ends at {last:g} s, after availability.cycle_seconds = "
            f"{availability.cycle_seconds:g}; leave that out, or at 0, to repeat the trace after its last session"
        )
    return Trace(sessions, size, availability.cycle_seconds or last)
