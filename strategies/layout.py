"""A model's arrays as one flat vector and back, and the change that a device's arrays stand for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

from fedpace.errors import ConfigError, PayloadError
from fedpace.protocol.downlink import moved, sum_dtype
from fedpace.protocol.encoded import StepLayout
from fedpace.protocol.mapped import array_of
from fedpace.protocol.received import numbers_of
from fedpace.strategies.blocks import all_finite
from fedpace.strategies.parts import Vector

_EXACT = (np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.int64))
"""Differences of these are taken as they are."""
_FURTHEST = 2.0**62
"""An integer moves no further at once."""


class Layout:
    """Where each array of a model lies in a flat vector: float32, or float64 where the model has float64 arrays.

    Arrays of floating-point numbers come first, in the model's order; `floats` of the vector's numbers are theirs, and a
    compressed update (`fedpace.protocol.encoded`) is a step of those, of the layout `steps`.
    Integer arrays (counters) take part too: their changes are averaged, whatever the server's optimiser does to the
    others, and rounded when they are added.
    Raises ConfigError for arrays that are no numbers.
    """

    def __init__(self, record: ArrayRecord) -> None:
        if not record:
            raise ConfigError("initial_arrays is empty: the strategy needs a model to start from")
        arrays = {name: _numbers(name, array) for name, array in record.items()}
        self.dtypes = {name: array.dtype for name, array in arrays.items()}
        self.shapes = {name: array.shape for name, array in arrays.items()}
        self.dtype = sum_dtype(self.dtypes.values())
        self.places: dict[str, slice] = {}
        self.size = self.floats = 0
        for name in sorted(arrays, key=lambda name: self.dtypes[name].kind != "f"):
            self.places[name] = slice(self.size, self.size + arrays[name].size)
            self.size += arrays[name].size
            if self.dtypes[name].kind == "f":
                self.floats = self.size
        self.counters = [name for name in self.places if self.dtypes[name].kind != "f"]
        self.integers = [self.places[name] for name in self.counters]
        self.steps = StepLayout.of((name, str(dtype), self.shapes[name]) for name, dtype in self.dtypes.items())
        self.uniform = all(dtype == self.dtype for dtype in self.dtypes.values())

    def zeros(self) -> Vector:
        return np.zeros(self.size, self.dtype)

    def flatten(self, arrays: Mapping[str, NDArray[Any]]) -> Vector:
        """Arrays as one vector. Raises PayloadError where one is missing or of another shape."""
        flat: Vector = np.empty(self.size, self.dtype)
        for name, place in self.places.items():
            flat[place] = self.fitting(name, arrays).reshape(-1)
        return flat

    def change(self, arrays: Mapping[str, NDArray[Any]], model: Model, out: Vector) -> Vector:
        """`arrays` minus the arrays of `model`, flat, into `out`. Raises PayloadError as `flatten` does."""
        for name, place in self.places.items():
            subtract(self.fitting(name, arrays).reshape(-1), model.arrays[name].reshape(-1), out[place])
        return out

    def check(self, arrays: Mapping[str, NDArray[Any]], *, finite: bool, floats: bool = True) -> None:
        """Raises PayloadError where arrays are missing, of another shape, no numbers, or (if asked) not finite. Without
        `floats`, those that hold floating-point numbers in the model are not looked for."""
        for name in self.places if floats else self.counters:
            array = self.fitting(name, arrays)
            if finite and array.dtype.kind == "f" and not all_finite(array):
                raise PayloadError(f"array {name!r} has values that are NaN or infinite")

    def fitting(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """The array of that name. Raises PayloadError where it is missing, of another shape, or no numbers."""
        try:
            array = arrays[name]
        except KeyError:
            raise PayloadError(
                f"array {name!r} is missing; there are {', '.join(map(repr, arrays)) or 'none'}"
            ) from None
        if array.shape != self.shapes[name]:
            raise PayloadError(f"array {name!r} has shape {array.shape}, the model's has {self.shapes[name]}")
        if array.dtype.kind not in "fiub":
            raise PayloadError(f"array {name!r} is of {array.dtype}: it holds no numbers")
        return array

    def record(self, flat: Vector) -> ArrayRecord:
        """A vector as arrays of the model's shapes, in the vector's dtype, copied."""
        return _record((name, flat[self.places[name]].reshape(shape).copy()) for name, shape in self.shapes.items())


class Model:
    """One version: its arrays in their own dtypes, and, where it is asked for, the same as one flat vector."""

    def __init__(self, layout: Layout, arrays: Mapping[str, NDArray[Any]], flat: Vector | None = None) -> None:
        self._layout = layout
        self._flat = flat
        self.arrays = arrays
        self._record: ArrayRecord | None = None

    @classmethod
    def of(cls, layout: Layout, record: ArrayRecord) -> Model:
        """The arrays stay where they are in the record."""
        model = cls(layout, {name: numbers_of(array) for name, array in record.items()})
        model._record = record
        return model

    @property
    def flat(self) -> Vector:
        """Not to be written to. Of a first version, and where arrays are of several dtypes, a copy that is kept."""
        if self._flat is None:
            self._flat = self._layout.flatten(self.arrays)
        return self._flat

    @property
    def record(self) -> ArrayRecord:
        """The version as Flower's record, made once; large arrays of it are not copied."""
        if self._record is None:
            self._record = _record(self.arrays.items())
        return self._record

    def moved(self, by: Vector, *, take: bool = False) -> Model:
        """The version that is `by` away from this one. With `take`, `by` is used up: it may become the version."""
        layout = self._layout
        if layout.uniform:
            flat: Vector = by if take else np.empty_like(by)
            if self._flat is not None:
                np.add(self._flat, by, out=flat)
            else:
                for name, place in layout.places.items():
                    np.add(self.arrays[name].reshape(-1), by[place], out=flat[place])
            views = {name: flat[place].reshape(layout.shapes[name]) for name, place in layout.places.items()}
            return Model(layout, views, flat)
        arrays: dict[str, NDArray[Any]] = {}
        for name, dtype in layout.dtypes.items():
            before = self.arrays[name]
            step = by[layout.places[name]].reshape(before.shape)
            if dtype.kind == "f":
                arrays[name] = moved(before, step, layout.dtype)
            else:
                arrays[name] = _counted(before, step)
        return Model(layout, arrays)


