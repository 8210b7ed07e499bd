"""`VirtualGrid`: a simulated fleet behind Flower's `Grid` and fedpace's `PacedGrid`, in virtual time.

When a task is sent, only its end is drawn; its result is computed when somebody is about to see it (results.py). What
happens, happens by the loop of virtual time (loop.py); tasks and their answers are those of any grid on it (taskgrid.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray

from fedpace.errors import RunError
from fedpace.hosting.flower import ErrorCode, Run
from fedpace.hosting.outputs import Outputs
from fedpace.protocol.failures import Code
from fedpace.protocol.paced import DeviceProfile, Event, Expired, Failed, Joined, Left, Replied, Reported, Tick
from fedpace.simulations.fleets import SimulatedFleet
from fedpace.simulations.presence import Presence
from fedpace.simulations.taskgrid import DEFAULT_STEPS, TaskGrid
from fedpace.simulations.tasks import Chains, Stage, Task
from fedpace.simulations.trace import EXPIRED, FAILED, JOINED, LEFT
from fedpace.simulations.transfers import transfer_bytes
from fedpace.simulations.work import Executor

_LOOKS = 16
"""So often somebody may look who is there at one instant; strategies do a few times a round."""

_MANY = 8
"""From so many on, ends are drawn in numpy."""

_SEEN = 3
"""Numbers that are seen of a device with its last update: seconds of compute, bytes a second down and up; 0 before."""

_ENDS = (Replied, Failed, Expired)

_LOST = {
    "dropped": (ErrorCode.CLIENT_APP_CRASHED, "the task was lost on the device"),
    "error": (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "the task failed on the device"),
    "memory": (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "the device has too little memory for the task"),
    "session": (Code.NODE_UNAVAILABLE, "the device went away with the task"),
    "battery": (Code.NODE_UNAVAILABLE, "the device's battery ran low"),
    "absent": (Code.NODE_UNAVAILABLE, "the device is not there"),
}


class VirtualGrid(TaskGrid):
    """For one thread. With `turns` set, the threads that take turns may use it too."""

    keeps_state = False
    fleet: SimulatedFleet
    _presence: Presence | None

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
        """`default_steps` are the local steps of a task of which neither the app nor its config says how many it takes.
        The run is told to stop at `until`, in virtual seconds. `progress` is called now and then, with the grid."""
        presence = None if fleet.always_present else Presence(fleet)
        super().__init__(run, fleet, presence, executor, outputs, seed=seed, default_steps=default_steps, until=until)
        self._progress = progress
        self._codec: str | None = getattr(executor, "codec", None)
        self._chains = Chains()
        self._listed: list[int] | None = None
        self._looks = 0
        self._looked_at = 0.0
        self._heard = False  # whether anybody takes events; if not, comings and goings are not kept for them
        self._observed: memoryview[Any] = np.zeros(_SEEN * fleet.size).data

    def _show_progress(self) -> None:
        self._progress(self)

    # ------------------------------------------------------------ what the app asks for

    def get_node_ids(self) -> Iterable[int]:
        """Who is there. A loop that only looks makes time pass."""
        self._check_running()
        if self._looked_at != self._now:
            self._looked_at, self._looks = self._now, 0
        self._looks += 1
        if self._looks > _LOOKS:
            self.sleep(1.0)
        if self._listed is None:
            there = self.fleet.node_ids if self._presence is None else self.fleet.node_ids[self._presence.there]
            self._listed = there.tolist()
        return list(self._listed)

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

    def profile(self, node_id: int) -> DeviceProfile:
        row = node_id - self._first
        if not 0 <= row < self.fleet.size:
            raise KeyError(node_id)
        profile = self.fleet.profile(row, self._now)
        seconds, down, up = self._observed[_SEEN * row : _SEEN * (row + 1)]
        if not down:
            return profile
        return replace(profile, seconds_per_task=seconds, download_bytes_per_second=down, upload_bytes_per_second=up)

    def census(self, node_ids: Sequence[int]) -> Mapping[str, NDArray[Any]]:
        rows = np.asarray(node_ids, dtype=np.int64) - self._first
        if (unknown := (rows < 0) | (rows >= self.fleet.size)).any():
            raise KeyError(node_ids[int(unknown.argmax())])
        return self.fleet.census(rows, self._now)

    def save(self, state: Mapping[str, Any]) -> None:
        """A simulation is run again, not continued: nothing is kept."""

    def restore(self) -> dict[str, Any] | None:
        return None

    def device_seconds(self) -> float:
        """Seconds of compute that devices have really spent until now, those on tasks that they are at included."""
        going = (task for task in self._tasks.values() if task.stage is Stage.GOING)
        return self.counts.device_seconds + sum(task.spent(self._now) for task in going)

    # ------------------------------------------------------------ how tasks end

    def _begin(self, tasks: Sequence[Task]) -> None:
        """Draws how tasks end; those whose device is at work wait for it."""
        self._looks = 0
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
        down, up = transfer_bytes(task, self._codec)
        end = self.fleet.draw(task.device, task.task, self._now, task.steps, down, up, transfers)
        self._agenda.begin(task, self._now, end)
        self.counts.bytes_down += down

    def _draw_many(self, tasks: Sequence[Task]) -> None:
        rows = np.array([task.device for task in tasks])
        numbers = np.array([task.task for task in tasks])
        steps = np.array([task.steps for task in tasks])
        moved = np.array([transfer_bytes(task, self._codec) for task in tasks], dtype=np.float64)
        ends = self.fleet.draw_many(rows, numbers, self._now, steps, moved[:, 0], moved[:, 1], len(tasks))
        for task, end in zip(tasks, ends.each(), strict=True):
            self._agenda.begin(task, self._now, end)
        self.counts.bytes_down += int(moved[:, 0].sum())

    def _end(self, task: Task) -> None:
        end, row = task.end, task.device
        if end is None or end.at > task.due:
            self._stop_device(task)
            reason = f"device-{row}: no reply within its time to live of {task.ttl:g} s"
            self._answer(task, EXPIRED, task.spent(self._now), reason=reason)
            return
        if end.outcome == "replied":
            nbytes = self._reply(task, end)
            if nbytes is not None:
                observed, place = self._observed, _SEEN * row
                observed[place] = end.claimed_compute_seconds
                observed[place + 1] = task.content.nbytes / max(end.download_seconds, 1e-9)
                observed[place + 2] = nbytes / max(end.upload_seconds, 1e-9)
                if self.fleet.stateful and self._heard:
                    self._sequence += 1
                    self._ready[self._sequence] = Reported(self._sequence, self._now, task.node_id)
        else:
            if end.outcome == "left" and self._presence is not None and self._presence.gone(row, self._now):
                self._tell_presence(
                    row, False, "its battery ran low" if end.reason == "battery" else "its session ended"
                )
            code, reason = _LOST[end.reason or end.outcome]
            self._answer(task, FAILED, end.compute_seconds, code=code, reason=f"device-{row}: {reason}")
        self._free(row)

    def _stop_device(self, task: Task) -> None:
        row = task.device
        if task.stage is Stage.GOING:
            task.stage = Stage.OVER
            self.fleet.stop(row, self._now)
            self._free(row)

    def _free(self, row: int) -> None:
        if (following := self._chains.free(row)) is not None:
            self._draw(following, 1)

    # ------------------------------------------------------------ who comes and goes

    def _change_presence(self) -> None:
        assert self._presence is not None, "somebody comes or goes"
        row, there = self._presence.change()
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
