"""What a strategy is composed of. Each part is pure: no I/O, no clock, no randomness but that of its `Context`.

A part is a frozen dataclass with the method named here, or, for selectors and weighers, a plain function of the same
arguments. What a part remembers is plain data (numbers, text, lists, dicts with text keys) in `context.memory`, which
begins as `{}`, belongs to the machine and is saved with it; so one part may serve many runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fedpace.strategies.fleet import Fleet, Floats, Rows
from fedpace.strategies.pace import bytes_per_second, overhead_seconds, seconds_per_step

Vector = NDArray[np.floating[Any]]
"""A whole model, or a change of one, flat: float32 (float64 where the model has such arrays), shape (parameters,)."""


@dataclass(slots=True)
class Context:
    """What a part may look at beside its arguments.

    `now` is in seconds on the grid's clock; `version` counts server steps; `round` counts the times that devices were
    chosen together, and is the version where they never are; `memory` is this part's own.
    """

    fleet: Fleet
    rng: np.random.Generator
    now: float = 0.0
    version: int = 0
    round: int = 0
    memory: dict[str, Any] = field(default_factory=dict)


class Devices:
    """Some devices, as arrays of equal length: `devices.loss[i]` and `devices.samples[i]` belong to one device.

    Any column of `fedpace.strategies.fleet.COLUMNS` is an attribute; so are `row`, `seconds_per_step`,
    `overhead_seconds` (transfers and waiting, a task) and `bytes_per_second`, NaN where nothing is known to tell it from.
    """

    def __init__(self, fleet: Fleet, rows: Rows) -> None:
        self.row = rows
        self._fleet = fleet

    def __len__(self) -> int:
        return len(self.row)

    def __getattr__(self, column: str) -> NDArray[Any]:
        if column.startswith("_"):
            raise AttributeError(column)
        try:
            return self._fleet[column][self.row]
        except KeyError:
            raise AttributeError(f"devices have no column {column!r}") from None

    @property
    def seconds_per_step(self) -> Floats:
        return seconds_per_step(self._fleet, self.row)

    @property
    def bytes_per_second(self) -> Floats:
        return bytes_per_second(self._fleet, self.row)

    @property
    def overhead_seconds(self) -> Floats:
        return overhead_seconds(self._fleet, self.row)


@dataclass(frozen=True, slots=True)
class Work:
    """What one device is asked to do.

    `steps` are local optimiser steps and `samples` a half-open range of the task's samples; where they are None the app
    decides. `share` marks a part of a task that was split: if it is lost another device gets it. `group` names those
    who arrive together (Compass). `config` is laid over the message's config record.
    """

    steps: int | None = None
    samples: tuple[int, int] | None = None
    share: bool = False
    group: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a task ended, for parts that learn from it.

    `seconds` is the time from sending to the end on the grid's clock, `compute_seconds` what the device says it computed
    (NaN if it does not), `bytes_moved` both ways together. `reason` says why there is no update, and is empty if there is one.
    """

    row: int
    steps: float
    group: int | None
    sent_at: float
    seconds: float
    compute_seconds: float
    bytes_moved: float
    samples: float
    loss: float
    staleness: int
    reason: str = ""


class Updates:
    """Updates about to be folded together, as arrays of equal length in the order of their arrival.

    `task` ids; `row` of their devices in `fleet`; `samples` (NaN if not said), `staleness` in versions, `steps` done
    (NaN if not known), `seconds` from sending to arrival, `loss` in training as reported (NaN if not); and, where the
    strategy scores updates, `agreement` with the consensus of the others (a cosine), `norm` (Euclidean) and
    `validation_loss` of the device's model (NaN without a validation function).
    """

    __slots__ = (
        "agreement",
        "fleet",
        "loss",
        "norm",
        "row",
        "samples",
        "seconds",
        "staleness",
        "steps",
        "task",
        "validation_loss",
    )

    def __init__(
        self, fleet: Fleet, task: Sequence[int], row: Sequence[int], **columns: Sequence[float] | Floats
    ) -> None:
        self.fleet = fleet
        self.task = np.array(task, dtype=np.int64)
        self.row: Rows = np.array(row, dtype=np.intp)
        unknown = np.full(len(self.task), np.nan)
        for name in ("samples", "staleness", "steps", "seconds", "loss", "agreement", "norm", "validation_loss"):
            given = columns.pop(name, None)
            setattr(self, name, unknown if given is None else np.array(given, dtype=np.float64))
        if columns:
            raise TypeError(f"updates have no columns {', '.join(columns)}")

    def __len__(self) -> int:
        return len(self.task)

    samples: Floats
    staleness: Floats
    steps: Floats
    seconds: Floats
    loss: Floats
    agreement: Floats
    norm: Floats
    validation_loss: Floats


SelectorFunction = Callable[[Devices, int, Context], "NDArray[Any] | Sequence[int]"]
WeigherFunction = Callable[[Updates, Context], "Floats | Sequence[float]"]


@runtime_checkable
class Selector(Protocol):
    """Which idle devices next.

    May also have `observe(outcome: Outcome, context: Context) -> None`, called at the end of every task, and
    `needs_all: bool`; a selector without it is shown at most 4,096 idle devices, drawn uniformly.
    """

    def select(self, devices: Devices, count: int, context: Context) -> NDArray[Any] | Sequence[int]:
        """Positions in `devices` (not rows) of at most `count` different ones, in the order in which to send.

        0 < count <= len(devices). Fewer than `count` means that the others are not wanted now.
        """


