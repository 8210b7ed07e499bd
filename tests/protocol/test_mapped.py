"""A mapped array is an Array to whoever looks, and copies only when it must."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from fedpace.protocol.mapped import MAPPED_BYTES, MappedArray, array_of, buffer_of, buffers_of, make_array, size_of


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def mapped(array: np.ndarray) -> tuple[MappedArray, Array]:
    """The same array, mapped and not."""
    data = npy(array)
    fields = (str(array.dtype), array.shape, "numpy.ndarray")
    return MappedArray(*fields, memoryview(data)), Array(*fields, data)


@pytest.mark.parametrize("order", ["C", "F"])
def test_it_is_the_array_it_stands_for(order: str) -> None:
    numbers = np.asarray(np.arange(12.0).reshape(3, 4), order=order)  # type: ignore[call-overload]
    lazy, plain = mapped(numbers)
    found = lazy.numpy()
    np.testing.assert_array_equal(found, plain.numpy())
    assert found.flags.f_contiguous == plain.numpy().flags.f_contiguous
    found += 1.0  # a copy of its own, that may be written to
    np.testing.assert_array_equal(lazy.numpy(), numbers)
    assert isinstance(buffer_of(lazy), memoryview)
    assert lazy == plain and plain == lazy and lazy != mapped(numbers + 1)[0]
    assert lazy.data == plain.data and buffer_of(lazy) == plain.data
    assert lazy.object_id == plain.object_id


def test_it_can_be_copied_pickled_and_put_into_records() -> None:
    lazy, plain = mapped(np.arange(5))
    for twin in (copy.deepcopy(lazy), copy.copy(lazy), pickle.loads(pickle.dumps(lazy)), ArrayRecord({"a": lazy})["a"]):
        assert twin == plain


def test_new_bytes_replace_the_view() -> None:
    lazy, _ = mapped(np.arange(5))
    other = npy(np.arange(7))
    lazy.data = other
    assert buffer_of(lazy) == other and lazy.numpy().shape == (7,)


def test_what_is_no_numpy_array_fails_as_an_array_does() -> None:
    foreign = MappedArray("float32", (2,), "mine", memoryview(b"12345678"))
    with pytest.raises(TypeError, match="Unsupported serialization type"):
        foreign.numpy()
    broken = MappedArray("float32", (2,), "numpy.ndarray", memoryview(b"12345678"))
    with pytest.raises(ValueError, match="pickled"):
        broken.numpy()
    assert not hasattr(broken, "nothing")


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.float32, ">f8", np.bool_])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_a_twin_of_an_array_is_that_array_and_changes_by_itself(shape: tuple[int, ...], dtype: str, order: str) -> None:
    numbers = np.asarray(np.ones(shape, dtype), order=order)  # type: ignore[call-overload]
    plain = Array(str(numbers.dtype), numbers.shape, "numpy.ndarray", npy(numbers))
    first = MappedArray.of(plain)
    twin = first.twin()
    found = twin.numpy()
    np.testing.assert_array_equal(found, numbers)
    assert (found.dtype, found.flags.f_contiguous) == (plain.numpy().dtype, plain.numpy().flags.f_contiguous)
    found[...] = 0
    np.testing.assert_array_equal(twin.numpy(), numbers)
    assert twin == plain and twin.data == plain.data
    twin.data = npy(np.zeros(9))
    assert twin.numpy().shape == (9,) and first == plain


def test_what_numpy_does_not_know_is_mapped_as_it_is() -> None:
    data = npy(np.ones(3, np.float32))
    for plain in (
        Array("bfloat16", (3,), "numpy.ndarray", data),
        Array("", (), "mine", data),
        Array("float64", (3,), "numpy.ndarray", data),
    ):
        assert MappedArray.of(plain).data == data and MappedArray.of(plain) == plain
    assert MappedArray.of(Array("float64", (3,), "numpy.ndarray", data)).numpy().dtype == np.float32
    pairs = np.zeros(2, [("a", "<f4"), ("b", "<i8")])
    assert MappedArray.of(Array(str(pairs.dtype), (2,), "numpy.ndarray", npy(pairs))).numpy().dtype == pairs.dtype


def test_only_large_arrays_are_mapped() -> None:
    small, large = memoryview(bytes(MAPPED_BYTES - 1)), memoryview(bytes(MAPPED_BYTES))
    assert type(make_array("uint8", (1,), "mine", small)) is Array
    assert type(make_array("uint8", (1,), "mine", large)) is MappedArray


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int64, np.bool_, ">f4"])
@pytest.mark.parametrize("side", [3, 1500])
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_of_numbers_is_flower_s(dtype: str, side: int, order: str) -> None:
    """Small ones are copied; of large ones the numbers stay where they are, if they lie in rows."""
    numbers = np.asarray(np.arange(side * side).reshape(side, side) % 100, dtype, order=order)  # type: ignore[call-overload]
    found, plain = array_of(numbers), Array(np.ascontiguousarray(numbers))
    assert (found.dtype, found.shape, found.stype) == (plain.dtype, plain.shape, plain.stype)
    np.testing.assert_array_equal(found.numpy(), numbers, strict=True)
    assert b"".join(buffers_of(found)) == plain.data and size_of(found) == len(plain.data)
    assert "data" not in vars(found) or side == 3
    for twin in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert twin == plain
    assert buffer_of(found) == plain.data and found == plain and found.object_id == plain.object_id
    if side > 3:
        held = np.shares_memory(numbers, np.frombuffer(buffers_of(found)[-1], np.uint8))
        assert held is (order == "C")
        own = found.numpy()
        own[:] = 0
        np.testing.assert_array_equal(found.numpy(), numbers)
