"""`paced(grid)`: any Flower grid as a `PacedGrid`, by polling.

For Flower's own grids: that of a ServerApp under `flwr run` on a SuperLink, and that of its simulation. Their pulls do
not block, so this one looks again and again: soon after something happened, less often while nothing does.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedpace.errors import PayloadError
from fedpace.protocol.decoding import DecodedGrid
from fedpace.protocol.failures import Code
from fedpace.protocol.paced import DeviceProfile, Event, Expired, Failed, Joined, Left, PacedGrid, Replied, Tick
from fedpace.protocol.received import (
    Layout,
    RecordsUpdate,
    check_records,
    flat_metrics,
    record_layout,
    reported_seconds,
)
from fedpace.protocol.runmemory import RunMemory

FIRST_PAUSE, LONGEST_PAUSE = 0.02, 0.5
"""Seconds between two pulls: after something happened, and once nothing has for a while."""
_LONGER = 1.5
NODES_PAUSE = 1.0
"""Seconds between two looks at who is there."""
_EXPIRED = {Code.MESSAGE_UNAVAILABLE, Code.REPLY_MESSAGE_UNAVAILABLE}
"""What a SuperLink answers once a message, or its reply, is past its time to live."""


def paced(grid: Grid, directory: Path | None = None) -> PacedGrid:
    """The grid itself if it is a `PacedGrid`, else one that polls it.

    `directory` is where a polled grid keeps the decision log and the strategy's state; in memory if it is None.
    """
    return grid if isinstance(grid, PacedGrid) else PolledGrid(grid, directory)


@dataclass(frozen=True, slots=True)
class _Out:
    """A message that is out. `deadline` is on the grid's clock, `ttl` in seconds, `sent` what went out."""

    node_id: int
    deadline: float
    ttl: float
    sent: Mapping[str, Layout]


