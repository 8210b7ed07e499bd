"""Virtual grids for tests: fleets from a few lines of TOML, and an executor whose work is counting."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from fedpace.hosting.flower import SUPERLINK_NODE_ID, Run, become
from fedpace.hosting.outputs import Outputs
from fedpace.hosting.virtualtime import virtual_time
from fedpace.protocol.paced import Event, Order, Tick
from fedpace.simulations.executors.updates import MetricsUpdate
from fedpace.simulations.fleets import SimulatedFleet, load_fleet
from fedpace.simulations.grid import VirtualGrid
from fedpace.simulations.transfers import REPLY_BYTES
from fedpace.simulations.work import Answer, Computation, Executor

RUN_ID = 11
GridOf = Callable[..., VirtualGrid]

# Figures that float32 holds exactly: 1/16 s a step, 1/64 s of latency, 1 MB/s down and 0.5 MB/s up.
EVEN = """
[compute]
seconds_per_step = 0.0625
[network]
down_mbit = 8.0
up_mbit = 4.0
latency_ms = 15.625
"""
DOWN, UP, LATENCY, STEP = 1e6, 0.5e6, 0.015625, 0.0625
NODE = 1000
STEPS = {"local-steps": 16}


def make_fleet(folder: Path, toml: str, devices: int, seed: int = 1) -> SimulatedFleet:
    path = folder / "fleet.toml"
    path.write_text(toml)
    return load_fleet(str(path), devices, seed)


class Counter:
    """An executor that counts: a device's state says how many of its tasks came to their end before this one.

    `seen` are the computations in the order in which they were run, `states` the count that each found; `batches` how
    many were run together. What the grid keeps of a computation is checked when it is run, not when it is sent.
    """

    def __init__(self, cohort: int = 1, keeps_state: bool = True) -> None:
        self._cohort, self._keeps_state = cohort, keeps_state
        self.seen: list[Computation] = []
        self.states: list[int] = []
        self.batches: list[int] = []

    @property
    def cohort(self) -> int:
        return self._cohort

    @property
    def keeps_state(self) -> bool:
        return self._keeps_state

    def steps(self, device: int, message_type: str, config: Mapping[str, Any]) -> float | None:
        return None

    def run(self, computations: Sequence[Computation]) -> list[Answer]:
        self.batches.append(len(computations))
        return [self._count(computation) for computation in computations]

    def close(self) -> None:
        """There is nothing to end."""

    def _count(self, computation: Computation) -> Answer:
        before = 0 if computation.state is None else int(computation.state.metric_records["tally"]["n"])  # type: ignore[arg-type]
        self.seen.append(computation)
        self.states.append(before)
        metrics = {"task": computation.task, "before": before}
        return Answer(MetricsUpdate(metrics), metrics, state=RecordDict({"tally": MetricRecord({"n": before + 1})}))


@contextmanager
def virtual_grid(
    folder: Path, fleet: SimulatedFleet, executor: Executor, *, seed: int = 3, clock: bool = False
) -> Iterator[VirtualGrid]:
    """A grid of a run; with `clock`, this thread's time is the grid's."""
    become(RUN_ID, SUPERLINK_NODE_ID)
    outputs = Outputs(folder / "out", only_last=True)
    grid = VirtualGrid(Run.create_empty(RUN_ID), fleet, executor, outputs, seed=seed)
    try:
        if clock:
            with virtual_time(grid.now, grid.sleep):
                yield grid
        else:
            yield grid
    finally:
        outputs.close()


def content(**config: Any) -> RecordDict:
    """Four float32 ones and a config."""
    arrays = ArrayRecord({"w": Array(np.ones(4, np.float32))})
    return RecordDict({"arrays": arrays, "config": ConfigRecord(config)})


def nbytes(records: RecordDict) -> int:
    """What the arrays of records take on their way."""
    return sum(len(array.data) for record in records.array_records.values() for array in record.values())


TASK = 2 * LATENCY + (nbytes(content()) + REPLY_BYTES) * (1 / DOWN + 1 / UP) + 16 * STEP
"""Seconds of a task of 16 steps on a device of `EVEN` that is sent `content()`."""


def requests(grid: VirtualGrid, records: RecordDict, *rows: int, ttl: float | None = None) -> list[Message]:
    """Messages to train, the same to devices in some rows."""
    return [grid.create_message(records, "train", NODE + row, "", ttl) for row in rows]


def events(grid: VirtualGrid, seconds: float = 1e5) -> list[Event]:
    """Everything that happens within some seconds."""
    until = grid.now() + seconds
    found: list[Event] = []
    while not isinstance(event := grid.next_event(until), Tick):
        found.append(event)
    return found


def orders(*rows: int, **config: Any) -> list[Order]:
    """Of tasks of 16 steps."""
    return [Order(NODE + row, {**STEPS, **config}) for row in rows]


def wait_for(grid: VirtualGrid, ids: Iterable[str]) -> list[Message]:
    """The answers to messages, pulled as an app does that has nothing else to do."""
    ids = list(ids)
    found: list[Message] = []
    while len(found) < len(ids):
        before = grid.now()
        found += grid.pull_messages(ids)
        assert found or before < grid.now() <= before + 1, "a pull in vain lets time pass"
    return found
