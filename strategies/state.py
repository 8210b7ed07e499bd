"""What a run of a strategy is at: plain data, owned by the machine and changed by nobody else. No arrays of models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedpace.errors import RunError
from fedpace.strategies.fates import Fates
from fedpace.strategies.fleet import Fleet
from fedpace.strategies.parts import Work

PHASES: dict[str, frozenset[str]] = {
    "waiting": frozenset({"training", "scoring", "folding", "finished"}),  # for devices
    "training": frozenset({"waiting", "scoring", "folding", "evaluating", "ending", "finished"}),
    "scoring": frozenset({"training", "finished"}),
    "folding": frozenset({"training", "finished"}),
    "evaluating": frozenset({"waiting", "training", "ending", "finished"}),  # between rounds
    "ending": frozenset({"finished"}),  # the last evaluation is out
    "finished": frozenset(),
}
"""Phase of a run -> those that may follow it."""

TASKS: dict[str, frozenset[str]] = {
    "sending": frozenset({"out", "lost"}),
    "out": frozenset({"arrived", "lost", "given up"}),
    "arrived": frozenset({"folded", "discarded", "counted"}),
    "folded": frozenset(),
    "discarded": frozenset(),
    "counted": frozenset(),  # an evaluation
    "lost": frozenset(),  # failed or expired
    "given up": frozenset(),  # cancelled by us
}
"""State of a task -> those that may follow it. Those that nothing follows are its fates: it has exactly one."""


@dataclass(slots=True)
class Task:
    """A task between its sending and its fate. Times are seconds on the grid's clock."""

    id: int
    row: int
    kind: str
    version: int
    round: int
    work: Work
    sent_at: float
    state: str = "sending"
    message_id: str = ""
    bytes_moved: float = 0.0
    # of its update
    seconds: float = float("nan")
    steps: float = float("nan")
    samples: float = float("nan")
    loss: float = float("nan")
    metrics: Mapping[str, Any] = field(default_factory=dict)
    # of error feedback
    stream: int = 0  # that its update was of, where it wants to know its fate
    told: tuple[str, ...] = ()  # folded updates that it told its device of


@dataclass(slots=True)
class Evaluation:
    """The devices' evaluation of one version: rows still to be asked, tasks out, metrics with their samples."""

    version: int
    round: int
    pending: set[int]
    out: set[int] = field(default_factory=set)
    found: list[tuple[float, Mapping[str, Any]]] = field(default_factory=list)


@dataclass(slots=True)
class State:
    """One run. `tasks` holds those without a fate; `waiting` those whose update arrived, oldest first."""

    rng: np.random.Generator
    fleet: Fleet = field(default_factory=Fleet)
    phase: str = "waiting"
    now: float = 0.0
    version: int = 0
    round: int = 0
    next_task: int = 1
    tasks: dict[int, Task] = field(default_factory=dict)
    messages: dict[str, int] = field(default_factory=dict)
    waiting: list[int] = field(default_factory=list)
    scoring: list[int] = field(default_factory=list)
    shares: list[Work] = field(default_factory=list)  # lost, to be sent again in this round
    out: int = 0  # training tasks at work, of this round where there are rounds
    late: int = 0  # of earlier rounds
    open: bool = False  # a round is
    opened_at: float = 0.0
    sent: int = 0  # in this round
    target: int = 0
    predicted_seconds: tuple[float, ...] = ()
    wake: float = float("inf")  # look again then, if nothing happens
    lonely_since: float | None = None  # no device was there since
    versions_out: Counter[int] = field(default_factory=Counter)  # by tasks that began with them, and an evaluation
    versions_kept: set[int] = field(default_factory=lambda: {0})
    settled: bool = True  # no version has become useless since they were last looked through
    groups_out: Counter[int] = field(default_factory=Counter)
    evaluation: Evaluation | None = None
    evaluated_round: int = -1
    failures_in_a_row: int = 0
    last_failure: str = ""
    fates: Counter[str] = field(default_factory=Counter)
    told: dict[int, Fates] = field(default_factory=dict)  # rows of devices that are told the fates of their updates
    memory: dict[str, dict[str, Any]] = field(default_factory=dict)
    saved_at: float = float("-inf")

    def enter(self, phase: str) -> None:
        """Goes over to a phase. Raises RunError for a transition that is not in `PHASES`."""
        if phase == self.phase:
            return
        if phase not in PHASES[self.phase]:
            raise RunError(f"a run cannot go from {self.phase} to {phase}: this is a defect of the strategy")
        self.phase = phase

    def move(self, task: Task, to: str) -> None:
        """Moves a task on; one that reaches its fate is forgotten. Raises RunError for a move that is not in `TASKS`."""
        if to not in TASKS[task.state]:
            raise RunError(f"task {task.id} cannot go from {task.state} to {to}: this is a defect of the strategy")
        task.state = to
        if not TASKS[to]:
            self.fates[to] += 1
            del self.tasks[task.id]
            if self.told and (fates := self.told.get(task.row)) is not None:
                fates.settle(task, to)

    def to_plain(self) -> dict[str, Any]:
        """What outlives this process: what was learned of devices, and what parts remember."""
        return {"fleet": self.fleet.to_plain(), "memory": self.memory, "version": self.version, "round": self.round}


def validate(state: State) -> None:
    """Raises AssertionError where the state contradicts itself. Costs O(fleet): for tests."""
    fleet, tasks = state.fleet, state.tasks.values()
    at_work = [task for task in tasks if task.state in ("sending", "out")]
    running, held = np.zeros(fleet.size, int), np.zeros(fleet.size, int)
    np.add.at(running, [task.row for task in at_work], 1)
    np.add.at(held, [task.row for task in tasks if task.state == "arrived"], 1)
    assert (fleet["running"] == running).all(), "a device's tasks are not those that are out"
    assert (fleet["held"] == held).all(), "a device's waiting updates are not those that wait"
    trains = [task for task in at_work if task.kind == "train"]
    assert state.out + state.late == len(trains), "the tasks out are miscounted"
    assert len(set(state.messages.values())) == len(state.messages), "two messages are one task"
    assert set(state.messages.values()) <= set(state.tasks), "a message without a task"
    arrived = [task.id for task in tasks if task.state == "arrived"]
    assert sorted(state.waiting + state.scoring) == sorted(arrived), "waiting updates are not those that arrived"
    versions = Counter(task.version for task in tasks if task.kind == "train")
    if state.evaluation is not None:
        versions[state.evaluation.version] += 1
    assert +state.versions_out == versions, "versions in use are miscounted"
    idle = fleet["alive"] & (fleet["running"] < fleet["slots"])
    assert sorted(fleet.idle().tolist()) == np.flatnonzero(idle).tolist(), "idle devices are not those that are idle"
    assert fleet.alive_count == int(fleet["alive"].sum()), "devices are miscounted"
    if state.phase == "finished":
        assert not state.tasks, "the run ended with tasks that have no fate"
    elif state.phase == "training" and not trains and not state.waiting:
        assert state.wake < float("inf") or state.evaluation is not None or not idle.any(), "nothing can wake the run"
