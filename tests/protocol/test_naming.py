"""The names of blobs: what they are made of, and that it does not matter in what portions the bytes come."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpace.protocol.naming import PIECE_BYTES, BlobHash, digest, name_of, pieces_of
from tests.generators import law

SIZES = st.sampled_from([0, 1, 1000, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 2 * PIECE_BYTES, 2_500_000])
CUTS = st.lists(st.integers(0, 2_500_000), max_size=6)


def content(size: int) -> bytes:
    return bytes(range(251)) * (size // 251) + bytes(size % 251)


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def portions(data: bytes, cuts: list[int]) -> list[bytes]:
    ends = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [data[start:end] for start, end in pairwise(ends)]


@pytest.mark.parametrize(
    ("data", "pieces"),
    [
        (b"", []),
        (b"abc", [b"abc"]),
        (content(PIECE_BYTES), [content(PIECE_BYTES)]),
        (b"a" * 1_048_576 + b"b" * 1_048_576 + b"c", [b"a" * 1_048_576, b"b" * 1_048_576, b"c"]),
    ],
)
def test_a_name_is_the_hash_of_the_size_and_the_hashes_of_the_pieces(data: bytes, pieces: list[bytes]) -> None:
    assert digest([data]) == sha256(len(data).to_bytes(8, "little") + b"".join(map(sha256, pieces)))


@law
@given(SIZES, CUTS)
def test_a_name_does_not_depend_on_the_portions(size: int, cuts: list[int]) -> None:
    data = content(size)
    buffers = portions(data, cuts)
    found = BlobHash()
    for buffer in buffers:
        found.update(buffer)
        found.digest()  # looking at it changes nothing
    pieces = [b"".join(piece) for piece in pieces_of(buffers)]
    assert b"".join(pieces) == data and all(len(piece) == PIECE_BYTES for piece in pieces[:-1])
    assert found.digest() == digest(buffers) == digest([data]) == name_of(size, map(sha256, pieces))


@law
@given(SIZES, st.integers(0, 2_500_000))
def test_one_byte_more_or_another_is_another_name(size: int, where: int) -> None:
    data = content(size)
    assert digest([data]) != digest([data, b"\0"])
    if size:
        changed = bytearray(data)
        changed[where % size] ^= 1
        assert digest([bytes(changed)]) != digest([data])


def test_bytes_that_look_like_the_hashes_of_others_have_another_name() -> None:
    data = content(2 * PIECE_BYTES)
    listed = len(data).to_bytes(8, "little") + sha256(data[:PIECE_BYTES]) + sha256(data[PIECE_BYTES:])
    assert len({digest([data]), digest([listed]), digest([listed[8:]])}) == 3