def _record(arrays: Iterable[tuple[str, NDArray[Any]]]) -> ArrayRecord:
    record = ArrayRecord()
    for name, array in arrays:
        record[name] = array_of(array)  # one by one: given all at once, a record asks each for its bytes
    return record


def subtract(array: NDArray[Any], before: NDArray[Any], out: Vector) -> None:
    """`array` less `before`, whatever kinds of numbers they are, into `out`; all of shape (n,)."""
    # not in 16 bits, where a difference overflows, nor in unsigned ones or booleans, which have no negative
    as_they_are = array.dtype == before.dtype and array.dtype in _EXACT
    np.subtract(array, before, out=out, dtype=None if as_they_are else np.float64, casting="unsafe")


def _counted(before: NDArray[Any], step: NDArray[Any]) -> NDArray[Any]:
    """Integers, or booleans, moved by a step rounded to whole ones; none wraps around in fewer than 64 bits."""
    whole = np.clip(np.rint(np.nan_to_num(step)), -_FURTHEST, _FURTHEST).astype(np.int64)
    moved = before.astype(np.int64) + whole
    if before.dtype.kind == "b":
        moved = np.clip(moved, 0, 1)
    elif before.dtype.itemsize < 8:
        limits = np.iinfo(before.dtype)
        moved = np.clip(moved, limits.min, limits.max)
    return np.asarray(moved, before.dtype)


def _numbers(name: str, array: Array) -> NDArray[Any]:
    try:
        found: NDArray[Any] = numbers_of(array)
    except (TypeError, PayloadError) as error:
        raise ConfigError(f"initial_arrays: array {name!r} is no numpy array: {error}") from None
    if found.dtype.kind not in "fiub":
        raise ConfigError(f"initial_arrays: array {name!r} is of {found.dtype}, which is no number")
    return found
