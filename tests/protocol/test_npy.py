"""A .npy file is seen where it lies exactly where numpy would load it, and nothing of it is ever executed."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpace.errors import PayloadError
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.check import check_array, npy_array
from tests.generators import law, ndarrays, npy, outcome


@law
@given(ndarrays())
def test_an_array_is_seen_as_numpy_loads_it(array: np.ndarray[Any, Any]) -> None:
    data = npy(array)
    found, loaded = npy_array(memoryview(data)), np.load(io.BytesIO(data), allow_pickle=False)
    assert (found.dtype, found.shape, found.flags.f_contiguous) == (
        loaded.dtype,
        loaded.shape,
        loaded.flags.f_contiguous,
    )
    assert found.tobytes() == loaded.tobytes()
    assert not found.flags.writeable


def header(text: str, version: tuple[int, int] = (1, 0), data: bytes = b"") -> bytes:
    raw = text.encode("utf-8")
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version == (1, 0) else "<I", len(raw)) + raw + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        b"PK\x03\x04" + bytes(200),
        b"\x80\x04K\x01.",
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -1)}", data=bytes(4)),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}", data=bytes(4)),
        header("{'descr': '|V0', 'fortran_order': False, 'shape': (-1,)}", data=bytes(4)),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (9223372036854775808, 0)}"),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904, 4, 0)}"),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (3,", data=bytes(12)),
        header("{'descr': '<f4', 'fortran_order': 0, 'shape': (3,)}", data=bytes(12)),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': [3]}", data=bytes(12)),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': 3}", data=bytes(12)),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (3,), 'more': 1}", data=bytes(12)),
        header("{'descr': '<f4', 'fortran_order': False}", data=bytes(4)),
        header("['descr', 'fortran_order', 'shape']", data=bytes(4)),
        header("{'descr': ('<f4', (2,)), 'fortran_order': False, 'shape': (3,)}", data=bytes(24)),
        header("{'descr': 'no such', 'fortran_order': False, 'shape': (3,)}", data=bytes(12)),
        header("{'descr': [('a',)], 'fortran_order': False, 'shape': (3,)}", data=bytes(12)),
        header("{'descr': '<U999999999999', 'fortran_order': False, 'shape': (0,)}"),
        header("(" * 5000),
        header("-" * 9000 + "1"),
        header("x", (7, 3)),
        header(" " * 20_000 + "{'descr': '<f4', 'fortran_order': False, 'shape': ()}", data=bytes(4)),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1," * 70 + ")}", data=bytes(4)),
        b"\x93NUMPY\x02\x00" + b"\xff" * 4 + bytes(100),
    ],
)
def test_a_file_that_numpy_would_not_load_is_refused(data: bytes) -> None:
    with pytest.raises(PayloadError, match=r"\.npy|does not take"):
        npy_array(memoryview(data))
    with pytest.raises(PayloadError):
        check_array(pb.ArrayEntry(dtype="float32", shape=[3]), memoryview(data), None, finite=True)


@law
@given(
    st.sampled_from(
        ["'<f4'", "'<f8'", "'|b1'", "'<U0'", "'|V0'", "'<c8'", "'|O'", "[('a', '<f4')]", "'<m8[s]'", "None"]
    ),
    st.sampled_from(["False", "True", "0", "None"]),
    st.lists(st.integers(-2, 3), max_size=3).map(tuple),
    st.sampled_from([(1, 0), (2, 0), (3, 0), (4, 0)]),
    st.binary(max_size=40),
)
def test_an_array_that_is_seen_is_one_that_numpy_loads(
    descr: str, fortran: str, shape: tuple[int, ...], version: tuple[int, int], data: bytes
) -> None:
    text = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}}}"
    file = header(text, version, data)
    found = outcome(npy_array, memoryview(file))
    if not isinstance(found, str):
        loaded = np.load(io.BytesIO(file), allow_pickle=False)
        assert (found.dtype, found.shape, found.tobytes()) == (loaded.dtype, loaded.shape, loaded.tobytes())
