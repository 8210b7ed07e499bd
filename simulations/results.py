"""Train late, train together: what tasks compute, when somebody is about to see it.

A task's result is computed together with those of the tasks that are over next. That is right because the end of a task
does not depend on its result, and its inputs were fixed when it was sent. See docs/simulation.md.
"""

from __future__ import annotations

from flwr.app import RecordDict

from fedpace.hosting.seeds import Seeds
from fedpace.hosting.virtualtime import wall_time
from fedpace.simulations.tasks import Agenda, Task
from fedpace.simulations.work import Executor

LOOKAHEAD = 4
"""Cohorts that are computed together, whatever the number of workers: results must not depend on it."""


class Results:
    """`states` are the `context.state` of devices, as their last task that came to its end left them."""

    def __init__(self, executor: Executor, agenda: Agenda, seed: int) -> None:
        self.states: dict[int, RecordDict] = {}
        self._executor = executor
        self._agenda = agenda
        self._seeds = Seeds(seed, "clientapp")

    def compute(self, needed: Task) -> int:
        """Computes a task's answer together with those that are needed next. Returns how many."""
        tasks = self._agenda.to_compute(LOOKAHEAD * self._executor.cohort)
        assert tasks[0] is needed, "results are needed in the order in which tasks end"
        keeps_state, states = self._executor.keeps_state, self.states
        for task in tasks:
            task.seed = self._seeds.of(task.node_id, task.task)
            if keeps_state:
                task.state = states.get(task.device)
        with wall_time():
            answers = self._executor.run(tasks)
        for task, answer in zip(tasks, answers, strict=True):
            task.answer = answer
        return len(tasks)
