"""`VirtualGrid`: a simulated fleet behind Flower's `Grid` and fedpace's `PacedGrid`, in virtual time.

Train late, train together: when a task is sent, only its end is drawn. Its result is computed when somebody is about to
see it, and then together with those of the tasks that are over next. That is right because the end does not depend on
the result, and the inputs were fixed when the task was sent. See docs/simulation.md.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from flwr.app import DEFAULT_TTL, Array, Error, Message, Metadata, RecordDict
from numpy.typing import NDArray

from fedpace.errors import ConfigError, PayloadError, RunError
from fedpace.hosting.flower import (
    SUPERLINK_NODE_ID,
    ErrorCode,
    Run,
    RunNotRunningException,
    make_reply,
    set_message_id,
)
from fedpace.hosting.onethread import Turns
from fedpace.hosting.outputs import Outputs
from fedpace.hosting.seeds import Seeds
from fedpace.hosting.virtualtime import EPOCH, wall_time
from fedpace.protocol.codecs import typical_bytes
from fedpace.protocol.decoding import decode_steps, sent_records
from fedpace.protocol.encoded import CODEC
from fedpace.protocol.failures import Code
from fedpace.protocol.paced import (
    DeviceProfile,
    Event,
    Expired,
    Failed,
    Joined,
    Left,
    Order,
    PacedGrid,
    Replied,
    Reported,
    Tick,
)
from fedpace.simulations.fleets import End, SimulatedFleet
from fedpace.simulations.presence import Presence
from fedpace.simulations.tasks import Agenda, Chains, Stage, Task
from fedpace.simulations.trace import CANCELLED, EXPIRED, FAILED, JOINED, LEFT, REPLIED, Trace
from fedpace.simulations.work import Content, Executor

LOOKAHEAD = 4
"""Cohorts that are computed together, whatever the number of workers: results must not depend on it."""

DEFAULT_STEPS = 10.0

_LOOKS = 16
"""So often somebody may look who is there at one instant; strategies do a few times a round."""

REPLY_BYTES = 1_000
"""Bytes of a reply without a model."""

_MANY = 8
"""From so many on, ends are drawn in numpy."""

_LOST = {
    "dropped": (ErrorCode.CLIENT_APP_CRASHED, "the task was lost on the device"),
    "error": (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "the task failed on the device"),
    "memory": (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "the device has too little memory for the task"),
    "session": (Code.NODE_UNAVAILABLE, "the device went away with the task"),
    "battery": (Code.NODE_UNAVAILABLE, "the device's battery ran low"),
    "absent": (Code.NODE_UNAVAILABLE, "the device is not there"),
}


_NOTHING: Mapping[str, Any] = {}
_ENDS = (Replied, Failed, Expired)
_CHOICE = {"what", "kind", "version", "round", "tasks", "nodes", "steps", "cause"}
"""What a strategy says of devices that it chose."""


class Counts:
    """What became of tasks."""

    def __init__(self) -> None:
        self.sent = self.received = self.rejected = self.failed = self.expired = self.cancelled = self.computed = 0
        self.bytes_down = self.bytes_up = 0
        self.device_seconds = 0.0


class VirtualGrid(PacedGrid):
    """For one thread.

    `default_steps` are the local steps of a task of which neither the app nor its config says how many it takes.
    The run is told to stop at `until`, in virtual seconds. `progress` is called now and then, with the grid. With `turns` set, the threads that take turns may use it too.
    """

    checks_arrays = True
    keeps_state = False
    sets_seconds: ClassVar[bool] = True
    """Whether a reply that tells its own compute time is made to tell the simulated one."""

    def __init__(
        self,
        run: Run,
        fleet: SimulatedFleet,
        executor: Executor,
        outputs: Outputs,
        *,
        seed: int,
        default_steps: float = DEFAULT_STEPS,
        until: float = math.inf,
        progress: Callable[[VirtualGrid], None] = lambda grid: None,
    ) -> None:
        self.fleet = fleet
        self.counts = Counts()
        self.trace = Trace()
        self.events = 0
        self.turns: Turns | None = None
        self._thread = threading.get_ident()
        self._run = run
        self._executor = executor
        self._outputs = outputs
        self._seeds = Seeds(seed, "clientapp")
        self._default_steps = default_steps
        self._until = until
        self._progress = progress
        self._now = 0.0
        self._sequence = 0
        self._stopped = False
        self._first = int(fleet.node_ids[0])
        self._presence = None if fleet.always_present else Presence(fleet)
        self._listed: list[int] | None = None
        self._looks = 0
        self._agenda = Agenda()
        self._chains = Chains()
        self._tasks: dict[str, Task] = {}
        self._ready: OrderedDict[int, Event] = OrderedDict()
        self._heard = False  # whether anybody takes events; if not, comings and goings are not kept for them
        self._contents: OrderedDict[int, tuple[RecordDict, list[Any], Content]] = OrderedDict()
        self._states: dict[int, RecordDict] = {}
        self._observed: dict[int, tuple[float, float, float]] = {}
        self._quote = functools.lru_cache(64)(json.dumps)
        self._codec: str | None = getattr(executor, "codec", None)

    def stop(self) -> None:
        """Lets the run end at its next look at the grid. Safe from a signal handler."""
        self._stopped = True

    # ------------------------------------------------------------ Flower's Grid

    def set_run(self, run: Run) -> None:
        """The run is given by the simulation; this does nothing."""

    @property
    def run(self) -> Run:
        return replace(self._run)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=DEFAULT_TTL if ttl is None else ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Who is there. A loop that only looks makes time pass."""
        self._check_running()
        self._looks += 1
        if self._looks > _LOOKS:
            self.sleep(1.0)
        if self._listed is None:
            there = self.fleet.node_ids if self._presence is None else self.fleet.node_ids[self._presence.there]
            self._listed = there.tolist()
        return list(self._listed)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Sends messages; what is done to their content afterwards is not seen by devices."""
        return self._push(messages, recorded=False)

    def push_recorded(self, messages: Sequence[Message]) -> list[str]:
        return self._push(messages, recorded=True)

    def _push(self, messages: Iterable[Message], *, recorded: bool) -> list[str]:
        self._check_running()
        tasks = []
        for message in messages:
            metadata = message.metadata
            task = self._task(
                self._content(message.content),
                metadata.message_type,
                metadata.dst_node_id,
                "config",
                {},
                metadata.group_id,
                metadata.ttl,
            )
            set_message_id(message, task.message_id)
            metadata.created_at = task.created_at  # made a moment ago, by the wall's clock
            tasks.append(task)
        self._contents.clear()  # the same object may hold other things when it is pushed again
        return self._begin_all(tasks, recorded=recorded)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Answers that are there. A pull that finds none makes time pass, to the next event or for a second."""
        self._check_running()
        message_ids = list(message_ids)
        found = self._pull(message_ids)
        if not found and any(message_id in self._tasks for message_id in message_ids):
            self._advance(min(self._next_event_at(), self._now + 1.0))
            found = self._pull(message_ids)
        return found

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Sends, and waits for all answers or until `timeout` virtual seconds are over. Answers in the order sent."""
        order = list(self.push_messages(messages))
        until = math.inf if timeout is None else self._now + timeout
        answered = 0
        while True:
            while answered < len(order) and self._tasks[order[answered]].stage is Stage.ANSWERED:
                answered += 1
            if answered == len(order) or self._now >= until:
                return self._pull(order)
            if self.turns is not None and self.turns.here:
                self.turns.wait(functools.partial(self._all_answered, order[answered:]), until)
            else:
                self.pass_until(until)

    def _all_answered(self, message_ids: Iterable[str]) -> bool:
        return all(self._tasks[message_id].stage is Stage.ANSWERED for message_id in message_ids)

    def _pull(self, message_ids: Iterable[str]) -> list[Message]:
        found = []
        for message_id in message_ids:
            task = self._tasks.get(message_id)
            if task is not None and task.stage is Stage.ANSWERED:
                event = self._ready.pop(task.event)
                found.append(self._message(task, event))
                self._forget(task)
        return found

    def _message(self, task: Task, event: Event) -> Message:
        request = Metadata(
            run_id=self._run.run_id,
            message_id=task.message_id,
            src_node_id=SUPERLINK_NODE_ID,
            dst_node_id=task.node_id,
            reply_to_message_id="",
            group_id=task.group_id,
            created_at=task.created_at,
            ttl=task.ttl,
            message_type=task.message_type,
        )
        at, reply_id = EPOCH + event.at, f"{task.task}-reply"
        if isinstance(event, Replied):
            content = event.update.content()
            if self.sets_seconds:
                _with_seconds(content, event.compute_seconds)
            event.update.release()
            try:
                decode_steps(content, sent_records(task.content.records))
            except PayloadError as error:
                reason = f"the reply cannot be used: {error}"
                return make_reply(request, reply_id, at, None, Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, reason))
            return make_reply(request, reply_id, at, content, None)
        code = event.code if isinstance(event, Failed) else int(Code.MESSAGE_UNAVAILABLE)
        return make_reply(request, reply_id, at, None, Error(code, getattr(event, "reason", "")))

    # ------------------------------------------------------------ PacedGrid

    @property
    def seconds(self) -> float:
        """The same as `now()`, for those who watch a run and are no part of it."""
        return self._now

    def device_seconds(self) -> float:
        """Seconds of compute that devices have really spent until now, those on tasks that they are at included."""
        going = (task for task in self._tasks.values() if task.stage is Stage.GOING)
        return self.counts.device_seconds + sum(task.spent(self._now) for task in going)

    def now(self) -> float:
        return self._now

    def next_event(self, until: float) -> Event:
        self._check_running()
        self._heard = True
        ready = self._ready
        while not ready:
            at = self._next_event_at()
            if at > until:
                self._move_to(until)
                return Tick(self._now)
            if at == math.inf:
                raise RunError(
                    "nothing will ever happen: no task is out, no device comes or goes; give next_event a time"
                )
            self._happen(at)
        _, event = ready.popitem(last=False)
        if isinstance(event, _ENDS):
            self._forget(self._tasks[event.message_id])
        return event

    def send(
        self,
        content: RecordDict,
        message_type: str,
        orders: Sequence[Order],
        *,
        config_name: str = "config",
        group_id: str = "",
        ttl: float | None = None,
        decision: Mapping[str, Any] | None = None,
    ) -> list[str]:
        if decision is not None:
            self.record(decision)
        return self._send(content, message_type, orders, config_name, group_id, ttl, recorded=decision is not None)

    def _send(
        self,
        content: RecordDict,
        message_type: str,
        orders: Sequence[Order],
        config_name: str,
        group_id: str,
        ttl: float | None,
        *,
        recorded: bool,
    ) -> list[str]:
        self._check_running()
        shared = self._content(content, same=True)
        lives = DEFAULT_TTL if ttl is None else ttl
        tasks = [self._task(shared, message_type, o.node_id, config_name, o.config, group_id, lives) for o in orders]
        return self._begin_all(tasks, recorded=recorded)

    def cancel(self, message_ids: Iterable[str]) -> None:
        known = []
        for message_id in message_ids:
            task = self._tasks.get(message_id)
            if task is None:
                continue
            known.append(task.task)
            if task.stage is Stage.ANSWERED:
                event = self._ready.pop(task.event)
                if isinstance(event, Replied):
                    event.update.release()
            else:
                self.counts.cancelled += 1
                self._spend(task, CANCELLED, task.spent(self._now))
                self._stop_device(task)
            self._forget(task)
        if known:
            self._outputs.decision(self._now, {"what": "cancel", "tasks": known})

    def profile(self, node_id: int) -> DeviceProfile:
        row = self._row(node_id)
        if row is None:
            raise KeyError(node_id)
        profile = self.fleet.profile(row, self._now)
        if (seen := self._observed.get(row)) is None:
            return profile
        seconds, down, up = seen
        return replace(profile, seconds_per_task=seconds, download_bytes_per_second=down, upload_bytes_per_second=up)

    def census(self, node_ids: Sequence[int]) -> Mapping[str, NDArray[Any]]:
        rows = np.asarray(node_ids, dtype=np.int64) - self._first
        if (unknown := (rows < 0) | (rows >= self.fleet.size)).any():
            raise KeyError(node_ids[int(unknown.argmax())])
        return self.fleet.census(rows, self._now)

    def record(self, decision: Mapping[str, Any]) -> None:
        if decision.keys() == _CHOICE:
            self._outputs.decision_text(self._now, self._told_choice(decision))
        else:
            self._outputs.decision(self._now, decision)

    def _told_choice(self, d: Mapping[str, Any]) -> str:
        """A choice of devices as JSON without braces: asynchronous strategies record one for every task."""
        steps, quote = str(d["steps"]).replace("None", "null"), self._quote
        return (
            f'"what": "select", "kind": {quote(d["kind"])}, "version": {d["version"]}, "round": {d["round"]}, '
            f'"tasks": {d["tasks"]}, "nodes": {d["nodes"]}, "steps": {steps}, "cause": {quote(d["cause"])}'
        )

    def save(self, state: Mapping[str, Any]) -> None:
        """A simulation is run again, not continued: nothing is kept."""

    def restore(self) -> dict[str, Any] | None:
        return None

    # ------------------------------------------------------------ sending

    def _row(self, node_id: int) -> int | None:
        row = node_id - self._first
        return row if 0 <= row < self.fleet.size else None

    def _content(self, records: RecordDict, *, same: bool = False) -> Content:
        """What stands for these records: a copy, as they may be changed once they are sent. Who sends the same object
        again gets the same one back, which executors have prepared already: with `same` nobody has changed it."""
        known = self._contents.get(id(records))
        if same and known is not None:
            return known[2]
        values = _values(records)
        if known is not None and known[1] == values:
            return known[2]
        copied: dict[str, Any] = {}
        for name, record in records.items():
            copied[name] = type(record)({key: _own(value) for key, value in record.items()})
        content = Content(RecordDict(copied))
        self._contents[id(records)] = records, values, content
        if len(self._contents) > 4:
            self._contents.popitem(last=False)
        return content

    def _task(
        self,
        content: Content,
        message_type: str,
        node_id: int,
        config_name: str,
        config: Mapping[str, Any],
        group_id: str,
        ttl: float,
    ) -> Task:
        """A task that is not yet begun; `config` is laid over the one that the content has by that name."""
        counts, now = self.counts, self._now
        counts.sent += 1
        number, row = counts.sent, node_id - self._first
        message_id = str(number)
        steps = 0.0
        if 0 <= row < self.fleet.size:
            told = content.configs.get(config_name, _NOTHING)
            if config:
                told = {**told, **config}
            known = self._executor.steps(row, message_type, told)
            steps = self._steps(told) if known is None else known
        task = self._tasks[message_id] = Task(
            number,
            row,
            node_id,
            message_type,
            content,
            config_name,
            config,
            group_id,
            EPOCH + now,
            ttl,
            0,
            None,
            message_id,
            now,
            steps,
            now + ttl,
        )
        return task

    def _steps(self, config: Mapping[str, Any]) -> float:
        told = config.get("local-steps")
        if isinstance(told, int | float) and math.isfinite(told) and told > 0:
            return float(told)
        return self._default_steps

    def _begin_all(self, tasks: Sequence[Task], *, recorded: bool) -> list[str]:
        """Sends tasks; the decision log is told of them, if it was not."""
        self._looks = 0
        if not recorded:
            for task in tasks:
                kind = self._quote(task.message_type)
                text = f'"what": "send", "task": {task.task}, "node": {task.node_id}, "type": {kind}'
                self._outputs.decision_text(self._now, text)
        self._begin(tasks)
        return [task.message_id for task in tasks]

    def _begin(self, tasks: Sequence[Task]) -> None:
        """Draws how tasks end; those whose device is at work wait for it."""
        ready, size = [], self.fleet.size
        for task in tasks:
            if not 0 <= task.device < size:
                self._answer(task, FAILED, 0.0, code=Code.NODE_UNAVAILABLE, reason="there is no such device")
            elif self._chains.take(task):
                ready.append(task)
            else:
                self._agenda.wait(task)
        if len(ready) >= _MANY:
            self._draw_many(ready)
        else:
            for task in ready:
                self._draw(task, len(ready))

    def _draw(self, task: Task, transfers: int) -> None:
        down, up = self._transfers(task)
        end = self.fleet.draw(task.device, task.task, self._now, task.steps, down, up, transfers)
        self._agenda.begin(task, self._now, end)
        self.counts.bytes_down += down

    def _transfers(self, task: Task) -> tuple[int, int]:
        """Bytes to the device, and back: from training a model as large as the one that was sent, or as few as its codec
        makes of that."""
        content = task.content
        down = content.nbytes + REPLY_BYTES
        if task.message_type != "train" and not task.message_type.startswith("train."):
            return down, REPLY_BYTES
        codec = task.config.get(CODEC, self._codec) if task.config else self._codec
        if codec is None:
            return down, content.model_bytes + REPLY_BYTES
        return down, _encoded_bytes(codec, content.model_bytes) + REPLY_BYTES

    def _draw_many(self, tasks: Sequence[Task]) -> None:
        rows = np.array([task.device for task in tasks])
        numbers = np.array([task.task for task in tasks])
        steps = np.array([task.steps for task in tasks])
        moved = np.array([self._transfers(task) for task in tasks], dtype=np.float64)
        ends = self.fleet.draw_many(rows, numbers, self._now, steps, moved[:, 0], moved[:, 1], len(tasks))
        for task, end in zip(tasks, ends.each(), strict=True):
            self._agenda.begin(task, self._now, end)
        self.counts.bytes_down += int(moved[:, 0].sum())

    # ------------------------------------------------------------ time

    def sleep(self, seconds: float) -> None:
        """Lets virtual time pass, with all that happens in it."""
        self._check_running()
        if self.turns is not None and self.turns.here:
            until = self._now + seconds
            self.turns.wait(lambda: self._now >= until, until)
        else:
            self._advance(self._now + seconds)

    def pass_until(self, until: float) -> None:
        """Lets time pass to the next thing that happens, or to `until`."""
        before = self.events
        while self.events == before and self._now < until:
            self._advance(min(self._next_event_at(), until))

    def _next_event_at(self) -> float:
        due = self._agenda.next_due
        change = math.inf if self._presence is None else self._presence.next_change
        return change if due is None else min(due, change)

    def _advance(self, until: float) -> None:
        """Lets everything happen that happens by a time."""
        self._check_running()
        while (at := self._next_event_at()) <= until:
            self._happen(at)
        if until < math.inf:
            self._move_to(until)

    def _happen(self, at: float) -> None:
        """Lets the next thing happen, which does at this time."""
        self._move_to(at)
        if self._presence is not None and self._presence.next_change <= at:
            self._change_presence(self._presence)
        else:
            self._end(self._agenda.pop())
        self.events += 1
        if not self.events % 64:
            self._check_running()
            with wall_time():
                self._progress(self)

    def _move_to(self, at: float) -> None:
        if at > self._until:
            self._now, self._stopped = self._until, True
            raise RunNotRunningException
        if at > self._now:
            self._now = at
            self._looks = 0

    def _check_running(self) -> None:
        if threading.get_ident() != self._thread and not (self.turns is not None and self.turns.here):
            raise RunError(
                "a simulated grid is for the thread that runs the ServerApp; let other threads leave it alone"
            )
        if self._stopped:
            raise RunNotRunningException

    # ------------------------------------------------------------ what happens

    def _change_presence(self, presence: Presence) -> None:
        row, there = presence.change()
        self._tell_presence(row, there, "its session ended")

    def _tell_presence(self, row: int, there: bool, reason: str) -> None:
        node_id = self._first + row
        self._listed = None
        self.trace.add(self._now, JOINED if there else LEFT, node_id, 0, 0.0, 0.0)
        if not self._heard:
            return
        self._sequence += 1
        event: Event
        if there:
            event = Joined(self._sequence, self._now, node_id, f"device-{row}")
        else:
            event = Left(self._sequence, self._now, node_id, reason)
        self._ready[self._sequence] = event

    def _end(self, task: Task) -> None:
        """A task is over: at its own end, or because its time to live is."""
        end, row = task.end, task.device
        if end is None or end.at > task.due:
            self._stop_device(task)
            reason = f"device-{row}: no reply within its time to live of {task.ttl:g} s"
            self._answer(task, EXPIRED, task.spent(self._now), reason=reason)
            return
        if end.outcome == "replied":
            self._reply(task, end)
        else:
            if end.outcome == "left" and self._presence is not None and self._presence.gone(row, self._now):
                self._tell_presence(
                    row, False, "its battery ran low" if end.reason == "battery" else "its session ended"
                )
            code, reason = _LOST[end.reason or end.outcome]
            self._answer(task, FAILED, end.compute_seconds, code=code, reason=f"device-{row}: {reason}")
        self._free(row)

    def _reply(self, task: Task, end: End) -> None:
        if task.answer is None:
            self._compute(task)
        answer = task.answer
        assert answer is not None
        row = task.device
        if answer.state is not None:
            self._states[row] = answer.state
        if answer.update is None:
            self._answer(task, FAILED, end.compute_seconds, code=answer.code, reason=answer.reason)
            return
        nbytes, down = answer.update.nbytes, task.content.nbytes
        self.counts.received += 1
        self.counts.bytes_up += nbytes
        self._observed[row] = (
            end.claimed_compute_seconds,
            down / max(end.download_seconds, 1e-9),
            nbytes / max(end.upload_seconds, 1e-9),
        )
        metrics = answer.metrics
        if self.sets_seconds and "compute-seconds" in metrics:
            metrics = {**metrics, "compute-seconds": end.claimed_compute_seconds}
        self._sequence += 1
        event = Replied(
            self._sequence,
            self._now,
            task.node_id,
            task.message_id,
            metrics,
            answer.update,
            end.claimed_compute_seconds,
        )
        self._spend(task, REPLIED, end.compute_seconds)
        text = f'"what": "replied", "task": {task.task}, "node": {task.node_id}'
        self._outputs.decision_text(self._now, text)
        self._put(task, event)
        if self.fleet.stateful and self._heard:
            self._sequence += 1
            self._ready[self._sequence] = Reported(self._sequence, self._now, task.node_id)

    def _answer(self, task: Task, kind: int, seconds: float, *, code: int = 0, reason: str) -> None:
        """A task that brings no update."""
        self._sequence += 1
        message_id, node_id = task.message_id, task.node_id
        event: Event
        if kind == EXPIRED:
            self.counts.expired += 1
            event = Expired(self._sequence, self._now, node_id, message_id, reason)
        else:
            self.counts.failed += 1
            self.counts.rejected += reason.startswith("rejected: ")
            event = Failed(self._sequence, self._now, node_id, message_id, int(code), reason)
        self._spend(task, kind, seconds)
        what = "expired" if kind == EXPIRED else "failed"
        self._outputs.decision(self._now, {"what": what, "task": task.task, "node": node_id, "reason": reason})
        self._put(task, event)

    def _put(self, task: Task, event: Event) -> None:
        task.stage, task.event = Stage.ANSWERED, self._sequence
        self._ready[self._sequence] = event

    def _spend(self, task: Task, kind: int, seconds: float) -> None:
        self.counts.device_seconds += seconds
        self.trace.add(self._now, kind, task.node_id, task.task, task.sent, seconds)

    def _forget(self, task: Task) -> None:
        task.stage, task.answer = Stage.OVER, None
        del self._tasks[task.message_id]

    def _stop_device(self, task: Task) -> None:
        """Its device need not go on with a task."""
        row = task.device
        if task.stage is Stage.GOING:
            task.stage = Stage.OVER
            self.fleet.stop(row, self._now)
            self._free(row)

    def _free(self, row: int) -> None:
        if (following := self._chains.free(row)) is not None:
            self._draw(following, 1)

    # ------------------------------------------------------------ results

    def _compute(self, needed: Task) -> None:
        """Computes a result together with those that are needed next."""
        tasks = self._agenda.to_compute(LOOKAHEAD * self._executor.cohort)
        assert tasks[0] is needed, "results are needed in the order in which tasks end"
        keeps_state, states = self._executor.keeps_state, self._states
        for task in tasks:
            task.seed = self._seeds.of(task.node_id, task.task)
            if keeps_state:
                task.state = states.get(task.device)
        with wall_time():
            answers = self._executor.run(tasks)
        self.counts.computed += len(tasks)
        for task, answer in zip(tasks, answers, strict=True):
            task.answer = answer


def _values(records: RecordDict) -> list[Any]:
    """What tells whether records are still the same; it compares fast where they are."""
    values: list[Any] = []
    for name, record in records.items():
        values += (name, record, *record.keys())
        values += [tuple(value) if isinstance(value, list) else value for value in record.values()]
    return values


def _own(value: Any) -> Any:
    """A value that can be changed, apart from the one that the app holds."""
    return copy.copy(value) if isinstance(value, list | Array) else value


def _encoded_bytes(codec: str, model_bytes: int) -> int:
    """Of what is no codec, or of one whose frames depend on the model's shapes, as many as of the model itself."""
    try:
        return typical_bytes(codec, max(1, model_bytes // 4))
    except ConfigError:
        return model_bytes


def _with_seconds(content: RecordDict, seconds: float) -> None:
    """Where a reply's app measured its own compute time: by the device's clock, not by this machine's."""
    for record in content.metric_records.values():
        if "compute-seconds" in record:
            record["compute-seconds"] = seconds
