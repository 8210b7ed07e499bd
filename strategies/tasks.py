"""What becomes of tasks, and what that says of their devices: taken from those at work, given up, discarded.

Every task is counted here: out or late, by the version that it began with, and by its group.
"""

from __future__ import annotations

import math

from fedpace.strategies.choosing import Chooser
from fedpace.strategies.composition import Composition
from fedpace.strategies.events import Cancel, Discard, Effect, Release
from fedpace.strategies.parts import Outcome
from fedpace.strategies.state import State, Task

SHORTEST_REST, LONGEST_REST = 0.1, 600.0
"""Seconds that a device is left alone after its second failure in a row (at least), and after many (at most)."""


class Tasks:
    """The tasks of a state. Tells those parts of a composition that observe what came of each."""

    def __init__(self, composition: Composition, chooser: Chooser) -> None:
        self._chooser = chooser
        self._by_rounds = composition.gate.rounds
        self._observers = [(role, part.observe) for role, part in composition.parts() if hasattr(part, "observe")]

    def take(self, state: State, message_id: str) -> Task | None:
        """The task that an answer is to, no longer at work; None for one that nobody waits for."""
        task_id = state.messages.pop(message_id, None)
        if task_id is None:
            return None
        task = state.tasks[task_id]
        state.fleet.end(task.row)
        return task

    def blame(self, state: State, task: Task, reason: str) -> None:
        """The device did no good: after two times in a row it is left alone for a while, each time for longer."""
        fleet, row = state.fleet, task.row
        state.failures_in_a_row += 1
        state.last_failure = reason
        fleet["failed"][row] += 1
        fleet["failures_in_a_row"][row] += 1
        if (again := int(fleet["failures_in_a_row"][row])) > 1:
            rest = max(task.seconds, SHORTEST_REST) * 2.0 ** min(again - 2, 20)
            fleet["rest_until"][row] = state.now + min(rest, LONGEST_REST)

    def forgive(self, state: State, row: int) -> None:
        state.failures_in_a_row = 0
        state.fleet.cells["failures_in_a_row"][row] = 0

    def count_out(self, state: State, task: Task) -> None:
        """One training task less is out, of this round or of one before."""
        if self._by_rounds and not (state.open and task.round == state.round):
            state.late -= 1
        else:
            state.out -= 1
        if (group := task.work.group) is not None:
            state.groups_out[group] -= 1
            if not state.groups_out[group]:
                del state.groups_out[group]

    def cancel(self, state: State, tasks: list[Task], effects: list[Effect], cause: str) -> None:
        """Gives up those of some tasks that are at work."""
        tasks = [task for task in tasks if task.state == "out"]
        if not tasks:
            return
        effects.append(Cancel(cause, [task.id for task in tasks], [task.message_id for task in tasks]))
        for task in tasks:
            del state.messages[task.message_id]
            state.fleet.end(task.row)
            if task.kind == "train":
                self.count_out(state, task)
                self.give_back(state, task.version)
                task.seconds = state.now - task.sent_at
                self.observe(state, task, math.nan, cause)
            elif state.evaluation is not None:
                state.evaluation.out.discard(task.id)
            state.move(task, "given up")

    def discard(self, state: State, task: Task, reason: str, effects: list[Effect]) -> None:
        if task.id in state.waiting:
            state.waiting.remove(task.id)
        effects.append(Discard(f"task {task.id}", [task.id], reason))
        state.fleet.hold(task.row, -1)
        state.move(task, "discarded")
        self.give_back(state, task.version)

    def give_back(self, state: State, version: int) -> None:
        """One less needs a version."""
        state.versions_out[version] -= 1
        if not state.versions_out[version]:
            del state.versions_out[version]
            state.settled = False

    def release(self, state: State, effects: list[Effect]) -> None:
        """Old versions that nobody needs any more."""
        state.settled = True
        state.versions_kept.add(state.version)
        unused = [v for v in state.versions_kept if v != state.version and v not in state.versions_out]
        if unused:
            state.versions_kept.difference_update(unused)
            effects.append(Release("unused", sorted(unused)))

    def observe(self, state: State, task: Task, compute: float, reason: str = "") -> None:
        if not self._observers:
            return
        outcome = Outcome(
            row=task.row,
            steps=task.steps,
            group=task.work.group,
            sent_at=task.sent_at,
            seconds=task.seconds,
            compute_seconds=compute,
            bytes_moved=task.bytes_moved,
            samples=task.samples,
            loss=task.loss,
            staleness=state.version - task.version,
            reason=reason,
        )
        for role, observe in self._observers:
            observe(outcome, self._chooser.context(state, role))
