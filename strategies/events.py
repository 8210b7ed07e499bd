"""What can happen to a strategy beside the grid's own events, and what it can decide. Both are plain data.

Every effect names its `cause`, and says what the decision log is to keep of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpace.protocol.paced import DeviceProfile, Event, Order

# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class Started:
    """The run begins with these devices, and what they say of themselves: `PacedGrid.census`."""

    at: float
    node_ids: Sequence[int]
    census: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Restored:
    """What an earlier process of this run had saved."""

    at: float
    saved: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Profiled:
    """What is now known of a device."""

    at: float
    profile: DeviceProfile


@dataclass(slots=True)
class Sent:
    """Tasks went out under these message ids, each with so many bytes of arrays."""

    at: float
    tasks: Sequence[int]
    message_ids: Sequence[str]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores of updates, one each in the order of `tasks`; see `Updates`."""

    at: float
    tasks: Sequence[int]
    agreement: Sequence[float]
    norm: Sequence[float]
    validation_loss: Sequence[float]


@dataclass(frozen=True, slots=True)
class Folded:
    """A new version is there. `norm` is the Euclidean length of the step; not finite if the model diverged."""

    at: float
    version: int
    norm: float


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The server's own evaluation of a version."""

    at: float
    version: int
    metrics: Mapping[str, Any]


StrategyEvent = Event | Started | Restored | Profiled | Scored | Folded | Evaluated


# ---------------------------------------------------------------- effects


@dataclass(slots=True)
class TaskOrder(Order):
    """One task of a `Send`."""

    task: int


@dataclass(slots=True)
class Send:
    """Send a version to devices, each with its own config. `kind` is "train" or "evaluate"."""

    cause: str
    kind: str
    version: int
    round: int
    orders: Sequence[TaskOrder]

    def entry(self) -> dict[str, Any]:
        return {
            "what": "select",
            "kind": self.kind,
            "version": self.version,
            "round": self.round,
            "tasks": [order.task for order in self.orders],
            "nodes": [order.node_id for order in self.orders],
            "steps": [order.config.get("local-steps") for order in self.orders],
            "cause": self.cause,
        }


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody waits for these tasks any more."""

    cause: str
    tasks: Sequence[int]
    message_ids: Sequence[str]

    def entry(self) -> dict[str, Any]:
        return {"what": "give up", "tasks": list(self.tasks), "cause": self.cause}


@dataclass(frozen=True, slots=True)
class Score:
    """Say how far each update agrees with the others. `samples` are their weights in the consensus."""

    cause: str
    tasks: Sequence[int]
    samples: Sequence[float]

    def entry(self) -> dict[str, Any]:
        return {"what": "score", "tasks": list(self.tasks), "cause": self.cause}


@dataclass(frozen=True, slots=True)
class Discard:
    """Updates that arrived and are not folded."""

    cause: str
    tasks: Sequence[int]
    reason: str

    def entry(self) -> dict[str, Any]:
        return {"what": "discard", "tasks": list(self.tasks), "reason": self.reason, "cause": self.cause}


@dataclass(frozen=True, slots=True)
class Fold:
    """Fold updates into the model with these weights, in this order.

    `rows`, `staleness` and `steps` are theirs; `devices` is the size of the fleet.
    """

    cause: str
    tasks: Sequence[int]
    weights: Sequence[float]
    rows: Sequence[int]
    staleness: Sequence[int]
    steps: Sequence[float]
    devices: int

    def entry(self) -> dict[str, Any]:
        return {
            "what": "fold",
            "tasks": list(self.tasks),
            "weights": list(self.weights),
            "staleness": list(self.staleness),
            "cause": self.cause,
        }


@dataclass(frozen=True, slots=True)
class Step:
    """Let the server's optimiser make version `version` of what was folded. `metrics` are the devices' own, combined."""

    cause: str
    version: int
    round: int
    folded: int
    metrics: Mapping[str, Any]

    def entry(self) -> dict[str, Any]:
        return {"what": "step", "version": self.version, "round": self.round, "cause": self.cause}


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Let the server evaluate a version, where it has a function to."""

    cause: str
    version: int
    round: int

    def entry(self) -> dict[str, Any]:
        return {"what": "evaluate", "version": self.version, "round": self.round, "cause": self.cause}


@dataclass(frozen=True, slots=True)
class Report:
    """What the devices found a version to be worth."""

    cause: str
    version: int
    round: int
    replies: int
    metrics: Mapping[str, Any]

    def entry(self) -> dict[str, Any]:
        return {"what": "report", "version": self.version, "replies": self.replies, "cause": self.cause}


@dataclass(frozen=True, slots=True)
class Release:
    """No task out begins with these versions any more: they need not be kept."""

    cause: str
    versions: Sequence[int]

    def entry(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Save:
    """Keep what was learned of devices."""

    cause: str

    def entry(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Note:
    """Something worth knowing that changes nothing: a device found to misreport, a deadline that moved."""

    cause: str
    text: str
    values: Mapping[str, Any] = field(default_factory=dict)

    def entry(self) -> dict[str, Any]:
        return {"what": "note", "text": self.text, **self.values, "cause": self.cause}


@dataclass(frozen=True, slots=True)
class Finish:
    """The end. `status` is "completed", "no devices", "every task failed" or "diverged"."""

    cause: str
    status: str
    reason: str

    def entry(self) -> dict[str, Any]:
        return {"what": "finish", "status": self.status, "reason": self.reason, "cause": self.cause}


Effect = Send | Cancel | Score | Discard | Fold | Step | Evaluate | Report | Release | Save | Note | Finish
