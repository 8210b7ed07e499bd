"""How long a task takes on a device, and how it ends: one at a time in plain Python, or many in numpy, the same bits.

A draw depends on (seed, row, task) and its arguments alone, except on devices that wear (battery, throttling): there it
depends on the row's earlier draws too, and `draw` moves their state on. Each step is written twice, for one task and for
many, with the same operations in the same order: that is what makes the bits the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpace.hosting.seeds import derive_seed
from fedpace.simulations.fleets import ends
from fedpace.simulations.fleets.devices import BYTES_PER_MB, BYTES_PER_MBIT, Devices, compute_tables, jitter_table
from fedpace.simulations.fleets.ends import OUTCOMES, REASONS, End, Ends
from fedpace.simulations.fleets.hashing import (
    COUNTER_STRIDE,
    GAMMA,
    ROW_STRIDE,
    UNIT,
    Floats,
    Words,
    counters,
    elements,
    look_up,
    look_up_many,
    mix,
    mix_many,
    uniform_many,
)
from fedpace.simulations.fleets.presence import Presence
from fedpace.simulations.fleets.settings import FleetSettings
from fedpace.simulations.fleets.wear import Wear

_LOW_HALF = 0xFFFF_FFFF
Numbers = NDArray[Any] | Sequence[float] | float
Rows = NDArray[np.int64]


class Draws:
    """The part of a fleet that turns tasks into ends."""

    def __init__(
        self, settings: FleetSettings, devices: Devices, presence: Presence | None, wear: Wear | None, seed: int
    ) -> None:
        self.settings, self.devices = settings, devices
        self._presence, self._wear = presence, wear
        self._key = derive_seed(seed, "fleet draws")
        self.server_bytes_per_second = settings.network.server_mbit * BYTES_PER_MBIT

        tables, link = compute_tables(settings.compute), jitter_table(settings.network.jitter)
        self._jitters = bool((tables != 1.0).any() or (link != 1.0).any())
        self._tables_array, self._link_array = tables, link
        self._tables, self._link = tables.tolist(), link.tolist()
        self._drifts, self._drift_limit = settings.compute.drift_per_hour > 0, settings.compute.drift_limit
        faults, memory, misreport = settings.faults, settings.memory, settings.misreport
        self._dropout, self._failure, self._notice = faults.dropout, faults.failure, faults.notice_seconds
        self._ends_early = faults.dropout + faults.failure
        self._needs_memory = memory.task_mb + memory.task_factor > 0
        self._task_bytes, self._task_factor = memory.task_mb * BYTES_PER_MB, memory.task_factor
        self._free = 1 - memory.used
        self._lies, self._claimed = misreport.share > 0, misreport.compute_factor

        self._kind, self._step_seconds = elements(devices.kind), elements(devices.step_seconds)
        self._down, self._up = elements(devices.down), elements(devices.up)
        self._latency, self._drift = elements(devices.latency), elements(devices.drift)
        self._memory, self._liar = elements(devices.memory_bytes), elements(devices.liar)

    # ------------------------------------------------------------ one task

    def draw(
        self, row: int, task: int, at: float, steps: float, down_bytes: int, up_bytes: int, transfers: int = 1
    ) -> End:
        """How a task that is sent to a device at `at` seconds ends. Plain numbers, not numpy's.

        `task` names the task, `steps` are local steps, `transfers` how many share the server's link meanwhile. Where the
        fleet is stateful, a row's draws come in the order of their times, one task at a time.
        """
        word = self._key + row * ROW_STRIDE + task * COUNTER_STRIDE
        download, compute, upload = self._times(row, word, at, steps, down_bytes, up_bytes, transfers)
        begun = at + download
        wear = self._wear
        lasts = math.inf
        if wear is not None:
            compute = wear.slowed(row, begun, compute)
            lasts = wear.lasts(row, begun)
        spent, lag, outcome, reason = self._fate(row, word, download, compute, upload, down_bytes)
        end = at + spent + lag
        if lasts < compute and download + lasts < spent:
            spent, outcome, reason, end = download + lasts, ends.LEFT, ends.BATTERY, begun + lasts

        if self._presence is not None or wear is not None:
            until = self._here_until(row, at)
            if until <= at:
                return End(at, OUTCOMES[ends.LEFT], 0.0, 0.0, 0.0, 0.0, REASONS[ends.ABSENT])
            if until < end:
                if outcome != ends.DROPPED or until < at + spent:
                    spent, outcome, reason = min(spent, until - at), ends.LEFT, ends.SESSION
                end = until
        if outcome != ends.REPLIED:
            upload = max(spent - download - compute, 0.0)
            compute = lasts if reason == ends.BATTERY else min(max(spent - download, 0.0), compute)
            download = min(spent, download)
        if wear is not None and (compute or reason == ends.BATTERY):
            wear.work(row, begun, compute, reason == ends.BATTERY)
        claimed = compute * self._claimed if self._lies and self._liar[row] else compute
        return End(end, OUTCOMES[outcome], compute, download, upload, claimed, REASONS[reason])

    def _times(
        self, row: int, word: int, at: float, steps: float, down_bytes: int, up_bytes: int, transfers: int
    ) -> tuple[float, float, float]:
        """Seconds of download, of compute on a device that is cool, and of upload, if nothing goes wrong."""
        compute, down, up = steps * self._step_seconds[row], self._down[row], self._up[row]
        if self._jitters:
            bits = mix(word)
            compute *= look_up(self._tables[self._kind[row]], bits >> 32)
            factor = look_up(self._link, bits & _LOW_HALF)
            down *= factor
            up *= factor
        if self._drifts:
            compute *= min(1.0 + self._drift[row] * at, self._drift_limit)
        share = self.server_bytes_per_second / max(transfers, 1)
        latency = self._latency[row]
        return latency + down_bytes / min(down, share), compute, latency + up_bytes / min(up, share)

    def _fate(
        self, row: int, word: int, download: float, compute: float, upload: float, down_bytes: int
    ) -> tuple[float, float, int, int]:
        """Seconds spent on a task, seconds until that is seen, outcome and reason, on a device that stays."""
        if self._needs_memory and self._task_bytes + self._task_factor * down_bytes > self._free * self._memory[row]:
            return download, self._latency[row], ends.FAILED, ends.MEMORY
        if self._ends_early:
            fate = (mix(word + GAMMA) >> 11) * UNIT
            if fate < self._dropout:
                return (download + compute + upload) * (fate / self._dropout), self._notice, ends.DROPPED, ends.NOTHING
            if fate < self._ends_early:
                moment = (fate - self._dropout) / self._failure
                return download + compute * moment, self._latency[row], ends.FAILED, ends.ERROR
        return download + compute + upload, 0.0, ends.REPLIED, ends.NOTHING

    def _here_until(self, row: int, at: float) -> float:
        """When a device that is there at `at` next goes of its own accord; `at` if it is absent or charging."""
        if self._wear is not None:
            away_from, away_until = self._wear.away(row)
            if away_from <= at < away_until:
                return at
        if self._presence is None:
            return math.inf
        present, until = self._presence.at(row, at)
        return until if present else at

    # ------------------------------------------------------------ many tasks

    def draw_many(
        self,
        rows: NDArray[Any],
        tasks: NDArray[Any],
        at: Numbers,
        steps: Numbers,
        down_bytes: Numbers,
        up_bytes: Numbers,
        transfers: Numbers = 1,
    ) -> Ends:
        """`draw` of many tasks: `rows` and `tasks` of shape (n,), whole numbers; the rest of that shape, or one for all.

        The same numbers bit for bit. Where the fleet is stateful and a row comes twice: one after the other, slower.
        """
        rows, tasks = np.asarray(rows, np.int64), np.asarray(tasks, np.int64)

        def full(given: Numbers) -> Floats:
            return np.broadcast_to(np.asarray(given, np.float64), rows.shape)

        at, down_bytes = full(at), full(down_bytes)
        if self._wear is not None and len(np.unique(rows)) < len(rows):
            columns = (rows, tasks, at, full(steps), down_bytes, full(up_bytes), full(transfers))
            lists = (column.tolist() for column in columns)
            return ends.gather([self.draw(*each) for each in zip(*lists, strict=True)])
        words = counters(self._key, rows, tasks)
        times = self._times_many(rows, words, at, full(steps), down_bytes, full(up_bytes), full(transfers))
        lasts = None
        if self._wear is not None:
            download, compute, upload = times
            times = download, self._wear.slowed_many(rows, at + download, compute), upload
            lasts = self._wear.lasts_many(rows, at + download)
        return self._end_many(rows, at, times, self._fate_many(rows, words, times, down_bytes), lasts)

    def _times_many(
        self,
        rows: Rows,
        words: Words,
        at: Floats,
        steps: Floats,
        down_bytes: Floats,
        up_bytes: Floats,
        transfers: Floats,
    ) -> tuple[Floats, Floats, Floats]:
        devices = self.devices
        compute = steps * devices.step_seconds[rows]
        down, up = devices.down[rows].astype(np.float64), devices.up[rows].astype(np.float64)
        if self._jitters:
            bits = mix_many(words)
            compute *= look_up_many(self._tables_array, bits >> np.uint64(32), devices.kind[rows])
            factor = look_up_many(self._link_array, bits & np.uint64(_LOW_HALF))
            down *= factor
            up *= factor
        if self._drifts:
            compute *= np.minimum(1.0 + devices.drift[rows].astype(np.float64) * at, self._drift_limit)
        share = self.server_bytes_per_second / np.maximum(transfers, 1.0)
        latency = devices.latency[rows].astype(np.float64)
        return latency + down_bytes / np.minimum(down, share), compute, latency + up_bytes / np.minimum(up, share)

    def _fate_many(
        self, rows: Rows, words: Words, times: tuple[Floats, Floats, Floats], down_bytes: Floats
    ) -> tuple[Floats, Floats, NDArray[np.uint8], NDArray[np.uint8]]:
        download, compute, upload = times
        spent, lag = download + compute + upload, np.zeros(len(rows))
        outcome, reason = np.zeros(len(rows), np.uint8), np.zeros(len(rows), np.uint8)
        if self._ends_early:
            fate = uniform_many(words + np.uint64(GAMMA))
            dropped = fate < self._dropout
            if self._dropout:
                spent[dropped] *= fate[dropped] / self._dropout
                lag[dropped], outcome[dropped] = self._notice, ends.DROPPED
            failed = ~dropped & (fate < self._ends_early)
            if self._failure:
                moment = (fate[failed] - self._dropout) / self._failure
                spent[failed] = download[failed] + compute[failed] * moment
                lag[failed] = self.devices.latency[rows[failed]]
                outcome[failed], reason[failed] = ends.FAILED, ends.ERROR
        if self._needs_memory:
            free = self._free * self.devices.memory_bytes[rows].astype(np.float64)
            small = self._task_bytes + self._task_factor * down_bytes > free
            spent[small], lag[small] = download[small], self.devices.latency[rows[small]]
            outcome[small], reason[small] = ends.FAILED, ends.MEMORY
        return spent, lag, outcome, reason

    def _end_many(
        self,
        rows: Rows,
        at: Floats,
        times: tuple[Floats, Floats, Floats],
        fates: tuple[Floats, Floats, NDArray[np.uint8], NDArray[np.uint8]],
        lasts: Floats | None,
    ) -> Ends:
        """The rest of `draw`, from what would happen on devices that stay. `lasts`: seconds their batteries do, if any."""
        (download, compute, upload), (spent, lag, outcome, reason) = times, fates
        end = at + spent + lag
        begun = at + download
        if lasts is not None:
            empty = (lasts < compute) & (download + lasts < spent)
            spent[empty], end[empty] = (download + lasts)[empty], (begun + lasts)[empty]
            outcome[empty], reason[empty] = ends.LEFT, ends.BATTERY
        if self._presence is not None or self._wear is not None:
            until = self._here_until_many(rows, at)
            absent, gone = until <= at, until < end
            lost = gone & ((outcome != ends.DROPPED) | (until < at + spent))
            spent[lost] = np.minimum(spent, until - at)[lost]
            outcome[lost], reason[lost] = ends.LEFT, ends.SESSION
            end[gone] = until[gone]
            spent[absent], end[absent] = 0.0, at[absent]
            outcome[absent], reason[absent] = ends.LEFT, ends.ABSENT
        early = outcome != ends.REPLIED
        upload = np.where(early, np.maximum(spent - download - compute, 0.0), upload)
        compute = np.where(early, np.minimum(np.maximum(spent - download, 0.0), compute), compute)
        download = np.where(early, np.minimum(spent, download), download)
        if self._wear is not None and lasts is not None:
            empty = reason == ends.BATTERY
            compute = np.where(empty, lasts, compute)
            works = (compute > 0.0) | empty
            self._wear.work_many(rows[works], begun[works], compute[works], empty[works])
        claimed = np.where(self.devices.liar[rows], compute * self._claimed, compute) if self._lies else compute
        return Ends(end, outcome, compute, download, upload, claimed, reason)

    def _here_until_many(self, rows: Rows, at: Floats) -> Floats:
        until = np.full(len(rows), math.inf)
        if self._presence is not None:
            present, until = self._presence.at_many(rows, at)
            until[~present] = at[~present]
        if self._wear is not None:
            charging = self._wear.away_many(rows, at)
            until[charging] = at[charging]
        return until
