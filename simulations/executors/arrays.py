"""Flower's arrays, made from numpy's in a fraction of the time: of a small array, writing the header takes the longest."""

from __future__ import annotations

import functools
import io
from typing import Any

import numpy as np
from flwr.app import Array
from numpy.lib import format as npy
from numpy.typing import NDArray

from fedpace.protocol.check import NUMPY

_flowers = Array.from_numpy_ndarray
_KINDS = frozenset("biufc")


def write_quickly() -> None:
    """Lets every `Array` that this process makes from numpy's or torch's arrays be made by `from_numpy_ndarray` below; for
    processes that run devices and nothing else."""
    Array.from_numpy_ndarray = staticmethod(from_numpy_ndarray)  # type: ignore[method-assign]


def from_numpy_ndarray(ndarray: NDArray[Any]) -> Array:
    """`Array.from_numpy_ndarray`: the same array, to the byte."""
    if type(ndarray) is not np.ndarray or ndarray.dtype.kind not in _KINDS or not ndarray.flags.c_contiguous:
        return _flowers(ndarray)
    name, header = _header(ndarray.dtype, ndarray.shape)
    array = Array.__new__(Array)  # its fields are known to be right
    array.__dict__.update(_is_dirty=True, dtype=name, shape=ndarray.shape, stype=NUMPY, data=header + ndarray.tobytes())
    return array


@functools.lru_cache(maxsize=4096)
def _header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> tuple[str, bytes]:
    """The dtype's name, and the header of a .npy file of such an array, in rows."""
    header = io.BytesIO()
    npy.write_array_header_1_0(header, {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})
    return str(dtype), header.getvalue()
