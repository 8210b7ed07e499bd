"""EF21's copies on the server: what each residual's updates have added up to, equal to the device's own bit for bit."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpace.protocol.encoded import Step


@dataclass(slots=True)
class _Copy:
    name: int
    numbers: NDArray[np.float32]


class Copies:
    """One vector of float32, shape (size,), for every stream that uses EF21 (Richtarik et al. 2021, "EF21: A New,
    Simpler, Theoretically Better, and Practically Faster Error Feedback", algorithm 1): 4 bytes a number and stream.

    They take `limit_bytes` at most. For a new one, those go that were folded longest ago; whoever's copy is gone begins
    anew, from zeros.
    """

    def __init__(self, size: int, limit_bytes: int) -> None:
        self._size = size
        self._limit_bytes = limit_bytes
        self._copies: dict[int, _Copy] = {}

    @property
    def nbytes(self) -> int:
        """What they take, in bytes."""
        return 4 * self._size * len(self._copies)

    def room(self, streams: int) -> bool:
        """Whether so many streams can have a copy at once."""
        return 4 * self._size * streams <= self._limit_bytes

    def holds(self, step: Step) -> bool:
        """Whether the copy that a step is the difference to is here; zeros always are."""
        return not step.base or (step.stream in self._copies and self._copies[step.stream].name == step.base)

    def of(self, stream: int) -> NDArray[np.float32] | None:
        """A stream's copy as it is now. Not to be written to."""
        copy = self._copies.get(stream)
        return None if copy is None else copy.numbers

    def commit(self, step: Step, waiting: Collection[int]) -> None:
        """A step was folded: its copy now holds it too, if it is the one that it was made for. None goes of a stream
        that is `waiting`."""
        if step.after is None or not self.holds(step):
            return
        copy = self._copies.pop(step.stream, None)
        if copy is None or not step.base:
            copy = _Copy(0, np.zeros(self._size, np.float32))
        step.frame.add_to(copy.numbers, 1.0)
        copy.name = step.after
        self._copies[step.stream] = copy  # to the end: the order is that of folds
        for stream in [stream for stream in self._copies if stream not in waiting]:
            if self.nbytes <= self._limit_bytes:
                break
            del self._copies[stream]
