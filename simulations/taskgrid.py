"""What the grids on virtual time share: tasks that are sent, the answers that they come back with, and their records.

`VirtualGrid` (grid.py) lets a simulated fleet decide how tasks end, `ReplayGrid` (replaygrid.py) a recording.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Protocol

import numpy as np
from flwr.app import DEFAULT_TTL, Message, RecordDict
from numpy.typing import NDArray

from fedpace.hosting.entries import CHOICE, REPLIED_ENTRY, SEND_ENTRY, choice_text, quoted
from fedpace.hosting.flower import Run, set_message_id
from fedpace.hosting.outputs import Outputs
from fedpace.hosting.virtualtime import EPOCH
from fedpace.protocol.paced import Event, Expired, Failed, Order, PacedGrid, Replied
from fedpace.simulations.contents import Contents
from fedpace.simulations.fleets import End
from fedpace.simulations.loop import Changes, EventLoop
from fedpace.simulations.messages import answer_message
from fedpace.simulations.results import Results
from fedpace.simulations.tasks import Counts, Stage, Task
from fedpace.simulations.trace import CANCELLED, EXPIRED, FAILED, REPLIED, Trace
from fedpace.simulations.work import Content, Executor

DEFAULT_STEPS = 10.0

_NOTHING: Mapping[str, Any] = {}


class Devices(Protocol):
    """Who they are: a device's row is its node id less the first one."""

    name: str
    size: int
    node_ids: NDArray[np.uint64]


class TaskGrid(EventLoop, PacedGrid):
    """A grid whose tasks and events are counted, in the decision log and in the trace. For one thread.

    `default_steps` are the local steps of a task of which neither the app nor its config says how many it takes.
    """

    checks_arrays = True
    sets_seconds: ClassVar[bool] = True
    """Whether a reply that tells its own compute time is made to tell the simulated one."""

    def __init__(
        self,
        run: Run,
        fleet: Devices,
        presence: Changes | None,
        executor: Executor,
        outputs: Outputs,
        *,
        seed: int,
        default_steps: float = DEFAULT_STEPS,
        until: float = math.inf,
    ) -> None:
        super().__init__(presence, until)
        self.fleet = fleet
        self.counts = Counts()
        self.trace = Trace()
        self._run = run
        self._executor = executor
        self._outputs = outputs
        self._default_steps = default_steps
        self._sequence = 0
        self._first = int(fleet.node_ids[0])
        self._tasks: dict[str, Task] = {}
        self._ready: OrderedDict[int, Event] = OrderedDict()
        self._contents = Contents()
        self._results = Results(executor, self._agenda, seed)

    # ------------------------------------------------------------ what grids differ in

    @abstractmethod
    def _begin(self, tasks: Sequence[Task]) -> None:
        """Tasks are sent: says how they end, and when."""

    @abstractmethod
    def _stop_device(self, task: Task) -> None:
        """Its device need not go on with a task."""

    # ------------------------------------------------------------ sending

    def set_run(self, run: Run) -> None:
        """The run is given by the simulation; this does nothing."""

    @property
    def run(self) -> Run:
        return replace(self._run)

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
            content, kind = self._contents.of(message.content), metadata.message_type
            task = self._task(content, kind, metadata.dst_node_id, "config", {}, metadata.group_id, metadata.ttl)
            set_message_id(message, task.message_id)
            metadata.created_at = task.created_at  # made a moment ago, by the wall's clock
            tasks.append(task)
        self._contents.clear()
        return self._begin_all(tasks, recorded=recorded)

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
        shared = self._contents.of(content, same=True)
        lives = DEFAULT_TTL if ttl is None else ttl
        tasks = [self._task(shared, message_type, o.node_id, config_name, o.config, group_id, lives) for o in orders]
        return self._begin_all(tasks, recorded=recorded)

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
        if not recorded:
            for task in tasks:
                text = SEND_ENTRY % (task.task, task.node_id, quoted(task.message_type))
                self._outputs.decision_text(self._now, text)
        self._begin(tasks)
        return [task.message_id for task in tasks]

    # ------------------------------------------------------------ decisions

    def record(self, decision: Mapping[str, Any]) -> None:
        if decision.keys() == CHOICE:
            self._outputs.decision_text(self._now, choice_text(decision))
        else:
            self._outputs.decision(self._now, decision)

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

    # ------------------------------------------------------------ answers

    def _pull(self, message_ids: Iterable[str]) -> list[Message]:
        found = []
        for message_id in message_ids:
            task = self._tasks.get(message_id)
            if task is not None and task.stage is Stage.ANSWERED:
                event = self._ready.pop(task.event)
                found.append(answer_message(self._run.run_id, task, event, self.sets_seconds))
                self._forget(task)
        return found

    def _reply(self, task: Task, end: End) -> int | None:
        """A device is through with a task. Returns the bytes of its update; None where it failed after all."""
        if task.answer is None:
            self.counts.computed += self._results.compute(task)
        answer = task.answer
        assert answer is not None
        if answer.state is not None:
            self._results.states[task.device] = answer.state
        if answer.update is None:
            self._answer(task, FAILED, end.compute_seconds, code=answer.code, reason=answer.reason)
            return None
        nbytes = answer.update.nbytes
        self.counts.received += 1
        self.counts.bytes_up += nbytes
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
        self._outputs.decision_text(self._now, REPLIED_ENTRY % (task.task, task.node_id))
        self._put(task, event)
        return nbytes

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