class Planner(Protocol):
    """How much work each chosen device gets. May also have `observe`, as selectors do."""

    def plan(self, devices: Devices, context: Context) -> Sequence[Work]:
        """One `Work` a device, in their order."""


@dataclass(slots=True)
class Standing:
    """Where a round, or an asynchronous run, stands when a gate is asked.

    `out` are tasks at work (of this round, where there are rounds), `late` those of rounds before; `waiting` the ids of
    updates that arrived and are not folded, oldest first, `waiting_groups` their groups; `out_groups` the groups of
    those out (both empty unless the gate says `needs_groups`). `target` is the number of updates wanted (the cohort, or the number of tasks to keep out),
    `opened_at` the time when the round was opened; `predicted_seconds` how long each of its tasks was expected to take
    then (NaN where unknown).
    """

    now: float
    version: int
    opened_at: float
    target: int
    sent: int
    out: int
    late: int
    waiting: tuple[int, ...]
    waiting_groups: tuple[int | None, ...] = ()
    out_groups: tuple[int | None, ...] = ()
    predicted_seconds: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a gate decides: the updates to `fold` now (none: wait on), and when to look again if nothing happens.

    `until` is in seconds on the grid's clock. `why` goes to the decision log.
    """

    fold: tuple[int, ...] = ()
    until: float = float("inf")
    why: str = ""


class Gate(Protocol):
    """When to fold, and how many tasks to keep out.

    `rounds`: devices are chosen together once the round before is folded; else one by one as they become free.
    `late`: what becomes of tasks still out when their round closes: "discard" or "fold" (stale, in a later round).
    `holds`: a device whose update waits gets no new task until it is folded.

    It may say `timed = False` where no verdict of it has a time `until`, so that it is not asked again after sending;
    `patient = True` where it folds nothing while anything of the round is out, so that it is not asked before;
    `least`, a number of updates, where it decides nothing with fewer while any device is there;
    and `needs_groups = True` where it looks at groups.
    """

    @property
    def rounds(self) -> bool: ...
    @property
    def late(self) -> str: ...
    @property
    def holds(self) -> bool: ...

    def sends(self, target: int) -> int:
        """How many tasks to have out (or, in rounds, to send at once) for `target` updates."""

    def decide(self, standing: Standing, context: Context) -> Verdict: ...


@runtime_checkable
class Weigher(Protocol):
    """A factor of every update's weight; the factors of all weighers multiply.

    The weight of update i is p_i * a_i, where p_i are the products of all relative factors, divided by their sum, and
    a_i the product of all absolute ones (see `AbsoluteWeigher`). A weigher with `needs_scores = True` makes the strategy
    score updates before they are folded. May also have `observe`, as selectors do.
    """

    def weigh(self, updates: Updates, context: Context) -> Floats | Sequence[float]:
        """One finite factor >= 0 an update; 0 leaves it out."""


class AbsoluteWeigher(Protocol):
    """A factor that is not divided away: it makes the whole step longer or shorter (staleness in FedBuff, FedNova)."""

    def scale(self, updates: Updates, relative: Floats, context: Context) -> Floats | Sequence[float]:
        """One finite factor >= 0 an update. `relative` are the p_i: they sum to 1."""


@dataclass(frozen=True, slots=True)
class Folding:
    """One update on its way into the model, for compensators.

    `weight` is what it will be multiplied with, `staleness` in versions, `steps` done (NaN if not known). `base` is the
    model it was trained from, `current` the model it is folded into; neither may be written to. `extra` is what the
    device sent in the record that the compensator reads, flat, or None. `count` updates are folded together, in a fleet
    of `devices`.
    """

    task: int
    row: int
    weight: float
    staleness: int
    steps: float
    base: Vector
    current: Vector
    extra: Vector | None
    count: int
    devices: int


class Compensator(Protocol):
    """Corrects what staleness, drift or absence did to updates. `memory` holds its arrays and plain values by name."""

    def adjust(self, delta: Vector, update: Folding, memory: dict[str, Any]) -> Vector:
        """The change that an update stands for, corrected; `delta` may be written to."""

    def finish(self, step: Vector, folded: Sequence[Folding], memory: dict[str, Any]) -> Vector:
        """The weighted sum of all adjusted changes, corrected; called once a fold. `step` may be written to."""


class ControlCompensator(Compensator, Protocol):
    """A compensator that speaks with its client mod: one more array record goes out, and one more comes back."""

    @property
    def record(self) -> str:
        """Name of the array record, in messages and in replies."""

    def outgoing(self, current: Vector, memory: dict[str, Any]) -> Vector:
        """What goes out with the model, in the model's layout."""


class Folder(Protocol):
    """Makes one change of many. `needs` is "sums" (each change is seen once, then gone) or "all" (kept until the end:
    the memory of as many models as there are updates, see `Ledger.fold_bytes`).

    `against`: "base", where a change is the device's model minus the one it began with, or "current", where it is
    the device's model minus the one it is folded into (FedAsync).
    """

    @property
    def needs(self) -> str: ...
    @property
    def against(self) -> str: ...

    def fold(self, changes: Iterator[tuple[float, Vector]], like: Vector) -> Vector:
        """The combined change, shaped and typed as `like`. Changes come weighted, and may be written to."""


class Optimiser(Protocol):
    """The server's optimiser: what the model moves by, given the combined change (a negative pseudo-gradient)."""

    def step(self, change: Vector, memory: dict[str, Any], step: int) -> Vector:
        """`step` counts from 1. `change` may be written to; `memory` holds moments by name."""
