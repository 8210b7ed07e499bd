"""The weighted sum of many updates' changes, each read once, in blocks where it lies, and never held whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpace.strategies.blocks import each, flat_of, threads
from fedpace.strategies.layout import Layout, Model, subtract
from fedpace.strategies.parts import Vector

BLOCK = 65_536
"""Numbers of every update that are added up before the next: 256 kB of float32. Longer than blocks elsewhere, for each
begins at another place of memory, and reading starts slowly."""

ALONE = 1 << 20
"""So many numbers are added up before a second thread has started."""


@dataclass(frozen=True, slots=True)
class Dense:
    """Arrays by name, all of a model's or some, that are folded with a weight as their change from `model`."""

    weight: float
    arrays: Mapping[str, NDArray[Any]]
    model: Model


Piece = tuple[str, slice, slice]
"""A block of an array: its name, where it lies in the vector, and where in the array."""


def pieces_of(layout: Layout) -> list[Piece]:
    """All arrays in blocks, in the vector's order."""
    return [
        (name, slice(place.start + start, min(place.start + start + BLOCK, place.stop)), slice(start, start + BLOCK))
        for name, place in layout.places.items()
        for start in range(0, place.stop - place.start, BLOCK)
    ]


def add_dense(layout: Layout, total: Vector, updates: Sequence[Dense], count: int | None = None) -> None:
    """Adds the sum of weight x (arrays - model) to `total`, of the layout's dtype and shape (size,), in place.

    Numbers of the vector's own dtype are added up as they are, and their models taken off once, at the end. `count`
    threads share the work (None: as many as it is worth); each number is made by one of them in the order of updates, so
    that its bits are the same for any count. Memory beside `total`: a block a thread.
    """
    terms = [_Terms.of(name, layout, updates) for name in layout.places]
    by_name = {terms_of.name: terms_of for terms_of in terms if terms_of.sums or terms_of.differences}
    pieces = [piece for piece in pieces_of(layout) if piece[0] in by_name]
    if count is None:
        count = threads() if layout.size * len(updates) > ALONE else 1

    def work(mine: Iterator[Piece]) -> None:
        scratch = np.empty(min(BLOCK, layout.size), layout.dtype)
        for name, place, within in mine:
            out = total[place]
            by_name[name].add_to(out, within, scratch[: out.size])

    each(pieces, work, min(count, len(pieces)))


@dataclass(frozen=True, slots=True)
class _Terms:
    """What is added up for one array: numbers as they are (flat, weight); differences (flat, flat of model, weight)."""

    name: str
    sums: list[tuple[Any, Any]]
    differences: list[tuple[Any, Any, Any]]

    @classmethod
    def of(cls, name: str, layout: Layout, updates: Sequence[Dense]) -> _Terms:
        sums: list[tuple[Any, Any]] = []
        differences = []
        taken_off: dict[int, tuple[Model, float]] = {}
        for update in updates:
            if name not in update.arrays:
                continue
            array, before = update.arrays[name], update.model.arrays[name]
            if array.dtype == before.dtype == layout.dtype:
                sums.append((flat_of(array), layout.dtype.type(update.weight)))
                share = taken_off.get(id(update.model), (update.model, 0.0))[1] + update.weight
                taken_off[id(update.model)] = update.model, share
            else:
                differences.append((flat_of(array), flat_of(before), layout.dtype.type(update.weight)))
        sums += [(flat_of(model.arrays[name]), layout.dtype.type(-share)) for model, share in taken_off.values()]
        return cls(name, sums, differences)

    def add_to(self, out: Vector, within: slice, scratch: Vector) -> None:
        for flat, weight in self.sums:
            np.multiply(flat[within], weight, out=scratch)
            out += scratch
        for flat, before, weight in self.differences:
            subtract(flat[within], before[within], scratch)
            np.multiply(scratch, weight, out=scratch)
            out += scratch


def add_vector(total: Vector, vector: NDArray[Any], weight: float) -> None:
    """`total` += `weight` x `vector`, both of shape (n,), in place, a block at a time."""
    scratch = np.empty(min(BLOCK, total.size), total.dtype)
    for start in range(0, total.size, BLOCK):
        out = total[start : start + BLOCK]
        out += np.multiply(vector[start : start + BLOCK], weight, out=scratch[: out.size])
