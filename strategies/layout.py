"""A model's arrays as one flat vector and back, and the change that a device's arrays stand for."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

from fedpace.errors import ConfigError, PayloadError
from fedpace.protocol.check import NUMPY
from fedpace.strategies.parts import Vector

_EXACT = (np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.int64))
"""Differences of these are taken as they are."""
_FURTHEST = 2.0**62
"""An integer moves no further at once."""


class Layout:
    """Where each array of a model lies in a flat vector: float32, or float64 where the model has float64 arrays.

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
        self.dtype = np.dtype(np.float64 if np.dtype(np.float64) in self.dtypes.values() else np.float32)
        self.places: dict[str, slice] = {}
        start = 0
        for name, array in arrays.items():
            self.places[name] = slice(start, start + array.size)
            start += array.size
        self.size = start
        self.integers = [place for name, place in self.places.items() if self.dtypes[name].kind != "f"]
        self.uniform = all(dtype == self.dtype for dtype in self.dtypes.values())

    def zeros(self) -> Vector:
        return np.zeros(self.size, self.dtype)

    def flatten(self, arrays: Mapping[str, NDArray[Any]]) -> Vector:
        """Arrays as one vector. Raises PayloadError where one is missing or of another shape."""
        flat: Vector = np.empty(self.size, self.dtype)
        for name, place in self.places.items():
            flat[place] = self._fitting(name, arrays).reshape(-1)
        return flat

    def change(self, arrays: Mapping[str, NDArray[Any]], model: Model, out: Vector) -> Vector:
        """`arrays` minus the arrays of `model`, flat, into `out`. Raises PayloadError as `flatten` does."""
        for name, place in self.places.items():
            array, before = self._fitting(name, arrays).reshape(-1), model.arrays[name].reshape(-1)
            # not in 16 bits, where a difference overflows, nor in unsigned ones or booleans, which have no negative
            as_they_are = array.dtype == before.dtype and array.dtype in _EXACT
            kind = None if as_they_are else np.float64
            np.subtract(array, before, out=out[place], dtype=kind, casting="unsafe")
        return out

    def check(self, arrays: Mapping[str, NDArray[Any]], *, finite: bool) -> None:
        """Raises PayloadError where arrays are missing, of another shape, no numbers, or (if asked) not finite."""
        for name in self.places:
            array = self._fitting(name, arrays)
            if finite and array.dtype.kind == "f" and not np.isfinite(array).all():
                raise PayloadError(f"array {name!r} has values that are NaN or infinite")

    def _fitting(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
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
        """A vector as arrays of the model's shapes, in the vector's dtype."""
        return ArrayRecord(
            {name: _flowers(flat[place].reshape(self.shapes[name])) for name, place in self.places.items()}
        )


class Model:
    """One version: its arrays in their own dtypes, and the same as one flat vector."""

    def __init__(self, layout: Layout, arrays: Mapping[str, NDArray[Any]], flat: Vector | None = None) -> None:
        self._layout = layout
        self._flat = flat
        self.arrays = arrays
        self._record: ArrayRecord | None = None

    @classmethod
    def of(cls, layout: Layout, record: ArrayRecord) -> Model:
        model = cls(layout, {name: array.numpy() for name, array in record.items()})
        model._record = record
        return model

    @property
    def flat(self) -> Vector:
        """Not to be written to."""
        if self._flat is None:
            self._flat = self._layout.flatten(self.arrays)
        return self._flat

    @property
    def record(self) -> ArrayRecord:
        """The version as Flower's record, made once."""
        if self._record is None:
            self._record = ArrayRecord({name: _flowers(array) for name, array in self.arrays.items()})
        return self._record

    def moved(self, by: Vector) -> Model:
        """The version that is `by` away from this one."""
        layout = self._layout
        if layout.uniform:
            flat: Vector = self.flat + by
            views = {name: flat[place].reshape(layout.shapes[name]) for name, place in layout.places.items()}
            return Model(layout, views, flat)
        arrays: dict[str, NDArray[Any]] = {}
        for name, place in layout.places.items():
            before, dtype = self.arrays[name], layout.dtypes[name]
            step = by[place].reshape(before.shape)
            if dtype.kind == "f":
                arrays[name] = np.asarray(before.astype(layout.dtype) + step, dtype)
            else:
                arrays[name] = _counted(before, step)
        return Model(layout, arrays)


def _flowers(array: NDArray[Any]) -> Array:
    """`Array(array)`, in a third of the time: a .npy file whose header was made before."""
    return Array(str(array.dtype), array.shape, NUMPY, _header(array.dtype, array.shape) + array.tobytes())


@functools.lru_cache(maxsize=1024)
def _header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """Of a .npy file of such an array, in rows."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    return header.getvalue()


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
        found: NDArray[Any] = array.numpy()
    except TypeError as error:
        raise ConfigError(f"initial_arrays: array {name!r} is no numpy array: {error}") from None
    if found.dtype.kind not in "fiub":
        raise ConfigError(f"initial_arrays: array {name!r} is of {found.dtype}, which is no number")
    return found
