"""Updates that wait to be folded: checked when they come, and left where they lie."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from fedpace.errors import PayloadError
from fedpace.protocol.encoded import Step, read_step
from fedpace.protocol.paced import UpdateHandle
from fedpace.strategies.copies import Copies
from fedpace.strategies.layout import Layout
from fedpace.strategies.parts import Vector
from fedpace.strategies.sums import add_vector

Arrays = Mapping[str, NDArray[Any]]

MAPPED = 128
"""So many updates at most have their files mapped: those that came first, and while they are folded, others."""

_OPEN_BYTES = 1 << 16
"""Compressed updates of at most so many bytes stay open while they wait; larger ones are opened again."""

COPIES_BYTES = 1 << 30
"""What the copies of devices that use EF21 may take together."""


@dataclass(slots=True)
class Update:
    """One that waits. `place` is the matrix and the row where it can be folded with others without being taken apart;
    `arrays` where they are kept; of a compressed one, `step` where it is small; of one by EF21, `link`:
    its stream, and the name of its copy once it is folded."""

    handle: UpdateHandle
    version: int
    place: tuple[Any, int] | None = None
    compressed: bool = False
    arrays: Arrays | None = None
    step: Step | None = None
    link: tuple[int, int] | None = None


class Waiting:
    """Updates by task. `codecs` are those that devices may use, as `open_frame` takes them."""

    def __init__(self, layout: Layout, array_name: str, codecs: Collection[str] | None) -> None:
        self.copies = Copies(layout.floats, COPIES_BYTES)
        self._layout = layout
        self._array_name = array_name
        self._codecs = codecs
        self.updates: dict[int, Update] = {}
        self._links: dict[tuple[int, int], int] = {}
        self._mapped = 0

    def receive(self, task: int, version: int, handle: UpdateHandle, *, checked: bool) -> int | None:
        """Takes an update that began with `version`; `checked` ones are known to be finite.

        Returns the stream of a compressed one whose device wants to know its fate, else None. Raises PayloadError, and
        takes nothing, where it does not fit the model.
        """
        place = self._place(handle)
        if checked and place is not None:
            self.updates[task] = Update(handle, version, place)
            return None
        arrays = handle.arrays(self._array_name)
        view = None if self._is_dense(arrays) else handle.encoded(self._array_name)
        self._layout.check(arrays, finite=not checked, floats=view is None)
        update = Update(handle, version, place, compressed=view is not None)
        asks = None
        if view is not None:
            step = read_step(view, self._layout.steps, self._codecs)
            if step.after is not None:
                self._check_link(step)
                update.link = (step.stream, step.after)
                self._links.setdefault(update.link, task)
            if len(view) <= _OPEN_BYTES:
                update.step = step
            asks = step.stream if step.wants_fate else None
        if self._mapped < MAPPED:
            self._mapped += 1
            update.arrays = arrays
        self.updates[task] = update
        return asks

    def _check_link(self, step: Step) -> None:
        """Raises PayloadError for a step by EF21 whose copy is not here, nor will be once what waits is folded."""
        if not self.copies.holds(step) and (step.stream, step.base) not in self._links:
            raise PayloadError("the server's copy for EF21 is not the one this update was made for: begin with zeros")
        if not self.copies.room(len(self._streams() | {step.stream})):
            raise PayloadError(
                "there is no room for one more copy for EF21, of which each takes 4 bytes a number: "
                "use plain error feedback, or fewer devices"
            )

    def _streams(self) -> set[int]:
        return {stream for stream, _ in self._links}

    def _is_dense(self, arrays: Arrays) -> bool:
        return next(iter(self._layout.steps.shapes), None) in arrays

    def _place(self, handle: UpdateHandle) -> tuple[Any, int] | None:
        """The matrix and the row of an update that can be folded so; None elsewhere."""
        place = handle.place(self._array_name)
        if place is None or place[0].dtype != self._layout.dtype or place[0].shape[1] != self._layout.size:
            return None
        return place

    def arrays(self, update: Update) -> Arrays:
        """Its arrays; of a compressed one, those that no step stands for."""
        arrays = update.handle.arrays(self._array_name) if update.arrays is None else update.arrays
        return {name: arrays[name] for name in self._layout.counters} if update.compressed else arrays

    def step(self, update: Update) -> Step:
        """A compressed update, opened."""
        if update.step is not None:
            return update.step
        view = update.handle.encoded(self._array_name)
        if view is None:
            raise PayloadError("a compressed update is no longer where it was")
        return read_step(view, self._layout.steps, self._codecs)

    def add_step(self, update: Update, weight: float, total: Vector) -> None:
        """Adds weight x the step of a compressed update to `total`, of shape (numbers of a step,), in place.

        A difference by EF21 goes on top of its copy, or of what is to be folded into that before. If that never was, the
        copy stands for the step.
        """
        steps = [self.step(update)]
        if update.link is not None:
            stream, _ = update.link
            while not self.copies.holds(steps[-1]):
                task = self._links.get((stream, steps[-1].base or 0))
                if task is None or len(steps) > len(self._links):
                    steps.clear()
                    break
                steps.append(self.step(self.updates[task]))
            copy = self.copies.of(stream)
            if copy is not None and (not steps or steps[-1].base):
                add_vector(total, copy, weight)
        for step in steps:
            step.frame.add_to(total, weight)

    def commit(self, tasks: Sequence[int]) -> None:
        """These were folded, in this order: the copies that they count on hold them now."""
        if self._links:
            streams = self._streams()
            for task in tasks:
                if (update := self.updates[task]).link is not None:
                    self.copies.commit(self.step(update), streams)

    def discard(self, tasks: Sequence[int]) -> None:
        take = self.updates.pop
        for task in tasks:
            update = take(task)
            if update.arrays is not None:
                self._mapped -= 1
            if update.link is not None and self._links.get(update.link) == task:
                del self._links[update.link]
            update.handle.release()
