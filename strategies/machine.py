"""The decisions of a strategy as one state machine: `step(state, event) -> effects`.

Pure: no I/O, no clock, no randomness but the state's own generator. A synchronous round, a deadline, a buffer and full
asynchrony are the same machine with another gate. After every event it asks, in this order: may what arrived be
folded, is the run over, who is to be sent what.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fedpace.protocol.paced import Expired, Failed, Joined, Left, Replied, Tick
from fedpace.strategies.choosing import Chooser
from fedpace.strategies.composition import Composition
from fedpace.strategies.events import (
    Effect,
    Evaluated,
    Finish,
    Fold,
    Folded,
    Note,
    Profiled,
    Report,
    Restored,
    Save,
    Score,
    Scored,
    Sent,
    Started,
    Step,
    StrategyEvent,
)
from fedpace.strategies.fates import Fates
from fedpace.strategies.fleet import Fleet
from fedpace.strategies.pace import observe_task
from fedpace.strategies.parts import Context, Standing, Updates, Verdict
from fedpace.strategies.state import State, Task
from fedpace.strategies.tasks import Tasks
from fedpace.strategies.weights import combine, combine_metrics

SAVE_SECONDS = 10.0
_CAUSES: dict[type, str] = {
    kind: kind.__name__.lower()
    for kind in (Started, Restored, Joined, Left, Replied, Failed, Expired, Scored, Folded, Evaluated, Tick)
}

_BUSY = ("scoring", "folding", "finished")
"""Phases in which nothing is decided: an answer to an effect is awaited, or nothing is."""


class Machine:
    """The machine of one composition, for `rounds` rounds (versions, where the gate knows no rounds).

    `patience` is how many seconds it waits while too few devices are there before it gives the run up. Unless it `follows`
    the pace of devices all the same, it leaves that out where no part reads it.
    """

    def __init__(
        self, composition: Composition, rounds: int, patience: float = 3600.0, *, follows: bool = True
    ) -> None:
        self.composition = composition
        self.rounds = rounds
        self.patience = patience
        self._chooser = Chooser(composition)
        self._tasks = Tasks(composition, self._chooser)
        self._by_rounds, self._needed = composition.gate.rounds, composition.needed
        self._target = functools.lru_cache(1)(composition.target)
        self._follows = follows or composition.reads_pace
        self._patient = bool(getattr(composition.gate, "patient", False))
        self._least = int(getattr(composition.gate, "least", 0))
        self._timed = bool(getattr(composition.gate, "timed", True))
        self._groups = bool(getattr(composition.gate, "needs_groups", False))
        self._handlers: dict[type, Callable[[State, Any, list[Effect]], None]] = {
            Started: self._started,
            Restored: self._restored,
            Joined: self._joined,
            Left: self._left,
            Profiled: self._profiled,
            Replied: self._replied,
            Failed: self._failed,
            Expired: self._failed,
            Scored: self._scored,
            Folded: self._folded,
            Evaluated: self._evaluated,
            Tick: self._tick,
        }

    def start(self, seed: int) -> State:
        """The state before the first event."""
        return State(np.random.default_rng(seed))

    def step(self, state: State, event: StrategyEvent) -> list[Effect]:
        """What is to be done about an event, in order; `state` is updated in place."""
        state.now = max(state.now, event.at)
        effects: list[Effect] = []
        if state.phase != "finished":
            kind = type(event)
            self._handlers[kind](state, event, effects)
            if kind is not Profiled and not (self._patient and self._only_waits(state, event)):
                self._go_on(state, effects, _CAUSES[kind])
            if not state.settled:
                self._tasks.release(state, effects)
        return effects

    def sent(self, state: State, told: Sent) -> None:
        """Hears how a `Send` went, on which nothing is decided."""
        state.now = max(state.now, told.at)
        for task_id, message_id in zip(told.tasks, told.message_ids, strict=True):
            task = state.tasks[task_id]
            state.move(task, "out")
            task.message_id = message_id
            task.bytes_moved = float(told.nbytes)
            state.messages[message_id] = task_id

    def compressed(self, state: State, task: Task, stream: int) -> None:
        """Hears that a task's update has come compressed, of a device that wants to know its fate; `stream` is 0 where
        the update was rejected."""
        fates = state.told.get(task.row)
        if fates is None:
            alone = state.fleet.cells["running"][task.row] + state.fleet.cells["held"][task.row] == 1
            tasks = [task] if alone else [other for other in state.tasks.values() if other.row == task.row]
            fates = state.told[task.row] = Fates(other for other in tasks if other.kind == "train")
        fates.hear(task, stream)

    # ------------------------------------------------------------ events

    def _started(self, state: State, event: Started, effects: list[Effect]) -> None:
        state.fleet.join_all(event.node_ids, event.census)

    def _restored(self, state: State, event: Restored, effects: list[Effect]) -> None:
        """Takes up what was learned of devices, and what parts say is worth remembering; who is there now is not what
        was then, and clock and rounds begin anew."""
        fleet = state.fleet = Fleet.from_plain(event.saved["fleet"])
        fleet["running"][:] = fleet["held"][:] = 0
        fleet["rest_until"][:], fleet["last_selected"][:] = -math.inf, -1
        for row in range(fleet.size):
            fleet.leave(row)
        remembered = self._chooser.remembered
        state.memory = {key: dict(memory) for key, memory in event.saved["memory"].items() if key in remembered}

    def _joined(self, state: State, event: Joined, effects: list[Effect]) -> None:
        state.fleet.join(event.node_id)

    def _left(self, state: State, event: Left, effects: list[Effect]) -> None:
        row = state.fleet.row(event.node_id)
        if row is not None:
            state.fleet.leave(row)
            if state.evaluation is not None:
                state.evaluation.pending.discard(row)

    def _profiled(self, state: State, event: Profiled, effects: list[Effect]) -> None:
        state.fleet.describe(state.fleet.know(event.profile.node_id), event.profile)

    def _replied(self, state: State, event: Replied, effects: list[Effect]) -> None:
        task = self._tasks.take(state, event.message_id)
        if task is None:
            return
        fleet, row, metrics = state.fleet, task.row, event.metrics
        task.metrics = metrics
        task.seconds = event.at - task.sent_at
        task.samples = _number(metrics, self.composition.samples_key)
        if task.kind == "evaluate":
            assert state.evaluation is not None
            state.evaluation.out.discard(task.id)
            if task.samples > 0:
                state.evaluation.found.append((task.samples, metrics))
                self._tasks.forgive(state, row)
            state.move(task, "arrived")
            state.move(task, "counted")
            return
        self._tasks.count_out(state, task)
        done = _number(metrics, "local-steps")
        asked = float(task.work.steps or math.nan)
        task.steps = min(done, asked) if done > 0 else asked  # nobody is counted with more than was asked
        if math.isnan(task.steps) and done > 0:
            task.steps = done
        loss = _number(metrics, "train-loss")
        task.loss = _number(metrics, "loss") if math.isnan(loss) else loss
        task.bytes_moved += event.update.nbytes
        state.move(task, "arrived")
        state.waiting.append(task.id)
        fleet.hold(row, 1)
        cells = fleet.cells
        cells["samples"][row], cells["loss"][row] = task.samples, task.loss
        cells["steps"][row], cells["staleness"][row] = task.steps, state.version - task.version
        compute = event.compute_seconds
        if not compute > 0:
            compute = _number(metrics, "compute-seconds")
        steps = 1.0 if math.isnan(task.steps) else task.steps
        moved = task.bytes_moved
        if self._follows and observe_task(
            fleet, row, seconds=task.seconds, compute_seconds=compute, steps=steps, bytes_moved=moved
        ):
            node = cells["node_id"][row]
            effects.append(
                Note(f"task {task.id}", "a device misreports its own times: the clock is believed", {"node": node})
            )
        self._tasks.observe(state, task, compute)
        if not task.samples > 0:
            said = "says nothing of" if math.isnan(task.samples) else f"says {task.samples:g} for"
            reason = f"its reply {said} {self.composition.samples_key!r}"
            self._tasks.blame(state, task, f"node {event.node_id}: {reason}")
            if task.work.share and state.open and task.round == state.round:
                state.shares.append(task.work)
            self._tasks.discard(state, task, reason, effects)
            return
        self._tasks.forgive(state, row)
        if self.composition.max_staleness is not None and state.version - task.version > self.composition.max_staleness:
            self._tasks.discard(state, task, f"it is {state.version - task.version} versions old", effects)

    def _failed(self, state: State, event: Failed | Expired, effects: list[Effect]) -> None:
        task = self._tasks.take(state, event.message_id)
        if task is None:
            return
        task.seconds = event.at - task.sent_at
        self._tasks.blame(state, task, f"node {event.node_id}: {event.reason}")
        if task.kind == "evaluate":
            assert state.evaluation is not None
            state.evaluation.out.discard(task.id)
        else:
            self._tasks.count_out(state, task)
            self._tasks.give_back(state, task.version)
            if task.work.share and state.open and task.round == state.round:
                state.shares.append(task.work)
            self._tasks.observe(state, task, math.nan, event.reason or "failed")
        state.move(task, "lost")

    def _scored(self, state: State, event: Scored, effects: list[Effect]) -> None:
        if state.phase == "scoring":
            tasks = [state.tasks[task] for task in state.scoring]
            state.scoring = []
            state.enter("training")
            self._fold(state, tasks, effects, "scored", scores=event)

    def _folded(self, state: State, event: Folded, effects: list[Effect]) -> None:
        if state.phase != "folding":
            return
        if not math.isfinite(event.norm):
            reason = f"version {event.version} is not finite; try a smaller learning rate"
            self._finish(state, effects, "diverged", reason)
            return
        state.enter("training")
        state.version, state.settled = event.version, False
        if self._by_rounds:
            self._close_round(state, effects, "folded")
        else:
            self._chooser.begin_evaluation(state, effects, "folded", state.version)
            state.opened_at = state.now
        if state.now - state.saved_at >= SAVE_SECONDS:
            state.saved_at = state.now
            effects.append(Save("folded"))

    def _evaluated(self, state: State, event: Evaluated, effects: list[Effect]) -> None:
        """Nothing is decided on it yet; parts may look at it."""
        for name, value in event.metrics.items():
            if isinstance(value, int | float):
                state.memory.setdefault("evaluated", {})[name] = float(value)

    def _tick(self, state: State, event: Tick, effects: list[Effect]) -> None:
        """Time has passed: what follows from it is decided after every event."""

    # ------------------------------------------------------------ after every event

    def _only_waits(self, state: State, event: StrategyEvent) -> bool:
        """Whether an update arrived of a round of which more are out, and the gate waits for all: nothing is decided."""
        return type(event) is Replied and state.open and state.out > 0 and not state.shares and state.evaluation is None

    def _go_on(self, state: State, effects: list[Effect], cause: str) -> None:
        if state.phase in _BUSY:
            return
        state.wake = math.inf
        if state.phase in ("waiting", "training"):
            self._ask_gate(state, effects, cause)
        if state.phase in _BUSY:
            return
        if state.evaluation is not None:
            self._close_evaluation(state, effects, cause)
        rounds_done = state.round if self._by_rounds else state.version
        if rounds_done >= self.rounds and not state.open:
            self._end(state, effects, cause)
        if state.failures_in_a_row and state.phase != "finished":
            self._give_up_if_hopeless(state, effects)
        if state.evaluation is not None and state.phase != "finished":
            self._chooser.send_evaluations(state, effects, cause)
        if state.phase in ("waiting", "training"):
            self._send(state, effects, cause)

    def _ask_gate(self, state: State, effects: list[Effect], cause: str) -> None:
        """Folds what the gate wants folded, and closes the round where it is over."""
        if self._by_rounds and not state.open:
            return
        if len(state.waiting) < self._least and state.fleet.alive_count:
            return
        verdict = self._verdict(state)
        if verdict.fold:
            chosen = set(verdict.fold)
            state.waiting = [task for task in state.waiting if task not in chosen]
            folding = [state.tasks[task] for task in verdict.fold]
            if self.composition.needs_scores:
                state.scoring = [task.id for task in folding]
                state.enter("scoring")
                effects.append(Score(verdict.why or cause, list(state.scoring), [task.samples for task in folding]))
            else:
                self._fold(state, folding, effects, verdict.why or cause)
        elif self._by_rounds and not state.out and not state.shares and not state.waiting:
            self._close_round(state, effects, "nothing of the round arrived")
        else:
            state.wake = min(state.wake, verdict.until)
            if verdict.why:
                effects.append(Note(cause, verdict.why))

    def _verdict(self, state: State) -> Verdict:
        standing = Standing(
            now=state.now,
            version=state.version,
            opened_at=state.opened_at,
            target=state.target,
            sent=state.sent,
            out=state.out + len(state.shares),
            late=state.late,
            waiting=tuple(state.waiting),
            waiting_groups=tuple([state.tasks[task].work.group for task in state.waiting]) if self._groups else (),
            out_groups=tuple(state.groups_out) if self._groups else (),
            predicted_seconds=state.predicted_seconds,
        )
        return self.composition.gate.decide(standing, self._context(state, "gate"))

    def _fold(
        self, state: State, tasks: list[Task], effects: list[Effect], cause: str, scores: Scored | None = None
    ) -> None:
        """Weighs updates, folds those that have weight, and makes a new version of them."""
        columns: dict[str, Any] = {
            "samples": [task.samples for task in tasks],
            "staleness": [state.version - task.version for task in tasks],
            "steps": [task.steps for task in tasks],
            "seconds": [task.seconds for task in tasks],
            "loss": [task.loss for task in tasks],
        }
        if scores is not None:
            columns |= {"agreement": scores.agreement, "norm": scores.norm, "validation_loss": scores.validation_loss}
        rows = [task.row for task in tasks]
        updates = Updates(state.fleet, [task.id for task in tasks], rows, **columns)
        weights, reasons = combine(
            self.composition.weighers, updates, lambda part: self._chooser.context_of(state, part)
        )
        kept = [i for i, weight in enumerate(weights) if weight > 0]
        for i, task in enumerate(tasks):
            if weights[i] <= 0:
                self._tasks.discard(state, task, reasons.get(i, "its weight is 0"), effects)
        if kept:
            folded = [tasks[i] for i in kept]
            effects.append(
                Fold(
                    cause,
                    [task.id for task in folded],
                    [float(weights[i]) for i in kept],
                    [task.row for task in folded],
                    [int(updates.staleness[i]) for i in kept],
                    [task.steps for task in folded],
                    state.fleet.size,
                )
            )
            this_round = state.round if self._by_rounds else state.version + 1
            metrics = combine_metrics([(task.samples, task.metrics) for task in folded], self.composition.samples_key)
            effects.append(Step(cause, state.version + 1, this_round, len(folded), metrics))
            state.enter("folding")
            for task in folded:
                state.fleet.hold(task.row, -1)
                state.fleet.cells["folded"][task.row] += 1
                state.move(task, "folded")
                self._tasks.give_back(state, task.version)
        elif self._by_rounds:
            self._close_round(state, effects, cause)

    def _close_round(self, state: State, effects: list[Effect], cause: str) -> None:
        """The round is over: what is still out is late, or given up."""
        state.open = False
        state.shares.clear()
        state.late += state.out
        state.out = 0
        if self.composition.gate.late == "discard":
            self._tasks.cancel(
                state, [task for task in state.tasks.values() if task.kind == "train"], effects, "its round is over"
            )
        self._chooser.begin_evaluation(state, effects, cause, state.round)
        state.enter("evaluating" if state.evaluation is not None else "training")

    def _close_evaluation(self, state: State, effects: list[Effect], cause: str) -> None:
        """Reports what the devices found, once none of them is waited for."""
        evaluation = state.evaluation
        if evaluation is None or evaluation.out or evaluation.pending:
            return
        state.evaluation = None
        metrics = combine_metrics(evaluation.found, self.composition.samples_key)
        effects.append(Report(cause, evaluation.version, evaluation.round, len(evaluation.found), metrics))
        self._tasks.give_back(state, evaluation.version)
        if state.phase == "evaluating":
            state.enter("training")

    def _send(self, state: State, effects: list[Effect], cause: str) -> None:
        """Opens the next round, or fills the slots that are free."""
        gate, alive = self.composition.gate, state.fleet.alive_count
        idle_run = not state.out and not state.late
        if alive < (1 if state.open else self._needed):
            if idle_run:
                self._wait_for_devices(state, effects)
            return
        state.lonely_since = None
        before = state.next_task
        if state.open:
            self._chooser.send_shares(state, effects, cause)
        elif self._by_rounds:
            self._chooser.open_round(state, effects, cause)
        else:
            state.target = self._target(alive)
            out = state.out + (len(state.waiting) if gate.holds else 0)
            self._chooser.send_trains(state, effects, cause, gate.sends(state.target) - out)
        if not state.out:
            if idle_run:
                self._wait_for_rest(state)
        elif state.next_task != before and self._timed:  # what is out now may change when to look again
            verdict = self._verdict(state)
            state.wake = min(state.wake, state.now if verdict.fold else verdict.until)

    def _wait_for_devices(self, state: State, effects: list[Effect]) -> None:
        """Too few are there, and nothing is at work: patience has an end."""
        if not state.open:
            state.enter("waiting")
        if state.lonely_since is None:
            state.lonely_since = state.now
        ends = state.lonely_since + self.patience
        state.wake = min(state.wake, ends)
        if state.now >= ends:
            there, needed = state.fleet.alive_count, self.composition.needed
            reason = f"{there} devices were connected for {self.patience:g} s, and {needed} are needed"
            self._finish(state, effects, "no devices", reason)

    def _wait_for_rest(self, state: State) -> None:
        """All who are there rest after failures, or the selector wants none of them now: look again soon."""
        rests = state.fleet["rest_until"][state.fleet.idle()]
        later = rests[rests > state.now]
        state.wake = min(state.wake, float(later.min()) if len(later) else state.now + 1.0)

    def _give_up_if_hopeless(self, state: State, effects: list[Effect]) -> None:
        """Three failures a device, and nothing arrived in between."""
        if state.failures_in_a_row >= max(12, min(3 * state.fleet.alive_count, 1000)):
            reason = f"the last {state.failures_in_a_row} tasks all failed; the last one: {state.last_failure}"
            self._finish(state, effects, "every task failed", reason)

    def _end(self, state: State, effects: list[Effect], cause: str) -> None:
        """All versions are made: what is out is given up, and the last evaluation awaited."""
        trains = [task for task in state.tasks.values() if task.kind == "train" and task.state != "arrived"]
        self._tasks.cancel(state, trains, effects, "the run has all its versions")
        for task in [state.tasks[task] for task in state.waiting]:
            self._tasks.discard(state, task, "the run has all its versions", effects)
        if state.phase in ("waiting", "training", "evaluating"):
            if state.phase == "waiting":
                state.enter("training")
            state.enter("ending")
        if state.evaluation is None:
            self._finish(state, effects, "completed", f"{self.rounds} {'rounds' if self._by_rounds else 'versions'}")

    def _finish(self, state: State, effects: list[Effect], status: str, reason: str) -> None:
        self._tasks.cancel(state, list(state.tasks.values()), effects, "the run is over")
        for task in list(state.tasks.values()):
            self._tasks.discard(state, task, "the run is over", effects)
        state.scoring = []
        state.shares.clear()
        if state.evaluation is not None:
            self._tasks.give_back(state, state.evaluation.version)
            state.evaluation = None
        state.enter("finished")
        state.wake = math.inf
        effects += [Save(status), Finish(status, status, reason)]

    def _context(self, state: State, role: str) -> Context:
        return self._chooser.context(state, role)


def _number(metrics: Any, name: str) -> float:
    """A metric as a finite number; NaN where there is none."""
    value = metrics.get(name)
    if type(value) is float and value - value == 0.0:  # it is finite
        return value
    try:
        number = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:  # integers have no end
        return math.nan
    return number if math.isfinite(number) else math.nan
