"""`FleetGrid`: the grid a ServerApp talks to, in the ServerApp's own process, over a socket to the coordinator.

A thread receives events and wakes whoever waits for them: nothing polls. What goes out is serialised once a version,
however many devices it goes to; what comes in becomes Flower messages only for those who ask for messages.
"""

from __future__ import annotations

import functools
import json
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Error, Message, Metadata
from numpy.typing import NDArray

from fedpace.errors import PayloadError
from fedpace.hosting.files import write_atomically
from fedpace.hosting.flower import (
    ErrorCode,
    Run,
    RunNotRunningException,
    make_reply,
    request_metadata,
    set_message_id,
)
from fedpace.hosting.outputs import Outputs
from fedpace.hosting.recording import Recorder, model_digest
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.blobs import BlobStore
from fedpace.protocol.decoding import SentRecords, decode_steps, sent_records
from fedpace.protocol.frames import FrameSocket
from fedpace.protocol.paced import DeviceProfile, Event, PacedGrid, Tick, census_of
from fedpace.protocol.payloads import all_blobs
from fedpace.protocol.records import encode
from fedpace.server.events import (
    after_beat,
    after_reply,
    arrival_row,
    event_of,
    log_entry,
    profile_of,
    task_of,
)
from fedpace.server.outgoing import SentBlobs
from fedpace.server.updates import StoredUpdate


@dataclass
class _Sent:
    """A message that is out, or whose answer waits to be taken."""

    metadata: Metadata
    blobs: tuple[bytes, ...]
    records: SentRecords
    answer: pb.FleetMessage | None = None


