"""Large arrays of a message, left where they lie until somebody needs them."""

from __future__ import annotations

import contextlib
import functools
import io
from typing import Any

import numpy as np
from flwr.app import Array
from numpy.typing import NDArray

from fedpace.errors import PayloadError
from fedpace.protocol.check import NUMPY, npy_array

MAPPED_BYTES = 1 << 20
"""Arrays from this size on are mapped; of smaller ones a copy costs less than the care."""

NUMBER_KINDS = frozenset("biufc")
"""Kinds of dtypes that numpy knows again by their names."""

_FIELDS = ("dtype", "shape", "stype", "data")


class MappedArray(Array):
    """An `Array` whose bytes are a read-only view, as a rule of a mapped file.

    `numpy()` copies once, straight from the view; `data` becomes bytes when first asked for. An array that an app only
    passes on is never copied. Where `header` is given, its bytes come before those of the view, which then are bare
    numbers in rows (see `array_of`).
    """

    def __init__(
        self, dtype: str, shape: tuple[int, ...], stype: str, view: memoryview, header: bytes | None = None
    ) -> None:
        self.__dict__.update(dtype=dtype, shape=shape, stype=stype, _view=view, _header=header)

    @classmethod
    def of(cls, array: Array) -> MappedArray:
        """The same array, with a view of its bytes."""
        view, header = memoryview(array.data), None
        with contextlib.suppress(PayloadError):
            found = npy_array(view)
            plain = found.dtype.kind in NUMBER_KINDS and found.flags.c_contiguous
            if plain and (str(found.dtype), found.shape) == (array.dtype, array.shape):
                start = len(view) - found.nbytes
                header, view = bytes(view[:start]), view[start:]
        return cls(array.dtype, array.shape, array.stype, view, header)

    def twin(self) -> MappedArray:
        """Another one, of the same bytes."""
        twin = MappedArray.__new__(MappedArray)
        twin.__dict__.update(self.__dict__)
        return twin

    @property
    def buffers(self) -> tuple[bytes | memoryview, ...]:
        """What the bytes are the concatenation of, without a copy."""
        view, header = self.__dict__["_view"], self.__dict__["_header"]
        if view is None:
            return (self.data,)
        return (view,) if header is None else (header, view)

    def __getattr__(self, name: str) -> Any:
        """Only asked for what is not there yet: the bytes."""
        if name != "data" or self.__dict__.get("_view") is None:
            raise AttributeError(name)
        self.__dict__["data"] = b"".join(self.buffers)
        return self.__dict__["data"]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "data":
            self.__dict__["_view"] = None

    def numpy(self) -> NDArray[Any]:
        """A copy of its own, as `Array.numpy` gives. Raises what that raises."""
        view = self.__dict__["_view"]
        if view is not None and self.stype == NUMPY:
            if self.__dict__["_header"] is not None:
                return np.frombuffer(view, self.dtype).reshape(self.shape).copy()
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


def array_of(array: NDArray[Any]) -> Array:
    """`Array(array)`, in a third of the time. Of a large one the numbers stay where they are, and nobody may write to
    them from then on; they are copied only where they do not lie in rows."""
    name, header = npy_header(array.dtype, array.shape)
    if array.nbytes < MAPPED_BYTES:
        return Array(name, array.shape, NUMPY, header + array.tobytes())
    numbers = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return MappedArray(name, array.shape, NUMPY, numbers.data.toreadonly(), header)


@functools.lru_cache(maxsize=4096)
def npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> tuple[str, bytes]:
    """The dtype's name, and the header of a .npy file of such an array, in rows."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    return str(dtype), header.getvalue()


def buffers_of(array: Array) -> tuple[bytes | memoryview, ...]:
    """What the bytes of an array are the concatenation of, without a copy."""
    return array.buffers if isinstance(array, MappedArray) else (array.data,)


def buffer_of(array: Array) -> bytes | memoryview:
    """The bytes of an array, without a copy where they lie together."""
    found = buffers_of(array)
    return found[0] if len(found) == 1 else array.data


def size_of(array: Array) -> int:
    """How many bytes an array has, without asking for them."""
    return sum(map(len, buffers_of(array)))