class PolledGrid(PacedGrid):
    """A foreign grid on the monotonic clock, to be used from one thread.

    What the foreign grid raises passes through; Flower's own raises nothing while its SuperLink cannot be reached, but
    tries again within the pull until it is back, and nothing happens meanwhile. Replies are checked as fedpace's server
    checks them. `cancel` forgets: the device goes on, and its reply stays with the foreign grid.
    """

    checks_arrays = True

    def __init__(self, grid: Grid, directory: Path | None = None) -> None:
        self._grid = grid
        self._decoded = DecodedGrid(grid)  # for those who take messages instead of events
        self._memory = RunMemory(directory)
        self._started = time.monotonic()
        self._sequence = 0
        self._events: deque[Event] = deque()
        self._answers: dict[str, Message] = {}  # those that events in the queue tell of
        self._out: dict[str, _Out] = {}  # in the order sent
        self._nodes: set[int] = set()
        self._profiles: dict[int, DeviceProfile] = {}
        self._unsent = 0
        self._pause = FIRST_PAUSE
        self._pull_at = self._nodes_at = 0.0

    # ------------------------------------------------------------ Flower's Grid

    def set_run(self, run: Any) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        return self._grid.run

    def get_node_ids(self) -> Iterable[int]:
        return sorted(self._look())

    def get_nodes(self) -> Iterable[Any]:
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Sends messages; the ids are in their order. One that the grid does not take fails at once, as an event."""
        return self._push(list(messages), recorded=False)

    def push_recorded(self, messages: Sequence[Message]) -> list[str]:
        return self._push(list(messages), recorded=True)

    def _push(self, batch: list[Message], *, recorded: bool) -> list[str]:
        layouts: dict[int, Layout] = {}
        out = [self._outgoing(message, layouts) for message in batch]
        taken: list[str | None] = list((self._grid if recorded else self._decoded).push_messages(batch))
        if len(taken) != len(batch):  # Flower's grids leave out those they do not take, or mark them with None
            known = set(taken)
            taken = [message_id if (message_id := message.metadata.message_id) in known else None for message in batch]
        ids = []
        for message, known_as, each in zip(batch, taken, out, strict=True):
            self._unsent += not known_as
            message_id = known_as or f"unsent-{self._unsent}"
            ids.append(message_id)
            if not recorded:
                kind = message.metadata.message_type
                self.record({"what": "send", "task": message_id, "node": each.node_id, "type": kind})
            if known_as:
                self._out[message_id] = each
            else:
                self._fail(message_id, each, Code.NODE_UNAVAILABLE, "the grid did not take the message")
        self._pause = FIRST_PAUSE
        self._pull_at = min(self._pull_at, self.now() + self._pause)
        return ids

    def _outgoing(self, message: Message, layouts: dict[int, Layout]) -> _Out:
        """Arrays that go to many are looked at once: `layouts` holds those of the records seen, by identity."""
        sent: dict[str, Layout] = {}
        for name, record in message.content.array_records.items():
            if id(record) not in layouts:
                layouts[id(record)] = record_layout(record)
            sent[name] = layouts[id(record)]
        metadata = message.metadata
        return _Out(metadata.dst_node_id, self.now() + metadata.ttl, metadata.ttl, sent)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = list(message_ids)
        there = [self._answers[message_id] for message_id in wanted if message_id in self._answers]
        found = {message.metadata.reply_to_message_id: self._decoded.plain(message) for message in there}
        if missing := [message_id for message_id in wanted if message_id not in found]:
            pulled = self._decoded.pull_messages(missing)
            found |= {message.metadata.reply_to_message_id: message for message in pulled}
        self._forget(set(found))
        return list(found.values())

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self._decoded.send_and_receive(messages, timeout=timeout)

    # ------------------------------------------------------------ PacedGrid

    def now(self) -> float:
        return time.monotonic() - self._started

    def next_event(self, until: float) -> Event:
        while not self._events:
            now = self.now()
            if now >= self._nodes_at:
                self._look()
            if self._out and now >= self._pull_at:
                self._pull()
            if self._events:
                break
            now = self.now()
            if now >= until:
                return Tick(now)
            time.sleep(max(0.0, min(until, self._nodes_at, self._pull_at if self._out else math.inf) - now))
        event = self._events.popleft()
        if isinstance(event, Replied | Failed):
            self._answers.pop(event.message_id, None)
            self._decoded.forget(event.message_id)
        return event

    def cancel(self, message_ids: Iterable[str]) -> None:
        queued = {event.message_id for event in self._events if isinstance(event, Replied | Failed | Expired)}
        known = [message_id for message_id in message_ids if message_id in self._out or message_id in queued]
        if known:
            self._forget(set(known))
            self.record({"what": "cancel", "tasks": known})

    def profile(self, node_id: int) -> DeviceProfile:
        return self._profiles[node_id]

    def record(self, decision: Mapping[str, Any]) -> None:
        self._memory.record(self.now(), decision)

    def save(self, state: Mapping[str, Any]) -> None:
        """Writes the state as JSON, atomically."""
        self._memory.save(state)

    def restore(self) -> dict[str, Any] | None:
        return self._memory.restore()

    # ------------------------------------------------------------ looking at the foreign grid

    def _look(self) -> set[int]:
        """Asks who is there, and tells what has changed since."""
        found = set(self._grid.get_node_ids())
        self._nodes_at = self.now() + NODES_PAUSE
        for node_id in sorted(found - self._nodes):
            profile = self._profiles.setdefault(node_id, _unknown(node_id))
            self._events.append(Joined(*self._stamp(), node_id, profile.name))
        for node_id in sorted(self._nodes - found):
            self._events.append(Left(*self._stamp(), node_id, "the grid no longer lists it"))
        self._nodes = found
        return found

    def _pull(self) -> None:
        """Asks for answers to all that is out, and lets expire what stays without one for too long."""
        began = self.now()
        answers = {answer.metadata.reply_to_message_id: answer for answer in self._grid.pull_messages(list(self._out))}
        self._pause = FIRST_PAUSE if answers else min(LONGEST_PAUSE, _LONGER * self._pause)
        for message_id in [message_id for message_id in self._out if message_id in answers]:
            self._answered(message_id, self._out.pop(message_id), answers[message_id])
        for message_id in [message_id for message_id, out in self._out.items() if out.deadline <= began]:
            out = self._out.pop(message_id)
            self._expire(message_id, out, f"no reply within its time to live of {out.ttl:g} s")
        took = self.now() - began  # a grid that is slow to answer is asked less often
        self._pull_at = self.now() + max(self._pause, min(took, LONGEST_PAUSE))

    def _answered(self, message_id: str, out: _Out, answer: Message) -> None:
        if answer.has_error():
            reason = answer.error.reason or "it gave no reason"
            if answer.error.code in _EXPIRED:
                self._expire(message_id, out, reason)
            else:
                self._answers[message_id] = answer
                self._fail(message_id, out, answer.error.code, reason)
            return
        try:
            check_records(answer.content, out.sent)
        except PayloadError as error:
            self._fail(message_id, out, Code.REPLY_MESSAGE_UNAVAILABLE, f"reply rejected: {error}")
            return
        metrics = flat_metrics(answer.content)
        seconds = reported_seconds(metrics)
        if not math.isnan(seconds) and out.node_id in self._profiles:
            self._profiles[out.node_id] = replace(self._profiles[out.node_id], seconds_per_task=seconds)
        self.record({"what": "replied", "task": message_id, "node": out.node_id})
        self._answers[message_id] = answer
        update = RecordsUpdate(answer.content)
        self._events.append(Replied(*self._stamp(), out.node_id, message_id, metrics, update, seconds))

    def _fail(self, message_id: str, out: _Out, code: int, reason: str) -> None:
        reason = f"{out.node_id}: {reason}"
        self.record({"what": "failed", "task": message_id, "node": out.node_id, "reason": reason})
        self._events.append(Failed(*self._stamp(), out.node_id, message_id, code, reason))

    def _expire(self, message_id: str, out: _Out, reason: str) -> None:
        reason = f"{out.node_id}: {reason}"
        self.record({"what": "expired", "task": message_id, "node": out.node_id, "reason": reason})
        self._events.append(Expired(*self._stamp(), out.node_id, message_id, reason))

    def _forget(self, message_ids: set[str]) -> None:
        """Nothing more is heard of these."""
        for message_id in message_ids:
            self._out.pop(message_id, None)
            self._answers.pop(message_id, None)
            self._decoded.forget(message_id)
        self._events = deque(event for event in self._events if getattr(event, "message_id", "") not in message_ids)

    def _stamp(self) -> tuple[int, float]:
        """The sequence number and the time of an event."""
        self._sequence += 1
        return self._sequence, self.now()


def _unknown(node_id: int) -> DeviceProfile:
    """What a grid that knows nothing but the id says of a device. A SuperNode does one message after another."""
    return DeviceProfile(
        node_id=node_id,
        name=str(node_id),
        slots=1,
        cpu_count=0,
        cpu_model="",
        memory_bytes=0,
        gpus=(),
        gpu_memory_bytes=(),
    )