class FleetGrid(PacedGrid):
    """Devices connected by gRPC, on the monotonic clock. Safe to use from any thread.

    What arrives, and every answer to the ServerApp (`_look`), goes to `recorder` where there is one.
    """

    checks_arrays = True

    def __init__(
        self, connection: FrameSocket, directory: Path, outputs: Outputs, run: Run, recorder: Recorder | None = None
    ) -> None:
        self._connection = connection
        self._recorder = recorder
        self._directory = directory
        self._outputs = outputs
        self._run = run
        self._blobs = SentBlobs(BlobStore(directory / "blobs"))
        self._changed = threading.Condition()
        self._nodes: dict[int, pb.Node] = {}
        self._profiles: dict[int, DeviceProfile] = {}
        self._reported: set[int] = set()
        self._sent: dict[str, _Sent] = {}
        self._events: deque[pb.FleetMessage] = deque()
        self._counter = 0
        self._started = time.monotonic()
        self._stopped: str | None = None
        self._ended = False
        self._start = threading.Event()
        threading.Thread(target=self._receive, name="grid", daemon=True).start()

    # ------------------------------------------------------------ events from the coordinator

    def wait_for_start(self) -> None:
        """Waits until the coordinator has as many devices as it was told to wait for, or stops."""
        self._start.wait()
        self._check_running()

    def _receive(self) -> None:
        while (message := self._connection.receive(pb.FleetMessage)) is not None:
            with self._changed:
                self._take(message)
                self._changed.notify_all()
        with self._changed:
            self._stopped = self._stopped or "the coordinator is gone"
            self._changed.notify_all()
        self._start.set()

    def end(self) -> None:
        """The ServerApp has ended: what arrives from now on concerns nobody."""
        with self._changed:
            self._look("end")
            self._ended = True

    def _take(self, message: pb.FleetMessage) -> None:
        kind = message.WhichOneof("kind")
        if self._ended:
            return
        if kind == "start":
            self._started = time.monotonic() - message.at
            self._start.set()
        elif kind == "stop":
            self._stopped = message.stop.reason
            self._start.set()
            self._record_arrival(message)
        elif kind == "joined":
            self._nodes[message.joined.node_id] = message.joined
            self._profiles[message.joined.node_id] = profile_of(
                message.joined, self._profiles.get(message.joined.node_id)
            )
            self._events.append(message)
            self._record_arrival(message, message.joined.node_id)
        elif kind == "left":
            self._nodes.pop(message.left.node_id, None)
            self._events.append(message)
            self._record_arrival(message)
        elif kind == "beat":
            node_id = message.beat.node_id
            self._profiles[node_id] = after_beat(self._profiles[node_id], message.beat.heartbeat)
            self._record_arrival(message, node_id, quiet=node_id in self._reported)
            if node_id not in self._reported:  # one event is enough to look
                self._reported.add(node_id)
                self._events.append(message)
        elif kind in ("replied", "failed"):
            sent = self._sent.get(str(task_of(message)))
            if sent is None:  # cancelled meanwhile
                self._update(message).release()
                return
            sent.answer = message
            if kind == "replied":
                node_id = message.replied.node_id
                self._profiles[node_id] = after_reply(self._profiles[node_id], message.replied)
                self._record_arrival(message, node_id)
            else:
                self._record_arrival(message)
            self._outputs.decision(message.at, log_entry(message))
            self._events.append(message)

    def _record_arrival(self, message: pb.FleetMessage, node_id: int | None = None, *, quiet: bool = False) -> None:
        """Records what arrived; with a node, what is known of it now."""
        if self._recorder is not None:
            row = arrival_row(message) | ({"quiet": True} if quiet else {})
            payload = message.replied.payload if message.HasField("replied") else None
            profile = None if node_id is None else self._profiles[node_id]
            self._recorder.arrival(row, profile, payload, self._update(message).read)

    def _look(self, what: str, at: float | None = None, **found: Any) -> float:
        """The time that the ServerApp is told. Whatever the grid returns passes here, while nothing can arrive."""
        at = self._seconds() if at is None else at
        if self._recorder is not None:
            self._recorder.look(what, at, **found)
        return at

    # ------------------------------------------------------------ Flower's Grid

    def set_run(self, run: Run) -> None:
        """The run is given by the server; this does nothing."""

    @property
    def run(self) -> Run:
        return replace(self._run)

    def get_node_ids(self) -> Iterable[int]:
        with self._changed:
            self._check_running()
            self._look("nodes")
            return sorted(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Sends messages. Raises PayloadError for content that is not Flower's."""
        return self._push(list(messages), recorded=False)

    def push_recorded(self, messages: Sequence[Message]) -> list[str]:
        return self._push(messages, recorded=True)

    def _push(self, messages: Sequence[Message], *, recorded: bool) -> list[str]:
        push, ids = pb.Push(), []
        with self._changed:
            self._check_running()
            at = self._seconds()
            for message in messages:
                ids.append(self._add(push, message, {} if recorded else sent_records(message.content)))
                if not recorded:
                    task = push.task[-1]
                    entry = {"what": "send", "task": task.task_id, "node": task.node_id, "type": task.message_type}
                    self._outputs.decision(at, entry)
            self._look("push", at, tasks=[_identity(task) for task in push.task])
            if not push.task:
                return []
            try:
                self._connection.send(pb.AppMessage(push=push))
            except OSError:
                raise RunNotRunningException from None
        return ids

    def _add(self, push: pb.Push, message: Message, records: SentRecords) -> str:
        metadata = message.metadata
        payload = encode(message.content, self._blobs.put)
        self._counter += 1
        message_id = str(self._counter)
        set_message_id(message, message_id)
        push.task.add(
            task_id=self._counter,
            node_id=metadata.dst_node_id,
            message_type=metadata.message_type,
            group_id=metadata.group_id,
            created_at=metadata.created_at,
            ttl=metadata.ttl,
            payload=payload,
        )
        blobs = tuple(blob.name for blob in all_blobs(payload))
        self._blobs.take(blobs)
        self._sent[message_id] = _Sent(
            request_metadata(self._run.run_id, message_id, metadata.dst_node_id, metadata), blobs, records
        )
        return message_id

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        with self._changed:
            self._check_running()
            self._look("pull")
            taken = self._pull(list(message_ids))
        return [self._message(sent) for sent in taken]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Sends, and waits for all answers or until `timeout` seconds are over.

        Messages are built while others are still awaited, and returned in the order sent: whoever adds them up gets
        the same bits whichever device was first.
        """
        order = list(self.push_messages(messages))
        until = None if timeout is None else time.monotonic() + timeout
        waiting, replies = set(order), dict[str, Message]()
        while waiting and (answered := self._wait_for_any(waiting, until)):
            for sent in self._pull(answered):
                replies[sent.metadata.message_id] = self._message(sent)
            waiting.difference_update(answered)
        return [replies[message_id] for message_id in order if message_id in replies]

    def _wait_for_any(self, message_ids: set[str], until: float | None) -> list[str]:
        """Those of some messages that are answered, or gone; none once the time is over."""
        with self._changed:
            while not (found := [message_id for message_id in message_ids if self._answered(message_id)]):
                self._check_running()
                left = None if until is None else until - time.monotonic()
                if left is not None and left <= 0:
                    break
                self._changed.wait(left)
            if len(found) in (0, len(message_ids)):  # it was the last wait
                self._look("wait")
            return found

    def _answered(self, message_id: str) -> bool:
        sent = self._sent.get(message_id)
        return sent is None or sent.answer is not None

    def _pull(self, message_ids: list[str]) -> list[_Sent]:
        """Takes the answers that are there."""
        taken = []
        with self._changed:
            for message_id in message_ids:
                sent = self._sent.get(message_id)
                if sent is not None and sent.answer is not None:
                    self._forget(message_id)
                    taken.append(sent)
            if taken:
                answers = {id(sent.answer) for sent in taken}
                self._events = deque(event for event in self._events if id(event) not in answers)
        return taken

    def _forget(self, message_id: str) -> None:
        self._blobs.give_back(self._sent.pop(message_id).blobs)

    def _message(self, sent: _Sent) -> Message:
        answer = sent.answer
        assert answer is not None
        reply_id = f"{sent.metadata.message_id}-reply"
        make = functools.partial(make_reply, sent.metadata, reply_id, time.time())
        if answer.HasField("failed"):
            return make(None, Error(answer.failed.code, answer.failed.reason))
        update = self._update(answer)
        try:
            content = update.content()
            decode_steps(content, sent.records)
            return make(content, None)
        except (PayloadError, TypeError, ValueError) as error:
            return make(None, Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, f"the reply cannot be used: {error}"))
        finally:
            update.release()

    def _update(self, message: pb.FleetMessage) -> StoredUpdate:
        replied = message.replied
        return StoredUpdate(self._directory / "updates" / str(replied.task_id), replied.payload)

    def _check_running(self) -> None:
        if self._stopped is not None:
            raise RunNotRunningException

    # ------------------------------------------------------------ PacedGrid

    def _seconds(self) -> float:
        return time.monotonic() - self._started

    def now(self) -> float:
        with self._changed:
            return self._look("now")

    def next_event(self, until: float) -> Event:
        with self._changed:
            while not self._events:
                self._check_running()
                left = until - self._seconds()
                if left <= 0:
                    return Tick(self._look("tick"))
                self._changed.wait(left)
            message = self._events.popleft()
            self._look("event", sequence=message.sequence)
            return self._event(message)

    def _event(self, message: pb.FleetMessage) -> Event:
        if message.HasField("beat"):
            self._reported.discard(message.beat.node_id)
        if message.HasField("replied") or message.HasField("failed"):
            self._forget(str(task_of(message)))
        return event_of(message, self._update(message))

    def cancel(self, message_ids: Iterable[str]) -> None:
        known = []
        with self._changed:
            for message_id in message_ids:
                if message_id in self._sent:
                    answer = self._sent[message_id].answer
                    self._forget(message_id)
                    known.append(int(message_id))
                    if answer is not None:
                        self._events.remove(answer)
                        self._update(answer).release()
            at = self._look("cancel", tasks=known)
            if known:
                self._connection.send(pb.AppMessage(cancel=pb.CancelTasks(task_ids=known)))
                self._outputs.decision(at, {"what": "cancel", "tasks": known})

    def profile(self, node_id: int) -> DeviceProfile:
        with self._changed:
            self._look("profile")
            return self._profiles[node_id]

    def census(self, node_ids: Sequence[int]) -> Mapping[str, NDArray[np.float64]]:
        with self._changed:
            self._look("census")
            return census_of([self._profiles[node_id] for node_id in node_ids])

    def record(self, decision: Mapping[str, Any]) -> None:
        with self._changed:
            self._outputs.decision(self._look("record"), decision)

    def save(self, state: Mapping[str, Any]) -> None:
        """Writes the state as JSON, atomically."""
        write_atomically(self._directory / "strategy.json", json.dumps(state).encode())

    def restore(self) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads((self._directory / "strategy.json").read_bytes())
        except FileNotFoundError:
            return None
        return found


def _identity(task: pb.Task) -> list[Any]:
    """What tells a task that was sent from others."""
    return [task.task_id, task.node_id, task.message_type, model_digest(task.payload)]
