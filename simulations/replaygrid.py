"""`ReplayGrid`: a recorded run on the virtual clock. Its devices take as long, answer and come and go as they did.

Two clocks were at work: the devices', on which things arrived, and the ServerApp's, which computed in between. Both are
replayed: an arrival happens at its recorded time, by the loop of virtual time; and whenever the ServerApp asks
its grid for something, it is the recorded time, and all has arrived that had. What the ServerApp sends, asks and gives
up is held against the recording: a run that does something else has diverged from it, and ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from flwr.app import Message
from numpy.typing import NDArray

from fedpace.errors import RunError
from fedpace.hosting.flower import Run, RunNotRunningException
from fedpace.hosting.outputs import Outputs
from fedpace.hosting.recording import Arrival, Look, Recording, model_digest
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.blobs import digest
from fedpace.protocol.paced import (
    DeviceProfile,
    Event,
    Expired,
    Failed,
    Joined,
    Left,
    Replied,
    Reported,
    Tick,
    census_of,
)
from fedpace.protocol.records import Buffers, encode
from fedpace.simulations.fleets import End
from fedpace.simulations.recorded import RecordedExecutor, RecordedFleet, RecordedPresence
from fedpace.simulations.taskgrid import TaskGrid
from fedpace.simulations.tasks import Task
from fedpace.simulations.trace import EXPIRED, FAILED, JOINED, LEFT
from fedpace.simulations.work import Content


class ReplayGrid(TaskGrid):
    """For one thread, that of the ServerApp.

    `failure` says why the replay could not go on; `other_models_from` is the first task that was sent other arrays than
    in the recording, though its device answers as it did; `halted`: the recorded run was told to stop, by now.
    """

    keeps_state = True
    sets_seconds = False
    _presence: RecordedPresence

    def __init__(self, run: Run, recording: Recording, outputs: Outputs) -> None:
        fleet, presence, executor = RecordedFleet(recording), RecordedPresence(recording), RecordedExecutor(recording)
        super().__init__(run, fleet, presence, executor, outputs, seed=recording.seed)
        self.failure: str | None = None
        self.other_models_from: int | None = None
        self._recording = recording
        self._answers = {row.task: row for row in recording.arrivals() if row.task}
        self._place = 0
        self._last = 0
        self.halted = False
        self._pushed: list[Any] = []
        self._there: set[int] = set()
        self._profiles: dict[int, DeviceProfile] = {}
        self._saved: dict[str, Any] | None = None

    # ------------------------------------------------------------ looks

    def _look(self, *kinds: str) -> Look:
        """Lets happen what had happened when the ServerApp asked for this, and makes it the time it was then."""
        try:
            return self._next_look(kinds)
        except RunError as error:
            self.failure = self.failure or str(error)
            raise

    def _next_look(self, kinds: Sequence[str]) -> Look:
        if self.failure is not None:
            raise RunError(self.failure)
        rows, last = self._recording.rows, None
        while self._place < len(rows) and isinstance(row := rows[self._place], Arrival):
            self._place += 1
            if row.what == "stop":
                self.halted = True
            else:
                last = row
        if last is not None:
            self._advance(last.due)
            if self._last != last.sequence:
                self._diverged(f"event {last.sequence} of the recording has no cause here")
        found = rows[self._place] if self._place < len(rows) else None
        if isinstance(found, Look) and found.what in kinds:
            self._place += 1
            self._now = found.at
            return found
        if self.halted:
            raise RunNotRunningException
        if found is None and not self._recording.complete:
            raise RunError(
                f"the recording {self._recording.directory} ends after decision {self._outputs.decisions}, before its "
                "run did: the server was killed, or could not write"
            )
        asked = " or ".join(_ASKED[kind] for kind in kinds)
        self._diverged(
            f"it {asked}, where the recorded one {_ASKED[found.what] if isinstance(found, Look) else 'ended'}"
        )

    def _diverged(self, how: str) -> NoReturn:
        self.failure = (
            f"the run has diverged from its recording after decision {self._outputs.decisions}: {how}; a replay takes "
            "the app as it was recorded, and an app that decides by what its grid tells it"
        )
        raise RunError(self.failure)

    def end(self) -> None:
        """The ServerApp has ended."""
        if self.failure is None:
            try:
                self._look("end")
            except (RunError, RunNotRunningException):
                """It is in `failure`, or nobody minds."""

    # ------------------------------------------------------------ Flower's Grid, and PacedGrid

    def get_node_ids(self) -> Iterable[int]:
        self._look("nodes")
        return sorted(self._there)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        self._pushed = self._look("push").found["tasks"]
        return super().push_messages(messages)

    def _send(self, *args: Any, **options: Any) -> list[str]:
        self._pushed = self._look("push").found["tasks"]
        return super()._send(*args, **options)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self._look("pull")
        return self._pull(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        order = list(self.push_messages(messages))
        if order:
            self._look("wait")
        return self._pull(order)

    def now(self) -> float:
        return self._look("now").at

    def next_event(self, until: float) -> Event:
        look = self._look("event", "tick")
        event = next(iter(self._ready.values()), None)
        if look.what == "tick" and event is None:
            return Tick(look.at)
        if event is None or isinstance(event, Tick) or event.sequence != look.found.get("sequence"):
            self._diverged(f"its next event is {event}, where the recorded one's was {look}")
        del self._ready[event.sequence]
        if isinstance(event, Replied | Failed | Expired):
            self._forget(self._tasks[event.message_id])
        return event

    def cancel(self, message_ids: Iterable[str]) -> None:
        message_ids = list(message_ids)
        known = [int(message_id) for message_id in message_ids if message_id in self._tasks]
        recorded = self._look("cancel").found["tasks"]
        if known != recorded:
            self._diverged(f"it gives up tasks {known}, where the recorded one gave up {recorded}")
        super().cancel(message_ids)

    def profile(self, node_id: int) -> DeviceProfile:
        self._look("profile")
        return self._profiles[node_id]

    def census(self, node_ids: Sequence[int]) -> Mapping[str, NDArray[Any]]:
        self._look("census")
        return census_of([self._profiles[node_id] for node_id in node_ids])

    def record(self, decision: Mapping[str, Any]) -> None:
        self._look("record")
        super().record(decision)

    def save(self, state: Mapping[str, Any]) -> None:
        self._saved = dict(state)

    def restore(self) -> dict[str, Any] | None:
        return self._saved

    def sleep(self, seconds: float) -> None:
        """The time that the ServerApp slept is in the recording; for its own clocks it passes now."""
        self._check_running()
        self._now += seconds

    # ------------------------------------------------------------ what is sent

    def _begin(self, tasks: Sequence[Task]) -> None:
        """The tasks end as they did. Those that were given up, or still out at the end, never do."""
        for place, task in enumerate(tasks):
            sent = [task.task, task.node_id, task.message_type]
            recorded = self._pushed[place] if place < len(self._pushed) else None
            if recorded is None or sent != recorded[:3]:
                self._diverged(f"it sends {_told(sent)}, where the recorded one sent {_told(recorded)}")
            if self.other_models_from is None and _model(task.content) != recorded[3]:
                self.other_models_from = task.task
            self.counts.bytes_down += task.content.nbytes
            task.due = math.inf
            if (answer := self._answers.get(task.task)) is not None:
                outcome, seconds = "replied" if answer.what == "replied" else "failed", answer.compute_seconds
                end = End(answer.due, outcome, seconds, 0.0, 0.0, seconds)
                self._agenda.begin(task, min(self._now, answer.due), end)
        if len(tasks) < len(self._pushed):
            self._diverged(f"it sends nothing, where the recorded one sent {_told(self._pushed[len(tasks)])}")

    def _stop_device(self, task: Task) -> None:
        """Recorded devices do as they did."""

    # ------------------------------------------------------------ what arrives

    def _show_progress(self) -> None:
        """Nobody watches a replay."""

    def _happens(self, arrival: Arrival) -> None:
        """An arrival's turn, by the virtual clock, has come."""
        if arrival.sequence <= self._last:
            self._diverged(f"event {arrival.sequence} of the recording comes after event {self._last}")
        self._last = arrival.sequence
        self._now, self._sequence = arrival.at, arrival.sequence - 1  # the next event gets the number it had
        if arrival.profile is not None:
            self._profiles[arrival.node_id] = arrival.profile

    def _end(self, task: Task) -> None:
        arrival = self._answers[task.task]
        self._happens(arrival)
        if arrival.what == "replied":
            assert task.end is not None, "it has begun"
            self._reply(task, task.end)
        else:
            kind = EXPIRED if arrival.what == "expired" else FAILED
            self._answer(task, kind, arrival.compute_seconds, code=arrival.code, reason=arrival.reason)

    def _change_presence(self) -> None:
        arrival = self._presence.take()
        self._happens(arrival)
        self._sequence += 1
        event: Event
        if arrival.what == "joined":
            self._there.add(arrival.node_id)
            self.trace.add(arrival.at, JOINED, arrival.node_id, 0, 0.0, 0.0)
            event = Joined(self._sequence, arrival.at, arrival.node_id, arrival.name)
        elif arrival.what == "left":
            self._there.discard(arrival.node_id)
            self.trace.add(arrival.at, LEFT, arrival.node_id, 0, 0.0, 0.0)
            event = Left(self._sequence, arrival.at, arrival.node_id, arrival.reason)
        elif arrival.quiet:
            return
        else:
            event = Reported(self._sequence, arrival.at, arrival.node_id)
        self._ready[self._sequence] = event


_ASKED = {
    "now": "asks for the time",
    "nodes": "asks for the devices",
    "push": "sends tasks",
    "pull": "looks for answers",
    "wait": "waits for answers",
    "event": "waits for an event",
    "tick": "waits for a time",
    "cancel": "gives tasks up",
    "profile": "asks for a profile",
    "census": "asks for all profiles",
    "record": "decides something",
    "end": "ends",
}
"""The kinds of looks."""


def _told(sent: Sequence[Any] | None) -> str:
    return "nothing more" if sent is None else f"task {sent[0]} ({sent[2]}) to node {sent[1]}"


def _model(content: Content) -> str:
    """The digest of the arrays that a message carries; computed once for all that carry the same."""
    if "model" not in content.kept:

        def put(buffers: Buffers) -> pb.Blob:
            return pb.Blob(name=digest(buffers), size=sum(map(len, buffers)))

        content.kept["model"] = model_digest(encode(content.records, put))
    found: str = content.kept["model"]
    return found
