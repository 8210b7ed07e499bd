"""Flower's arrays, made from numpy's in a fraction of the time: of a small array, writing the header takes the longest."""

from __future__ import annotations

from typing import Any

import numpy as np
from flwr.app import Array
from numpy.typing import NDArray

from fedpace.protocol.check import NUMPY
from fedpace.protocol.mapped import NUMBER_KINDS, npy_header

_flowers = Array.from_numpy_ndarray


def write_quickly() -> None:
    """Lets every `Array` that this process makes from numpy's or torch's arrays be made by `from_numpy_ndarray` below; for
    processes that run devices and nothing else."""
    Array.from_numpy_ndarray = staticmethod(from_numpy_ndarray)  # type: ignore[method-assign]


def from_numpy_ndarray(ndarray: NDArray[Any]) -> Array:
    """`Array.from_numpy_ndarray`: the same array, to the byte."""
    if type(ndarray) is not np.ndarray or ndarray.dtype.kind not in NUMBER_KINDS or not ndarray.flags.c_contiguous:
        return _flowers(ndarray)
    name, header = npy_header(ndarray.dtype, ndarray.shape)
    array = Array.__new__(Array)  # its fields are known to be right
    array.__dict__.update(_is_dirty=True, dtype=name, shape=ndarray.shape, stype=NUMPY, data=header + ndarray.tobytes())
    return array
