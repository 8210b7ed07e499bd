"""Large arrays of a message, left where they lie until somebody needs them."""

from __future__ import annotations

from typing import Any

import numpy as np
from flwr.app import Array
from numpy.typing import NDArray

from fedpace.errors import PayloadError
from fedpace.protocol.check import NUMPY, npy_array

MAPPED_BYTES = 1 << 20
"""Arrays from this size on are mapped; of smaller ones a copy costs less than the care."""

_FIELDS = ("dtype", "shape", "stype", "data")


class MappedArray(Array):
    """An `Array` whose bytes are a read-only view, as a rule of a mapped file.

    `numpy()` copies once, straight from the view; `data` becomes bytes when first asked for. An array that an app only
    passes on is never copied.
    """

    def __init__(self, dtype: str, shape: tuple[int, ...], stype: str, view: memoryview) -> None:
        self.__dict__.update(dtype=dtype, shape=shape, stype=stype, _view=view)

    @property
    def buffer(self) -> bytes | memoryview:
        """The bytes, without a copy."""
        view: memoryview | None = self.__dict__["_view"]
        return self.data if view is None else view

    def __getattr__(self, name: str) -> Any:
        """Only asked for what is not there yet: the bytes."""
        if name != "data" or (view := self.__dict__.get("_view")) is None:
            raise AttributeError(name)
        self.__dict__["data"] = bytes(view)
        return self.__dict__["data"]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "data":
            self.__dict__["_view"] = None

    def numpy(self) -> NDArray[Any]:
        """A copy of its own, as `Array.numpy` gives. Raises what that raises."""
        view = self.__dict__["_view"]
        if view is not None and self.stype == NUMPY:
            try:
                return np.array(npy_array(view), order="K")
            except PayloadError:
                pass  # numpy says better what is wrong with it
        return super().numpy()

    def deflate(self) -> bytes:
        """As the ordinary Array: what Flower makes of one names its class."""
        return Array(self.dtype, self.shape, self.stype, self.data).deflate()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Array):
            return NotImplemented
        return all(getattr(self, field) == getattr(other, field) for field in _FIELDS)

    __hash__ = None  # type: ignore[assignment]  # like Array, which has an __eq__ too

    def __reduce__(self) -> tuple[type[Array], tuple[str, tuple[int, ...], str, bytes]]:
        """Copied and pickled as an ordinary Array."""
        return Array, (self.dtype, self.shape, self.stype, self.data)


def make_array(dtype: str, shape: tuple[int, ...], stype: str, view: memoryview) -> Array:
    """An array with bytes of its own where they are few, mapped where they are many."""
    if len(view) < MAPPED_BYTES:
        return Array(dtype, shape, stype, bytes(view))
    return MappedArray(dtype, shape, stype, view)


def buffer_of(array: Array) -> bytes | memoryview:
    """The bytes of an array, without a copy."""
    return array.buffer if isinstance(array, MappedArray) else array.data
