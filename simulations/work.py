"""What a task of a simulated device computes, apart from when: computations, their answers, and who runs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from flwr.app import RecordDict

from fedpace.protocol.downlink import STEPS_TYPE
from fedpace.protocol.paced import UpdateHandle


class Content:
    """What many tasks are sent alike. The same object stands for the same bytes, so executors may keep what they made
    of it in `kept`, for as long as it lives. `configs` are its config records as plain dictionaries, for reading. `nbytes`
    is what its arrays take, and `model_bytes` what those take that they stand for."""

    __slots__ = ("__weakref__", "configs", "kept", "model_bytes", "nbytes", "records")

    def __init__(self, records: RecordDict) -> None:
        self.records = records
        arrays = [array for record in records.array_records.values() for array in record.values()]
        self.nbytes = sum(len(array.data) for array in arrays)
        steps = [array for array in arrays if array.stype == STEPS_TYPE]
        self.model_bytes = self.nbytes + sum(4 * array.shape[0] - len(array.data) for array in steps)
        self.configs = {name: dict(record) for name, record in records.config_records.items()}
        self.kept: dict[str, Any] = {}


@dataclass(slots=True)
class Computation:
    """One task's work: (content, config, state before) -> `Answer`. Fixed when it is sent; run when it is needed.

    `task` counts from 1 and names the task; `device` is the row in the fleet, which is also its partition. `config` is
    laid over the record `config_name` of `content`. `seed` is what the ClientApp's global generators are seeded with.
    `state` is the device's `context.state` as the task finds it: executors work on a copy, and put what is left
    of it into the answer. `created_at` and `ttl` are in seconds of virtual time.
    """

    task: int
    device: int
    node_id: int
    message_type: str
    content: Content
    config_name: str
    config: Mapping[str, Any]
    group_id: str
    created_at: float
    ttl: float
    seed: int
    state: RecordDict | None = None


@dataclass(slots=True)
class Answer:
    """What came of a computation. Without `update` it failed, with one of Flower's codes and a sentence.

    The update's arrays are whole and finite, and of the kinds and shapes sent: executors hold replies against what was
    sent, as the coordinator of real devices does, and answer with code 4 (Flower's REPLY_MESSAGE_UNAVAILABLE) and a
    reason that begins with "rejected: " otherwise. `metrics` are those of the reply, flat; `state` is the device's
    `context.state` after it (None: as before).
    """

    update: UpdateHandle | None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    code: int = 0
    reason: str = ""
    state: RecordDict | None = None


class Executor(Protocol):
    """Runs computations. The answers depend on each computation alone: not on which are run together with it, nor on the
    number of workers, beyond float tolerance; and for the same cohorts not at all."""

    @property
    def cohort(self) -> int:
        """How many computations are run as one, at best. The grid hands over whole cohorts where it can."""

    @property
    def keeps_state(self) -> bool:
        """Whether computations read and write `context.state`; if so, those of one device come one after the other."""

    def steps(self, device: int, message_type: str, config: Mapping[str, Any]) -> float | None:
        """Local steps that a task will take, known before it is run; None where only the app knows."""

    def run(self, computations: Sequence[Computation]) -> list[Answer]:
        """Answers in the order of the computations. Never raises for what an app's code does."""

    def close(self) -> None:
        """Ends workers; handles that were given out stay readable."""
