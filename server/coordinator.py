"""The coordinator: joins devices, board and ServerApp. It decides nothing about training and runs no user code.

It is driven by calls from the service (what devices say), from the run's link (what the ServerApp asks for) and from one
timer (what falls due). Everything happens on one event loop; only checks of large replies leave it for a thread.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fedpace.errors import PayloadError, RefusedError
from fedpace.hosting.app import AppFolder
from fedpace.hosting.settings import ServerSettings
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.blobs import BlobStore
from fedpace.protocol.failures import Code
from fedpace.protocol.limits import PROTOCOL_VERSION
from fedpace.protocol.spares import SpareFiles
from fedpace.server.board import OPEN, BoardTask, Ended, State, TaskBoard
from fedpace.server.inspection import Inspection
from fedpace.server.offers import Offers
from fedpace.server.registry import Device, Registry
from fedpace.server.session import Session, one_line

log = logging.getLogger("fedpace.server")

CHECK_IN_THREAD_BYTES = 1 << 20
_SPARE_FILES = 16
_REASON_CHARACTERS, _STAGE_CHARACTERS = 4096, 20


@dataclass
class Counts:
    """What became of the updates (replies to train messages) of a run, and the bytes moved."""

    received: int = 0
    rejected: int = 0
    duplicate: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    lost: list[str] = field(default_factory=list)


class Coordinator:
    """One run's fleet. `tell_app` sends an event to the ServerApp; `directory` holds the blobs of both directions."""

    def __init__(self, app: AppFolder, run: pb.Run, settings: ServerSettings, directory: Path) -> None:
        self.app = app
        self.run = run
        self.settings = settings
        self.registry = Registry()
        self.board = TaskBoard(attempts=settings.attempts)
        self.counts = Counts()
        self.blobs = BlobStore(directory / "blobs")
        self.updates = directory / "updates"
        self.updates.mkdir(parents=True, exist_ok=True)
        self.spares = SpareFiles(directory / "spares", _SPARE_FILES)
        self.started = time.monotonic()
        self.tell_app: Callable[[pb.FleetMessage], None] = lambda message: None
        self.draining = False
        self.fleet_changed = asyncio.Event()
        self._sessions: dict[int, Session] = {}
        self._offers = Offers(run.run_id, self.blobs)
        self._sequence = 0
        self._versions: dict[bytes, int] = {}
        self._inspection = Inspection(settings, self.blobs, self.updates)
        self._checks: dict[int, asyncio.Task[None]] = {}

    # ------------------------------------------------------------ what devices say

    def join(self, name: str, node_id: int, hello: pb.Hello, session: Session) -> pb.Welcome:
        """A device said hello. Raises RefusedError where it may not take part."""
        self._admit(name, hello)
        if (old := self._sessions.get(node_id)) is not None:
            self._replace(old, hello)
        device = self.registry.join(node_id, name, hello, self.seconds)
        session.bind(device)
        self._sessions[node_id] = session
        in_hand = set(hello.tasks) if hello.run_id == self.run.run_id else set()
        forget, ended = self.board.reclaim(node_id, in_hand)
        for entry in ended:
            self._task_failed(entry)
        for task_id in in_hand.difference(forget):
            if (task := self.board.get(task_id)) is not None:
                self._set_deadline(device, task)
        log.info("%s joined%s", name, f" with {len(in_hand) - len(forget)} tasks in hand" if in_hand else "")
        joined = pb.Node(node_id=node_id, name=name, slots=device.slots, profile=device.profile)
        self._tell(pb.FleetMessage(joined=joined))
        self.fleet_changed.set()
        return pb.Welcome(
            node_id=node_id,
            run=self.run,
            heartbeat_seconds=self.settings.heartbeat_seconds,
            max_reply_bytes=self.settings.max_reply_bytes,
            forget=forget if hello.run_id == self.run.run_id else list(hello.tasks),
        )

    def _admit(self, name: str, hello: pb.Hello) -> None:
        if hello.protocol != PROTOCOL_VERSION:
            raise RefusedError(
                f"{name} speaks protocol {hello.protocol}, this server {PROTOCOL_VERSION}; install the same fedpace"
            )
        if hello.name and hello.name != name:
            raise RefusedError(f"{hello.name[:100]!r} is not the name in the certificate, which is {name!r}")
        theirs, ours = hello.app, self.app
        if (theirs.name, theirs.version, theirs.sha256) != (ours.name, ours.version, ours.sha256):
            raise RefusedError(
                f"{name} has the app {theirs.name} {theirs.version} ({theirs.sha256[:12]}), this server runs {ours}; "
                f"install the same app on both"
            )
        if self.draining:
            raise RefusedError("the server is stopping; come back later")

    def _replace(self, old: Session, hello: pb.Hello) -> None:
        same = old.instance == hello.instance
        if not same:
            log.warning("%s connected from elsewhere too; the newer connection replaces the older", old.name)
        old.refuse("another connection with this device's identity has replaced this one", final=not same)
        self._gone(old, "replaced by a newer connection")

    def handle(self, session: Session, message: pb.DeviceMessage) -> None:
        """One message of a device's control stream."""
        session.device.seen = self.seconds
        kind = message.WhichOneof("kind")
        if kind == "result":
            self._result(session, message.result)
        elif kind == "heartbeat":
            self._beat(session, message.heartbeat)
        elif kind == "accept":
            self.progress(session.node_id, message.accept.task_id)
        elif kind == "progress":
            self._take_progress(session, message.progress)
        elif kind == "log":
            self._log(session, message.log)
        elif kind == "goodbye":
            session.left = one_line(message.goodbye.reason) or "it said goodbye"

    def _beat(self, session: Session, heartbeat: pb.Heartbeat) -> None:
        if self.registry.heartbeat(session.device, heartbeat):
            self._tell(pb.FleetMessage(beat=pb.Beat(node_id=session.node_id, heartbeat=heartbeat)))

    def leave(self, session: Session, reason: str) -> None:
        """A device's stream ended. With a goodbye its tasks end at once, else they wait for its return a while."""
        if self._sessions.get(session.node_id) is not session:
            return
        self._gone(session, session.left or reason)
        grace = 0.0 if session.left else self.settings.reconnect_grace_seconds
        self.board.orphan(session.node_id, self.seconds + grace)
        if not grace:
            self.tick()

    def _gone(self, session: Session, reason: str) -> None:
        del self._sessions[session.node_id]
        session.device.connected = False
        log.info("%s left: %s", session.name, reason)
        self._tell(pb.FleetMessage(left=pb.Gone(node_id=session.node_id, reason=reason)))

    def progress(self, node_id: int, task_id: int) -> None:
        """A task was accepted, or bytes of it are moving: its deadline counts from now."""
        task, device = self.board.get(task_id), self.registry.get(node_id)
        if task is not None and device is not None and task.node_id == node_id:
            self._set_deadline(device, task)

    def _take_progress(self, session: Session, progress: pb.Progress) -> None:
        """Keeps, for operators, how far a task is that the device has."""
        if progress.task_id in self.board.held(session.node_id):
            progress.stage = progress.stage[:_STAGE_CHARACTERS] if progress.stage.isalpha() else "?"
            session.device.tasks[progress.task_id] = progress

    def _log(self, session: Session, entry: pb.Log) -> None:
        lines = list(entry.lines[: session.allow_lines(len(entry.lines), self.seconds, self.settings)])
        for line in lines:
            log.info("%s | %s", session.name, one_line(line))
        if missing := entry.dropped + len(entry.lines) - len(lines):
            log.info("%s | (%d more lines left out)", session.name, missing)

    # ------------------------------------------------------------ results

    def _result(self, session: Session, result: pb.Result) -> None:
        task = self.board.get(result.task_id)
        if task is None or task.id not in self.board.held(session.node_id) or task.id in self._checks:
            self._unwanted(session, result.task_id)
            return
        if result.WhichOneof("kind") == "failure":
            self._failed_on_device(session, task, result)
            return
        try:
            size, along = self._inspection.admit(result)
        except PayloadError as error:
            self._reject(session, task, error)
            return
        self.counts.bytes_up += along
        if size <= CHECK_IN_THREAD_BYTES:
            self._finish_reply(session, task, result, self._inspection.check(task, result.payload))
        else:
            self._checks[task.id] = asyncio.create_task(self._check_large(session, task, result))

    async def _check_large(self, session: Session, task: BoardTask, result: pb.Result) -> None:
        error = await asyncio.to_thread(self._inspection.check, task, result.payload)
        del self._checks[task.id]
        self._finish_reply(session, task, result, error)

    def _finish_reply(self, session: Session, task: BoardTask, result: pb.Result, error: PayloadError | None) -> None:
        if error is not None:
            self._reject(session, task, error)
            return
        if self.board.end(task.id, State.REPLIED) is None:  # it expired while it was checked
            self._unwanted(session, task.id)
            return
        kind = task.task.message_type.partition(".")[0]
        device = session.device
        device.observe(kind, result)
        if kind == "train":
            self.counts.received += 1
            device.staleness = len(self._versions) - self._version_of(task.task)
        self._receipt(session, task.id, pb.ACCEPTED)
        replied = pb.Replied(
            task_id=task.id,
            node_id=task.node_id,
            payload=result.payload,
            compute_seconds=result.compute_seconds,
            download_bytes_per_second=result.download_bytes_per_second,
            upload_bytes_per_second=result.upload_bytes_per_second,
        )
        self._tell(pb.FleetMessage(replied=replied))
        self.offer(device)

    def _failed_on_device(self, session: Session, task: BoardTask, result: pb.Result) -> None:
        failure = result.failure
        self.board.end(task.id, State.FAILED)
        self._remove_bytes(task)
        session.device.tasks_failed += 1
        log.warning("%s failed task %d: %s", session.name, task.id, one_line(failure.reason))
        self._receipt(session, task.id, pb.ACCEPTED)
        self._tell_failed(task, failure.code, failure.reason[:_REASON_CHARACTERS])
        self.offer(session.device)

    def _reject(self, session: Session, task: BoardTask, error: PayloadError) -> None:
        if self.board.end(task.id, State.REJECTED) is None:
            return
        self._remove_bytes(task)
        self.counts.rejected += 1
        session.device.tasks_failed += 1
        log.warning("%s: the reply to task %d is rejected: %s", session.name, task.id, one_line(str(error)))
        self._receipt(session, task.id, pb.REJECTED, str(error))
        self._tell_failed(task, Code.REPLY_MESSAGE_UNAVAILABLE, f"reply rejected: {error}")
        self.offer(session.device)

    def _unwanted(self, session: Session, task_id: int) -> None:
        state = self.board.state(task_id)
        if task_id in self._checks or state in (State.REPLIED, State.REJECTED):
            verdict, reason = pb.DUPLICATE, f"task {task_id} was answered before"
            self.counts.duplicate += 1
        elif state is None or state in OPEN:
            verdict, reason = pb.UNKNOWN, f"there is no task {task_id} for {session.name}"
        else:
            verdict, reason = pb.EXPIRED, f"task {task_id} is over: {state}"
        if session.allow_lines(1, self.seconds, self.settings):
            log.info("%s: a reply to task %d is dropped: %s", session.name, task_id, reason)
        self._receipt(session, task_id, verdict, reason)

    def _receipt(self, session: Session, task_id: int, verdict: pb.Verdict.ValueType, reason: str = "") -> None:
        session.send(pb.ServerMessage(receipt=pb.Receipt(task_id=task_id, verdict=verdict, reason=reason)))

    # ------------------------------------------------------------ what the ServerApp asks for

    def push(self, tasks: Iterable[pb.Task]) -> None:
        """Puts tasks on the board and offers them. A task for a device that is not there fails at once."""
        nodes: dict[int, Device] = {}
        for task in tasks:
            if task.message_type.startswith("train"):
                self._version_of(task)
            entry = self.board.add(task, self.seconds + task.ttl)
            device = self.registry.get(task.node_id)
            if device is None or not device.connected:
                self.board.end(entry.id, State.FAILED)
                self._task_failed(Ended(entry, "there is no such device" if device is None else "its device is gone"))
            else:
                nodes[device.node_id] = device
        for device in nodes.values():
            self.offer(device)

    def cancel(self, task_ids: Iterable[int], reason: str = "cancelled") -> None:
        for task_id in task_ids:
            if (task := self.board.end(task_id, State.CANCELLED)) is not None:
                self._call_off(task, reason)
                self._remove_bytes(task)

    def offer(self, device: Device) -> None:
        """Offers a device its next tasks while it has free slots."""
        session = self._sessions.get(device.node_id)
        while session is not None and not self.draining:
            entry = self.board.lease(device.node_id, device.slots)
            if entry is None:
                return
            if entry.attempts > 1:
                self._remove_bytes(entry)  # of a reply that never came whole
            seconds = self._set_deadline(device, entry)
            offer, nbytes = self._offers.make(session, entry.task, seconds)
            self.counts.bytes_down += nbytes
            session.send(pb.ServerMessage(offer=offer))

    def _version_of(self, task: pb.Task) -> int:
        """Counts model versions by the content sent out to train."""
        key = b"".join(blob.name for blob in task.payload.blobs)
        return self._versions.setdefault(key, len(self._versions) + 1)

    # ------------------------------------------------------------ time

    def _set_deadline(self, device: Device, task: BoardTask) -> float:
        seconds = device.budget_seconds(task.task.message_type.partition(".")[0], self.settings)
        self.board.extend(task.id, self.seconds + seconds)
        return seconds

    def tick(self) -> None:
        """Ends what is over, and lets go of devices that have been silent for too long."""
        now = self.seconds
        for ended in self.board.due(now):
            self._call_off(ended.task, ended.reason)
            self._task_failed(ended)
            if (device := self.registry.get(ended.task.node_id)) is not None:
                self.offer(device)
        for session in list(self._sessions.values()):
            silent = now - session.device.seen
            if silent > self.settings.lost_after_seconds:
                session.close(f"silent for {silent:.0f} s")
            if session.closed:  # its stream may take a while to end, where nobody reads it
                self.leave(session, session.reason)

    def _call_off(self, task: BoardTask, reason: str) -> None:
        if (session := self._sessions.get(task.node_id)) is not None:
            session.send(pb.ServerMessage(cancel=pb.Cancel(task_ids=[task.id], reason=reason)))

    def _task_failed(self, ended: Ended) -> None:
        task = ended.task
        device = self.registry.get(task.node_id)
        name = device.name if device is not None else f"node {task.node_id}"
        if device is not None:
            device.tasks_failed += 1
        expired = task.state is State.EXPIRED
        self._remove_bytes(task)
        log.warning("%s: task %d (%s) is lost: %s", name, task.id, task.task.message_type, ended.reason)
        self.counts.lost.append(f"{name}: task {task.id} ({task.task.message_type}): {ended.reason}")
        self._tell_failed(
            task, Code.MESSAGE_UNAVAILABLE if expired else Code.NODE_UNAVAILABLE, f"{name}: {ended.reason}", expired
        )

    def _remove_bytes(self, task: BoardTask) -> None:
        """Nobody will read what was stored for a reply to this task."""
        shutil.rmtree(self.updates / str(task.id), ignore_errors=True)

    # ------------------------------------------------------------ ending

    def drain(self, reason: str) -> None:
        """No more tasks are given out; devices are told to come back later, the ServerApp to stop."""
        self.draining = True
        for session in self._sessions.values():
            session.send(pb.ServerMessage(drain=pb.Drain(reason=reason)))
        self._tell(pb.FleetMessage(stop=pb.Stop(reason=reason)))

    def close(self, reason: str) -> None:
        """Lets every device go."""
        self.board.clear(State.CANCELLED)
        for session in list(self._sessions.values()):
            session.close(reason)

    # ------------------------------------------------------------ helpers

    @property
    def seconds(self) -> float:
        """Seconds since the run began: the clock of the board, the registry and every event."""
        return time.monotonic() - self.started

    def _tell_failed(self, task: BoardTask, code: int, reason: str, expired: bool = False) -> None:
        failed = pb.Failed(task_id=task.id, node_id=task.node_id, code=code, reason=reason, expired=expired)
        self._tell(pb.FleetMessage(failed=failed))

    def _tell(self, message: pb.FleetMessage) -> None:
        self._sequence += 1
        message.sequence, message.at = self._sequence, self.seconds
        self.tell_app(message)

    @property
    def versions(self) -> int:
        return len(self._versions)

    def device_states(self) -> list[pb.DeviceState]:
        now = self.seconds
        return [
            device.state(self.board.held(device.node_id), now)
            for device in sorted(self.registry, key=lambda device: device.name)
        ]
