"""What a report shows of single runs, from their trace: who worked how much, how stale updates were, what they weighed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpace.simulations.fleets import SimulatedFleet
from fedpace.simulations.fleets.fleet import FIRST_NODE_ID
from fedpace.simulations.trace import CANCELLED, EXPIRED, FAILED, KINDS, REPLIED, Trace

GANTT_DEVICES = 100
GANTT_TASKS = 1500
"""Tasks of all these devices that are shown, about: a strip of more cannot be read."""


def write_details(
    path: Path,
    fleet: SimulatedFleet,
    trace: Trace,
    folds: Sequence[tuple[Sequence[int], Sequence[int], Sequence[float]]],
    messages: Mapping[int, str],
) -> None:
    """Writes a compressed .npz.

    `tasks_per_device` (devices,), `device_speed` (devices,) beside the median's; `staleness`, `weights`, `weight_speed`
    (updates folded,); `gantt_device` (a position among the devices shown, fastest first), `gantt_start`, `gantt_end`
    (virtual seconds) and `gantt_outcome` (text).
    """
    columns = trace.columns()
    ended = np.isin(columns["kind"], (REPLIED, FAILED, EXPIRED, CANCELLED))
    rows = columns["node_id"][ended].astype(np.int64) - FIRST_NODE_ID
    tasks = columns["task"][ended]
    seconds = fleet.devices.step_seconds.astype(np.float64)
    speed = np.median(seconds) / seconds
    folded = [task for ids, _, _ in folds for task in ids]
    if messages:
        folded = [int(messages.get(task, task)) for task in folded]
    row_of = np.zeros(int(tasks.max(initial=0)) + 1, np.int64)
    row_of[tasks] = rows
    known = (rows >= 0) & (rows < fleet.size)
    arrays: dict[str, Any] = {
        "tasks_per_device": np.bincount(rows[known], minlength=fleet.size),
        "device_speed": speed,
        "staleness": np.array([value for _, stale, _ in folds for value in stale], np.int64),
        "weights": np.array([value for _, _, weights in folds for value in weights], np.float64),
        "weight_speed": speed[row_of[np.array(folded, np.int64)]],
        **_gantt(columns, ended, rows, speed),
    }
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def _gantt(
    columns: Mapping[str, NDArray[Any]],
    ended: NDArray[np.bool_],
    rows: NDArray[np.int64],
    speed: NDArray[np.float64],
) -> dict[str, NDArray[Any]]:
    """Tasks of a hundred devices, evenly by speed, over the first part of the run."""
    fastest_first = np.argsort(-speed, kind="stable")
    shown = fastest_first[np.linspace(0, len(speed) - 1, min(GANTT_DEVICES, len(speed))).round().astype(np.int64)]
    place = np.full(len(speed), -1)
    place[shown] = np.arange(len(shown))
    known = (rows >= 0) & (rows < len(speed))
    where = np.where(known, place[np.where(known, rows, 0)], -1)
    start, end = columns["sent_seconds"][ended], columns["seconds"][ended]
    kind = np.array(KINDS)[columns["kind"][ended].astype(np.int64)]
    chosen = np.flatnonzero(where >= 0)
    chosen = np.sort(chosen[np.argsort(start[chosen], kind="stable")][:GANTT_TASKS])
    return {
        "gantt_device": where[chosen],
        "gantt_start": start[chosen],
        "gantt_end": end[chosen],
        "gantt_outcome": kind[chosen],
    }
