"""Who is sent what: the half of the machine that asks selector and planner, and makes tasks of their answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedpace.errors import RunError
from fedpace.strategies.composition import Composition, name_of, select
from fedpace.strategies.events import Effect, Evaluate, Send, TaskOrder
from fedpace.strategies.pace import task_seconds
from fedpace.strategies.parts import Context, Devices, Work
from fedpace.strategies.state import Evaluation, State, Task

POOL = 4096
"""Idle devices that a selector is shown, unless it says otherwise."""


class Chooser:
    def __init__(self, composition: Composition) -> None:
        self.composition = composition
        self._pool = POOL if not getattr(composition.selector, "needs_all", False) else None
        self._predicts = getattr(composition.gate, "reads_pace", True)
        self._uniform = bool(getattr(composition.selector, "uniform", False))
        self._same: Work | None = getattr(composition.planner, "same", None)
        self._memory_keys = {id(part): getattr(part, "shares", role) for role, part in composition.parts()}
        self.remembered = {
            getattr(p, "shares", role) for role, p in composition.parts() if getattr(p, "remembers", False)
        }
        """Keys of the memories that a later run takes up: of parts that say they `remember`."""
        self._role_keys = {role: getattr(part, "shares", role) for role, part in composition.parts()}

    def context(self, state: State, role: str) -> Context:
        """The context of the part in a role; parts that say what they share have one memory."""
        return self._context(state, self._role_keys[role])

    def context_of(self, state: State, part: Any) -> Context:
        return self._context(state, self._memory_keys[id(part)])

    def _context(self, state: State, key: str) -> Context:
        memory = state.memory.setdefault(key, {})
        this_round = state.round if self.composition.gate.rounds else state.version
        return Context(state.fleet, state.rng, state.now, state.version, this_round, memory)

    # ------------------------------------------------------------ training

    def open_round(self, state: State, effects: list[Effect], cause: str) -> None:
        """Chooses a cohort and sends it off; without idle devices nothing is opened."""
        target = self.composition.target(state.fleet.alive_count)
        rows = self._choose(state, self.composition.gate.sends(target))
        if not rows:
            return
        state.enter("training")
        state.round += 1
        state.open = True
        state.opened_at = state.now
        works = self._plan(state, rows)
        self._send(state, effects, cause, "train", rows, works, state.version)
        state.sent = state.out
        state.target = min(target, state.sent)
        state.predicted_seconds = self._predict(state, rows, works) if self._predicts else ()

    def _predict(self, state: State, rows: Sequence[int], works: Sequence[Work]) -> tuple[float, ...]:
        """Seconds that each task is expected to take; where steps are up to the app, a task counts as one."""
        steps = np.array([work.steps or 1 for work in works], dtype=np.float64)
        return tuple(task_seconds(state.fleet, np.array(rows, np.intp), steps).tolist())

    def send_trains(self, state: State, effects: list[Effect], cause: str, count: int) -> None:
        """Sends one task each to up to `count` idle devices."""
        if count > 0 and state.fleet.idle_count:
            rows = self._choose(state, count)
            if rows:
                state.enter("training")
                self._send(state, effects, cause, "train", rows, self._plan(state, rows), state.version)

    def send_shares(self, state: State, effects: list[Effect], cause: str) -> None:
        """Sends lost shares of a split task to others."""
        if state.shares and state.fleet.idle_count:
            rows = self._choose(state, len(state.shares))
            works, state.shares = state.shares[: len(rows)], state.shares[len(rows) :]
            if works:
                self._send(state, effects, "a share was lost", "train", rows, works, state.version)

    def _choose(self, state: State, count: int) -> list[int]:
        """Rows of at most `count` idle devices. Raises RunError where a selector answers with what is no choice."""
        fleet, selector = state.fleet, self.composition.selector
        if self._uniform and (rows := self._draw(state, count)):
            return self._chosen(state, rows)
        if self._pool is None:
            pool = fleet.idle()
        else:
            pool = np.array(fleet.draw_idle(max(count, self._pool), state.rng), np.intp)
        ready = fleet["rest_until"][pool] <= state.now
        if self.composition.gate.holds:
            ready &= fleet["held"][pool] == 0
        pool = pool[ready]
        if not len(pool):
            return []
        count = min(count, len(pool))
        answer = select(selector, Devices(fleet, pool), count, self.context(state, "selector"))
        chosen = np.asarray(answer)
        if not len(chosen):
            return []
        if (
            chosen.dtype.kind not in "iu"
            or len(chosen) > count
            or chosen.min() < 0
            or chosen.max() >= len(pool)
            or (len(chosen) > 1 and len(np.unique(chosen)) < len(chosen))
        ):
            raise RunError(
                f"selector {name_of(selector)} returned {np.array2string(chosen, threshold=8)}: it must return at most "
                f"{count} different positions of the {len(pool)} devices it was shown"
            )
        return self._chosen(state, pool[chosen].tolist())

    def _draw(self, state: State, count: int) -> list[int]:
        """Idle devices at random, without looking at the others; none if one of them is not to be asked now."""
        rows = state.fleet.draw_idle(count, state.rng)
        rests, held, holds = state.fleet.cells["rest_until"], state.fleet.cells["held"], self.composition.gate.holds
        for row in rows:
            if rests[row] > state.now or (holds and held[row]):
                return []
        return rows

    def _chosen(self, state: State, rows: list[int]) -> list[int]:
        selected, last = state.fleet.cells["selected"], state.fleet.cells["last_selected"]
        this_round = state.round + 1 if self.composition.gate.rounds else state.version
        for row in rows:
            selected[row] += 1
            last[row] = this_round
        return rows

    def _plan(self, state: State, rows: Sequence[int]) -> Sequence[Work]:
        if self._same is not None:
            return [self._same] * len(rows)
        devices = Devices(state.fleet, np.array(rows, np.intp))
        works = self.composition.planner.plan(devices, self.context(state, "planner"))
        if len(works) != len(rows):
            raise RunError(
                f"planner {name_of(self.composition.planner)} returned {len(works)} works for {len(rows)} devices"
            )
        return works

    # ------------------------------------------------------------ evaluation

    def begin_evaluation(self, state: State, effects: list[Effect], cause: str, number: int) -> None:
        """Has version `state.version` evaluated, by the server and by devices, where it is its turn; `number` is the
        round's. Devices go on with one evaluation at a time."""
        composition = self.composition
        if number % composition.evaluate_every:
            return
        effects.append(Evaluate(cause, state.version, number))
        if composition.fraction_evaluate == 0.0 or state.evaluation is not None or not state.fleet.alive_count:
            return
        alive = np.flatnonzero(state.fleet["alive"])
        count = min(len(alive), max(int(len(alive) * composition.fraction_evaluate), composition.min_evaluate))
        if count:
            chosen = state.rng.choice(alive, count, replace=False)
            state.evaluation = Evaluation(state.version, number, {int(row) for row in chosen})
            state.versions_out[state.version] += 1

    def send_evaluations(self, state: State, effects: list[Effect], cause: str) -> None:
        """Sends the evaluation to those of its devices that are free."""
        evaluation = state.evaluation
        if evaluation is None or not evaluation.pending:
            return
        free = [row for row in sorted(evaluation.pending) if state.fleet["place"][row] >= 0]
        if free:
            evaluation.pending.difference_update(free)
            self._send(state, effects, cause, "evaluate", free, [Work()] * len(free), evaluation.version)

    # ------------------------------------------------------------ both

    def _send(
        self,
        state: State,
        effects: list[Effect],
        cause: str,
        kind: str,
        rows: Sequence[int],
        works: Sequence[Work],
        version: int,
    ) -> None:
        evaluation = state.evaluation
        if kind == "evaluate":
            assert evaluation is not None
            number = evaluation.round
        else:
            number = state.round if self.composition.gate.rounds else state.version + 1
        node_ids = state.fleet.cells["node_id"]
        orders = []
        for row, work in zip(rows, works, strict=True):
            if work.samples is not None and work.samples[0] >= work.samples[1]:
                continue  # a share of nothing
            task = Task(state.next_task, row, kind, version, number, work, state.now)
            state.next_task += 1
            state.tasks[task.id] = task
            state.fleet.begin(row)
            if kind == "train":
                state.out += 1
                state.versions_out[version] += 1
                if work.group is not None:
                    state.groups_out[work.group] += 1
            else:
                assert evaluation is not None
                evaluation.out.add(task.id)
            config = _config(work)
            if state.told and kind == "train" and row in state.told:
                config = state.told[row].tell(task, config)
            orders.append(TaskOrder(node_ids[row], config, task.id))
        if orders:
            effects.append(Send(cause, kind, version, number, orders))


def _config(work: Work) -> Mapping[str, Any]:
    """What a device is told of its work."""
    if work.steps is None and work.samples is None:
        return work.config
    told = dict(work.config)
    if work.steps is not None:
        told["local-steps"] = work.steps
    if work.samples is not None:
        told["sample-from"], told["sample-to"] = work.samples
    return told
