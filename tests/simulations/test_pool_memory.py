from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedpace.simulations.executors.peer import Peer
from fedpace.simulations.executors.segments import SEGMENT_BYTES, Arena, place


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(7)
    yield arena
    arena.close()


@pytest.fixture
def peers(arena: Arena) -> Iterator[tuple[Peer, Peer]]:
    ours, theirs = (Peer(end, arena) for end in socket.socketpair())
    yield ours, theirs
    ours.close()
    theirs.close()


def test_what_was_written_is_read_aligned_and_never_written_over(arena: Arena) -> None:
    blobs = [arena.put([bytes([n]) * n, b"", bytes([n])]) for n in range(1, 50)]
    assert all(bytes(arena.get(blob)) == bytes([n]) * (n + 1) for n, blob in enumerate(blobs, 1))
    assert all(place(blob)[0] == 7 and place(blob)[1] % 64 == 0 for blob in blobs)
    assert len({place(blob) for blob in blobs}) == len(blobs)
    assert arena.get(blobs[0]).readonly
    arena.release(blobs)
    assert place(arena.put([b"x"])) not in {place(blob) for blob in blobs}
    assert bytes(arena.get(arena.put([]))) == b""


def test_a_segment_is_given_up_when_nobody_asks_for_anything_in_it(arena: Arena) -> None:
    small, large = arena.put([b"x"]), arena.put([bytes(SEGMENT_BYTES + 1)])
    half = [arena.put([bytes(SEGMENT_BYTES // 2)]) for _ in range(2)]
    assert set(arena.live) == {7, 8, 9} and [place(blob)[0] for blob in (small, large, *half)] == [7, 8, 7, 9]
    view = arena.get(large)
    arena.release([large])
    arena.release(half[:1])
    assert set(arena.live) == {7, 9}, "something in 7 is still asked for"
    arena.release([small, half[1]])
    assert set(arena.live) == {9}, "there is still room in 9"
    assert view[SEGMENT_BYTES] == 0, "views stay readable"


def test_segments_travel_with_the_message_that_speaks_of_them(arena: Arena, peers: tuple[Peer, Peer]) -> None:
    ours, theirs = peers
    blobs = [arena.put([bytes([n % 256]) * (1 << 16)]) for n in range(600)]
    descriptors = len(list(Path("/dev/fd").iterdir()))
    for _ in range(2):
        ours.send((b"", b"b" * 1000, b"c"), blobs)
        assert theirs.receive() == (b"", b"b" * 1000, b"c")
        assert all(theirs.mapped.get(blob) == bytes([n % 256]) * (1 << 16) for n, blob in enumerate(blobs))
    assert len(list(Path("/dev/fd").iterdir())) == descriptors + 3, "each of three segments was mapped once"
    kept = theirs.mapped.get(blobs[1])
    arena.release(blobs)
    ours.send((b"a", b"", b""))
    assert theirs.receive() == (b"a", b"", b"")
    with pytest.raises(KeyError):
        theirs.mapped.get(blobs[0])
    assert kept[0] == 1


def test_more_segments_than_fit_into_one_message(
    arena: Arena, peers: tuple[Peer, Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedpace.simulations.executors.segments.SEGMENT_BYTES", 64)
    ours, theirs = peers
    blobs = [arena.put([b"%64d" % n]) for n in range(260)]
    assert len(arena.live) == 260
    ours.send((b"a", b"", b""), blobs)
    assert theirs.receive() == (b"a", b"", b"")
    assert [bytes(theirs.mapped.get(blob)) for blob in blobs] == [b"%64d" % n for n in range(260)]


@pytest.mark.parametrize("cut", [0, 3, 20, 25])
def test_an_end_that_is_closed_in_mid_message_is_gone(arena: Arena, cut: int) -> None:
    ours, theirs = socket.socketpair()
    seen, between = socket.socketpair()
    Peer(ours, arena).send((b"one", b"two", b"three"))
    between.sendall(theirs.recv(1000)[:cut])
    between.close()
    peer = Peer(seen, arena)
    assert peer.receive() is None and peer.receive() is None
    for end in (ours, theirs, seen):
        end.close()
