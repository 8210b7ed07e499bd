"""Frames over a socket pair: both ends, messages in pieces, ends in the middle of one, and a peer that is broken."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpace.errors import PayloadError
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol import frames
from fedpace.protocol.frames import LIMIT_BYTES, FrameSocket, frame
from tests.generators import law

Pair = tuple[FrameSocket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield FrameSocket(ours), theirs


def note(size: int = 3) -> pb.WorkerReply:
    return pb.WorkerReply(loaded=pb.Loaded(error="x" * size))


async def received(data: bytes, pieces: list[int]) -> list[pb.WorkerReply]:
    """Everything the asyncio end reads of some bytes that come in pieces and then end."""
    reader = asyncio.StreamReader()
    feeder = asyncio.create_task(_feed(reader, data, pieces))
    found = []
    while (message := await frames.receive(reader, pb.WorkerReply)) is not None:
        found.append(message)
    await feeder
    return found


async def _feed(reader: asyncio.StreamReader, data: bytes, pieces: list[int]) -> None:
    ends = sorted({min(at, len(data)) for at in pieces} | {len(data)})
    start = 0
    for end in ends:
        reader.feed_data(data[start:end])
        start = end
        await asyncio.sleep(0)
    reader.feed_eof()


@law
@given(st.lists(st.integers(0, 300), max_size=5), st.lists(st.integers(0, 1500), max_size=6))
def test_messages_arrive_in_order_however_they_are_cut(sizes: list[int], pieces: list[int]) -> None:
    sent = [note(size) for size in sizes]
    assert asyncio.run(received(b"".join(map(frame, sent)), pieces)) == sent


@law
@given(st.lists(st.integers(0, 300), max_size=4), st.integers(0, 1500))
def test_both_ends_read_what_is_whole_and_then_the_end(sizes: list[int], cut: int) -> None:
    data = b"".join(frame(note(size)) for size in sizes)[:cut]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        end = FrameSocket(ours)
        blocking = []
        while (message := end.receive(pb.WorkerReply)) is not None:
            blocking.append(message)
    whole, rest = [], len(data)
    for size in sizes:
        rest -= len(frame(note(size)))
        if rest < 0:
            break
        whole.append(note(size))
    assert blocking == whole == asyncio.run(received(data, [cut // 2]))


def test_a_large_message_goes_through_while_the_other_end_reads(pair: Pair) -> None:
    ours, theirs = pair
    message = note(5 << 20)
    sender = threading.Thread(target=FrameSocket(theirs).send, args=(message,))
    sender.start()
    assert ours.receive(pb.WorkerReply) == message
    sender.join(timeout=10)
    assert not sender.is_alive()


def test_threads_that_send_at_once_do_not_mix(pair: Pair) -> None:
    ours, theirs = pair
    end = FrameSocket(theirs)

    def send(size: int) -> None:
        for _ in range(20):
            end.send(note(size))

    large = 1 << 20  # more than the socket takes at once
    senders = [threading.Thread(target=send, args=(size,)) for size in (10, large, large + 1)]
    for sender in senders:
        sender.start()
    found = sorted(len(message.loaded.error) for _ in range(60) if (message := ours.receive(pb.WorkerReply)))
    for sender in senders:
        sender.join(timeout=10)
    assert found == [10] * 20 + [large] * 20 + [large + 1] * 20


def test_sending_to_an_end_that_is_gone_is_an_os_error(pair: Pair) -> None:
    ours, theirs = pair
    theirs.close()
    with pytest.raises(OSError, match="Broken pipe"):
        ours.send(note())


@pytest.mark.parametrize(
    "data",
    [struct.pack("<I", LIMIT_BYTES + 1), struct.pack("<I", 3) + b"\xff\xff\xff", struct.pack("<I", 10) + b"short"],
)
def test_a_broken_peer_counts_as_gone(pair: Pair, data: bytes) -> None:
    """What user code writes to the socket of its process must not end the process that reads it."""
    ours, theirs = pair
    theirs.sendall(data)
    theirs.close()
    assert ours.receive(pb.WorkerReply) is None
    assert asyncio.run(received(data, [])) == []


def test_nobody_waits_for_more_than_a_message_may_have() -> None:
    async def receive() -> object:
        reader = asyncio.StreamReader()
        reader.feed_data(struct.pack("<I", LIMIT_BYTES + 1))
        return await asyncio.wait_for(frames.receive(reader, pb.WorkerReply), 5)

    assert asyncio.run(receive()) is None


def test_a_message_over_the_limit_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "LIMIT_BYTES", 100)
    assert len(frame(note(50))) < 100
    with pytest.raises(PayloadError, match="over the limit of 100"):
        frame(note(101))


def test_who_waits_for_the_end_is_told_and_disturbs_no_message(pair: Pair) -> None:
    ours, theirs = pair
    watcher = threading.Thread(target=ours.wait_gone, daemon=True)
    watcher.start()
    theirs.sendall(frame(note(200_000)))
    assert ours.receive(pb.WorkerReply) == note(200_000)
    theirs.sendall(frame(note()))  # waits there, unread
    watcher.join(0.1)
    assert watcher.is_alive()
    theirs.close()
    watcher.join(20)
    assert not watcher.is_alive()
    assert ours.receive(pb.WorkerReply) == note() and ours.receive(pb.WorkerReply) is None
