"""What devices that compress with error feedback are told of the updates they sent.

A device keeps what it sent until it knows the fate of it (`fedpace.protocol.encoded`): so each of its tasks tells it
which updates were folded, and which have no fate yet; all others were lost. A folded update is told of until a reply
comes to a task that told it, from the stream that the update was of: only then is it known to be heard. Of devices that
do not compress nothing is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from fedpace.protocol.encoded import FOLDED, NONE, OPEN, folded_name

if TYPE_CHECKING:
    from fedpace.strategies.state import Task

REMEMBERED = 1000
"""Folded updates that a device is told of at most, the latest: more only where its streams come to nothing."""


class Fates:
    """Of one device: `open` holds its training tasks without a fate, `folded` names updates that it may not know of."""

    __slots__ = ("folded", "open")

    def __init__(self, tasks: Iterable[Task]) -> None:
        self.open = {task.id: task for task in tasks}
        self.folded: dict[str, int] = {}

    def tell(self, task: Task, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """The config of a new task, with what the device is to be told. While a task is on its way out, of which nobody
        knows the message's id yet, the device is told nothing, and keeps all."""
        told = config
        if all(other.message_id for other in self.open.values()):
            task.told = tuple(self.folded)
            told = {**config, OPEN: " ".join([other.message_id for other in self.open.values()]) or NONE}
            if task.told:
                told[FOLDED] = " ".join(task.told)
        self.open[task.id] = task
        return told

    def hear(self, task: Task, stream: int) -> None:
        """A task's update came, of a stream (0: nobody knows which) that has heard what the task told."""
        task.stream = stream
        for name in task.told:
            if self.folded.get(name) == stream:
                del self.folded[name]

    def settle(self, task: Task, fate: str) -> None:
        """A training task has come to its fate."""
        self.open.pop(task.id, None)
        if fate == "folded" and task.stream:
            self.folded[folded_name(task.message_id, task.stream)] = task.stream
            if len(self.folded) > REMEMBERED:
                del self.folded[next(iter(self.folded))]
