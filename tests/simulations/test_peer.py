"""Messages between the pool and its workers: whole, in order, with the memory that they speak of."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterator

import pytest
from flwr.app import RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedpace.protocol import fleet_pb2 as pb
from fedpace.simulations.executors.hired import Hired, Job
from fedpace.simulations.executors.peer import Peer
from fedpace.simulations.executors.segments import Arena
from fedpace.simulations.work import Computation, Content

Ends = tuple[Peer, Peer, Arena]


@pytest.fixture
def ends() -> Iterator[Ends]:
    """Two ends of a socket, and where what the first one sends lies."""
    one, other = socket.socketpair()
    arena, theirs = Arena(), Arena(1 << 63)
    peers = Peer(one, arena), Peer(other, theirs)
    yield *peers, arena
    for peer in peers:
        peer.close()
    arena.close()
    theirs.close()


@given(st.lists(st.tuples(st.binary(max_size=12_000), st.booleans()), min_size=1, max_size=12))
def test_what_is_written_arrives_in_order_however_it_is_flushed(messages: list[tuple[bytes, bool]]) -> None:
    one, other = socket.socketpair()
    sender, receiver = Peer(one, Arena()), Peer(other, Arena(1 << 63))
    for number, (data, flushed) in enumerate(messages):
        sender.write((bytes([number]), data[:10_000], b"end"))
        if flushed:
            sender.flush()
            found = receiver.receive()
            while receiver.has_more:
                found = receiver.receive()
            assert found == (bytes([number]), data[:10_000], b"end")
    sender.flush()
    sender.close()
    left = []
    while (parts := receiver.receive()) is not None:
        left.append(parts[0][0])
    assert left == list(range(len(messages) - len(left), len(messages)))
    receiver.close()


def test_messages_of_one_flush_bring_the_memory_that_each_speaks_of(ends: Ends) -> None:
    sender, receiver, arena = ends
    blobs = [arena.put([bytes([number]) * 3_000_000]) for number in range(5)]
    for blob in blobs:
        sender.write((blob.name, b"", b""), [blob])
    sender.flush()
    for number, blob in enumerate(blobs):
        parts = receiver.receive()
        assert parts is not None
        assert parts[0] == blob.name
        assert bytes(receiver.mapped.get(blob)[:2]) == bytes([number]) * 2


def test_an_end_that_is_closed_is_gone_once_all_is_read(ends: Ends) -> None:
    sender, receiver, _ = ends
    sender.write((b"1", b"", b""))
    sender.write((b"2", b"", b""))
    sender.flush()
    sender.close()
    assert receiver.receive() == (b"1", b"", b"")
    assert receiver.has_more
    assert receiver.receive() == (b"2", b"", b"")
    assert receiver.receive() is None


def test_a_worker_that_has_died_has_all_jobs_that_it_was_given(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or those after the first that cannot be written would be nobody's."""
    sender, _, _ = ends

    def broken(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(sender, "write", broken)
    worker = Hired.__new__(Hired)
    worker.jobs, worker.peer = deque(), sender
    content = Content(RecordDict())
    computations = [Computation(n, n, n, "train", content, "config", {}, "", 0.0, 1.0, 0) for n in range(3)]
    worker.give([Job(n, each, pb.Offer(), pb.Payload()) for n, each in enumerate(computations)])
    assert [job.index for job in worker.jobs] == [0, 1, 2]
