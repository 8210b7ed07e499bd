"""Lines of an app go out in small bundles, within a limit, and wait while there is no connection."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from fedpace.clients import logs
from fedpace.clients.logs import LogBuffer
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.limits import MESSAGE_BYTES
from tests.generators import law


@law
@given(st.lists(st.integers(0, 300), max_size=5), st.lists(st.booleans(), min_size=5, max_size=5))
def test_every_line_is_sent_or_counted_once(bursts: list[int], connected: list[bool]) -> None:
    sent: list[pb.Log] = []
    up = True

    def send(entry: pb.Log) -> bool:
        if up:
            sent.append(entry)
        return up

    buffer = LogBuffer(send)
    said: list[str] = []
    for burst, now in zip(bursts, connected, strict=False):
        up = now
        for _ in range(burst):
            said.append(f"line {len(said)}")
            buffer.add(7, said[-1])
        buffer.flush()
    up = True
    buffer.flush()
    assert sum(len(entry.lines) + entry.dropped for entry in sent) == len(said)
    lines = [line for entry in sent for line in entry.lines]
    assert lines == [line for line in said if line in set(lines)], "in order"
    assert all(1 <= len(entry.lines) <= 200 and entry.task_id == 7 for entry in sent)
    if all(connected[: len(bursts)]):
        assert [len(entry.lines) for entry in sent] == [min(burst, 200) for burst in bursts if burst]


def test_nothing_is_sent_where_nothing_was_said() -> None:
    def send(entry: pb.Log) -> bool:
        raise AssertionError("nothing to send")

    LogBuffer(send).flush()


def test_the_largest_bundle_fits_into_a_message() -> None:
    sent: list[pb.Log] = []
    buffer = LogBuffer(lambda entry: not sent.append(entry))  # type: ignore[func-returns-value]
    for _ in range(300):
        buffer.add(1 << 63, "\U0001f600" * 10_000)
    buffer.flush()
    [entry] = sent
    assert entry.dropped == 100 and pb.DeviceMessage(log=entry).ByteSize() < MESSAGE_BYTES


def test_lines_are_sent_by_themselves_and_the_rest_at_the_end() -> None:
    async def talk() -> list[list[str]]:
        sent: list[list[str]] = []
        arrived = asyncio.Event()

        def send(entry: pb.Log) -> bool:
            sent.append(list(entry.lines))
            arrived.set()
            return True

        buffer = LogBuffer(send)
        buffer.start()
        buffer.add(1, "a")
        buffer.add(1, "b")
        await asyncio.wait_for(arrived.wait(), 10)
        buffer.add(1, "c")
        buffer.stop()
        return sent

    assert logs._FLUSH_SECONDS <= 0.2
    assert asyncio.run(talk()) == [["a", "b"], ["c"]]
