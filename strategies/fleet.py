"""What a strategy knows of its devices: a table with a row a device, a column a fact, and the set of idle rows.

A struct of arrays, so that a million devices cost a few hundred megabytes, and every event O(1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpace.protocol.paced import DeviceProfile
from fedpace.strategies.usual import Window

Rows = NDArray[np.intp]
Floats = NDArray[np.float64]

EVERY_TASK: dict[str, tuple[str, float]] = {
    "node_id": ("u8", 0),
    "rest_until": ("f8", -np.inf),  # seconds on the grid's clock: not chosen before
    "selected": ("i8", 0),  # times
    "last_selected": ("i8", -1),  # in which round
    "slots": ("i4", 1),
    "running": ("i4", 0),  # tasks that are out
    "held": ("i4", 0),  # updates that arrived and wait to be folded
    "place": ("i4", -1),  # in the list of idle rows
    "failures_in_a_row": ("i4", 0),
    "alive": ("?", False),
    "samples": ("f8", np.nan),  # of its last update
    "steps": ("f8", np.nan),  # local steps, of its last update
    "loss": ("f8", np.nan),  # as it said with its last update
    "staleness": ("f8", np.nan),  # versions, of its last update
    "folded": ("i8", 0),  # updates
}
"""Columns that are read or written with every task. They lie side by side, a device's in two lines of the processor's
cache: in arrays of their own, each would be fetched from memory by itself."""

COLUMNS: dict[str, tuple[str, float]] = {
    **EVERY_TASK,
    # what it says of itself
    "cpu_count": ("f8", np.nan),
    "gpu_count": ("f8", np.nan),
    "memory_bytes": ("f8", np.nan),
    "free_memory_bytes": ("f8", np.nan),
    "load": ("f8", np.nan),  # 0 to 1
    "battery_percent": ("f8", np.nan),
    # what was seen
    "failed": ("i8", 0),  # tasks
    "error": ("f8", np.nan),  # observed, smoothed: 0 as the consensus, 1 unrelated, 2 against it
    # pace: logarithms of seconds a step and of seconds of everything else a task, with variances (see pace.py)
    "step_mean": ("f8", np.nan),
    "step_variance": ("f4", np.inf),
    "step_noise": ("f4", np.nan),
    "step_alarm": ("f4", 0),
    "step_count": ("i4", 0),
    "link_mean": ("f8", np.nan),
    "link_variance": ("f4", np.inf),
    "link_noise": ("f4", np.nan),
    "link_alarm": ("f4", 0),
    "link_count": ("i4", 0),
    "link_bytes": ("f8", np.nan),  # moved by the task that `link_mean` is the overhead of
    "link_share": ("f4", np.nan),  # of it that grows with the bytes
    "link_share_variance": ("f4", np.nan),
    # claims: what a device says it computed beside what the clock saw (see claims.py)
    "claim_count": ("i4", 0),
    "claim_gap": ("f4", np.nan),  # ln(seconds seen / seconds claimed), smoothed
    "claim_doubt": ("f4", np.nan),  # standard deviations, smoothed
    "claim_last": ("f4", np.nan),  # ln(seconds claimed) by the last task
    "claim_clock": ("f4", np.nan),  # ln(seconds seen) of it
    "claim_squares": ("f4", 0),  # this and the next: moments of the changes of both from task to task
    "claim_products": ("f4", 0),
    "claim_total": ("f4", 0),
    "claim_honest": ("f4", 0),
    "clock_only": ("?", False),  # its claims are not believed
    "overstates": ("?", False),  # its processors promise far more than its times show
    "misreports": ("?", False),  # either
}
"""Name of a column -> its dtype, and what it holds where nothing is known."""

USUAL = ("step", "power", "link", "bytes")
"""Logarithms whose medians over the fleet are kept: seconds a step on a device of one processor, with the caution of a
first guess and at face value; seconds of everything else a task; bytes moved (see pace.py)."""

_FIRST_ROWS = 64


class Fleet:
    """The table. Rows are never removed: a device that left and returns finds its own again.

    `columns` holds the arrays themselves, with room for rows to come, and `cells` views of them that give and take single
    numbers, Python's own, in half the time: for code that runs at every event.
    """

    def __init__(self) -> None:
        self.size = 0
        self.alive_count = 0
        self.usual = {name: Window() for name in USUAL}
        self._row: dict[int, int] = {}
        self._idle: list[int] = []
        self.columns = _unknown(_FIRST_ROWS)
        self.cells: dict[str, Any] = {name: column.data for name, column in self.columns.items()}

    def __getitem__(self, column: str) -> NDArray[Any]:
        """A column: one entry a row, written to in place. Raises KeyError for a name that is none."""
        return self.columns[column][: self.size]

    def row(self, node_id: int) -> int | None:
        return self._row.get(node_id)

    def know(self, node_id: int) -> int:
        """The row of a device, which is made if it has none; it need not be there."""
        row = self._row.get(node_id)
        return self._add(node_id) if row is None else row

    # ------------------------------------------------------------ who is there

    def join(self, node_id: int) -> int:
        """The device is there. Returns its row; joining twice changes nothing."""
        row = self.know(node_id)
        if not self["alive"][row]:
            self["alive"][row] = True
            self.alive_count += 1
            self._place(row)
        return row

    def join_all(self, node_ids: Sequence[int], census: Mapping[str, NDArray[Any]] | None = None) -> None:
        """Many different devices at once, with what they say of themselves: `PacedGrid.census` of them.

        The same as `describe` and `join` one after the other, in a fraction of a microsecond a device.
        """
        new = np.array([node_id not in self._row for node_id in node_ids], dtype=np.bool_)
        fresh = np.asarray(node_ids, dtype=np.uint64)[new]
        first = self.size
        self._reserve(first + len(fresh))
        self.size += len(fresh)
        self["node_id"][first:] = fresh
        self._row.update(zip(fresh.tolist(), range(first, self.size), strict=True))
        rows = np.array([self._row[node_id] for node_id in node_ids], dtype=np.intp)
        for name, values in (census or {}).items():
            self[name][rows] = np.maximum(np.nan_to_num(values, nan=1), 1) if name == "slots" else values
        came = rows[~self["alive"][rows]]
        self["alive"][came] = True
        self.alive_count += len(came)
        free = rows[(self["running"][rows] < self["slots"][rows]) & (self["place"][rows] < 0)]
        self["place"][free] = np.arange(len(self._idle), len(self._idle) + len(free))
        self._idle.extend(free.tolist())

    def leave(self, row: int) -> None:
        """The device is gone. What it has in hand may still come."""
        if self["alive"][row]:
            self["alive"][row] = False
            self.alive_count -= 1
            self._place(row)

    def describe(self, row: int, profile: DeviceProfile) -> None:
        """Takes over what a device says of itself."""
        self["slots"][row] = max(1, profile.slots)
        self["cpu_count"][row] = profile.cpu_count or np.nan
        self["gpu_count"][row] = len(profile.gpus)
        self["memory_bytes"][row] = profile.memory_bytes or np.nan
        for name in ("load", "free_memory_bytes", "battery_percent"):
            value = getattr(profile, name)
            self[name][row] = np.nan if value is None else value
        self._place(row)

    def begin(self, row: int) -> None:
        """A task went out to the device."""
        cells = self.cells
        running = cells["running"]
        running[row] += 1
        if running[row] >= cells["slots"][row] and cells["place"][row] >= 0:
            self._remove(row)

    def end(self, row: int) -> None:
        """A task of the device came to its end."""
        cells = self.cells
        running = cells["running"]
        running[row] -= 1
        if cells["place"][row] < 0 and cells["alive"][row] and running[row] < cells["slots"][row]:
            self._append(row)

    def hold(self, row: int, change: int) -> None:
        """One more (1) or one less (-1) update of the device waits to be folded."""
        self.cells["held"][row] += change

    # ------------------------------------------------------------ who is idle

    @property
    def idle_count(self) -> int:
        return len(self._idle)

    def idle(self) -> Rows:
        """Rows of all devices that are there and have a slot free, in an order that depends on history alone."""
        return np.array(self._idle, dtype=np.intp)

    def draw_idle(self, count: int, rng: np.random.Generator) -> list[int]:
        """`count` different idle rows, uniformly; all of them if there are fewer. O(count)."""
        idle = self._idle
        if count >= len(idle):
            return list(idle)
        if count == 1:
            return [idle[int(rng.random() * len(idle))]]
        return [idle[i] for i in rng.choice(len(idle), count, replace=False).tolist()]

    def _place(self, row: int) -> None:
        """Puts a row into the list of idle ones, or takes it out, as its state says."""
        cells = self.cells
        free = cells["alive"][row] and cells["running"][row] < cells["slots"][row]
        if free and cells["place"][row] < 0:
            self._append(row)
        elif not free and cells["place"][row] >= 0:
            self._remove(row)

    def _append(self, row: int) -> None:
        self.cells["place"][row] = len(self._idle)
        self._idle.append(row)

    def _remove(self, row: int) -> None:
        """The last one takes its place."""
        places, last = self.cells["place"], self._idle.pop()
        if last != row:
            place = places[row]
            self._idle[place] = last
            places[last] = place
        places[row] = -1

    def _add(self, node_id: int) -> int:
        row = self.size
        self._reserve(row + 1)
        self.size += 1
        self.columns["node_id"][row] = node_id
        self._row[node_id] = row
        return row

    def _reserve(self, rows: int) -> None:
        """Makes room for so many rows."""
        room = len(self.columns["node_id"])
        if rows > room:
            self._take(_unknown(max(rows, 2 * room)), {name: self[name] for name in COLUMNS})

    def _take(self, columns: dict[str, NDArray[Any]], known: Mapping[str, Any]) -> None:
        """Has these columns from now on, which begin with what is known."""
        for name, values in known.items():
            columns[name][: len(values)] = values
        self.columns = columns
        self.cells.update({name: column.data for name, column in columns.items()})

    # ------------------------------------------------------------ saved and restored

    def to_plain(self) -> dict[str, Any]:
        """The table as plain values."""
        return {
            "idle": list(self._idle),
            "usual": {name: list(window.recent) for name, window in self.usual.items()},
            "columns": {name: self[name].tolist() for name in COLUMNS},
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Fleet:
        fleet = cls()
        fleet.size = len(plain["columns"]["node_id"])
        fleet._take(_unknown(max(fleet.size, _FIRST_ROWS)), plain["columns"])
        fleet._row = {int(node_id): row for row, node_id in enumerate(fleet["node_id"])}
        fleet.alive_count = int(fleet["alive"].sum())
        fleet._idle = [int(row) for row in plain["idle"]]
        fleet.usual = {name: Window(plain["usual"][name]) for name in USUAL}
        return fleet


def _unknown(rows: int) -> dict[str, NDArray[Any]]:
    """The columns of devices of which nothing is known."""
    together = np.dtype({"names": list(EVERY_TASK), "formats": [dtype for dtype, _ in EVERY_TASK.values()]}, align=True)
    record = np.empty(rows, together)
    columns = {name: record[name] if name in EVERY_TASK else np.empty(rows, COLUMNS[name][0]) for name in COLUMNS}
    for name, column in columns.items():
        column.fill(COLUMNS[name][1])
    return columns
