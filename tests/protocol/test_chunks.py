"""Chunks written and read by hand are what protobuf writes and reads."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.chunks import pack_chunk, pack_store_chunk, unpack_chunk, unpack_store_chunk
from fedpace.protocol.limits import CHUNK_BYTES
from tests.generators import law

contents = st.binary(max_size=300) | st.sampled_from([0, 127, 128, 16_383, 16_384, CHUNK_BYTES]).map(bytes)


@law
@given(contents)
def test_what_is_packed_is_what_protobuf_reads_and_the_reverse(data: bytes) -> None:
    assert pb.Chunk.FromString(pack_chunk(data)) == pb.Chunk(data=data)
    assert pb.StoreChunk.FromString(pack_store_chunk(memoryview(data))) == pb.StoreChunk(data=data)
    assert unpack_chunk(pb.Chunk(data=data).SerializeToString()) == data
    assert unpack_chunk(pack_chunk(data)) == data
    if data:
        assert unpack_store_chunk(pb.StoreChunk(data=data).SerializeToString()) == data


@law
@given(st.integers(0, 1 << 63), st.binary(max_size=40), st.integers(0, 1 << 63), st.binary(max_size=40))
def test_a_store_chunk_with_more_than_data_stays_one(task: int, name: bytes, size: int, data: bytes) -> None:
    message = pb.StoreChunk(task_id=task, name=name, size=size, data=data)
    found = unpack_store_chunk(pack_store_chunk(message))
    assert found == (message if isinstance(found, pb.StoreChunk) else data)
    assert isinstance(found, pb.StoreChunk) or message == pb.StoreChunk(data=data)


@law
@given(st.binary(max_size=40) | st.binary(max_size=20).map(lambda tail: b"\x0a" + tail))
def test_noise_is_read_as_protobuf_reads_it(raw: bytes) -> None:
    try:
        expected = pb.Chunk.FromString(raw).data
    except DecodeError:
        with pytest.raises(DecodeError):
            unpack_chunk(raw)
    else:
        assert unpack_chunk(raw) == expected
