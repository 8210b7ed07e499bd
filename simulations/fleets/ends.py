"""How tasks of simulated devices end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedpace.simulations.fleets.hashing import Floats

OUTCOMES = ("replied", "dropped", "failed", "left")
REPLIED, DROPPED, FAILED, LEFT = range(4)
REASONS = ("", "error", "memory", "session", "battery", "absent")
NOTHING, ERROR, MEMORY, SESSION, BATTERY, ABSENT = range(6)


class End(NamedTuple):
    """How a task ends.

    `at`: the time in seconds at which the coordinator sees it. `outcome`: "replied"; "dropped" (the task is lost, the
    device stays); "failed" (it answers with an error: `reason` "error" or "memory"); "left" (it goes away: "session",
    "battery", or "absent" if it was not there to begin with). The seconds are those really spent, one after the other:
    compute starts `download_seconds` after the task was sent. `claimed_compute_seconds` is what the device reports.
    """

    at: float
    outcome: str
    compute_seconds: float
    download_seconds: float
    upload_seconds: float
    claimed_compute_seconds: float
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Ends:
    """`End`s of many tasks, as arrays of shape (tasks,); `outcome` and `reason` index `OUTCOMES` and `REASONS`."""

    at: Floats
    outcome: NDArray[np.uint8]
    compute_seconds: Floats
    download_seconds: Floats
    upload_seconds: Floats
    claimed_compute_seconds: Floats
    reason: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.at)

    def each(self) -> Iterator[End]:
        """One after the other."""
        outcomes, reasons = [OUTCOMES[i] for i in self.outcome.tolist()], [REASONS[i] for i in self.reason.tolist()]
        seconds = (self.compute_seconds, self.download_seconds, self.upload_seconds, self.claimed_compute_seconds)
        return map(End, self.at.tolist(), outcomes, *(column.tolist() for column in seconds), reasons)

    def __getitem__(self, index: int) -> End:
        return End(
            self.at.item(index),
            OUTCOMES[self.outcome[index]],
            self.compute_seconds.item(index),
            self.download_seconds.item(index),
            self.upload_seconds.item(index),
            self.claimed_compute_seconds.item(index),
            REASONS[self.reason[index]],
        )


def gather(ends: Sequence[End]) -> Ends:
    """The same ends as arrays."""

    def column(index: int) -> Floats:
        return np.array([end[index] for end in ends], dtype=np.float64)

    return Ends(
        column(0),
        np.array([OUTCOMES.index(end.outcome) for end in ends], dtype=np.uint8),
        column(2),
        column(3),
        column(4),
        column(5),
        np.array([REASONS.index(end.reason) for end in ends], dtype=np.uint8),
    )
