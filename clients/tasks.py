"""The tasks a device has in hand: taken, computed by a worker, brought home.

A task in hand outlives the connection: it goes on running while the agent reconnects, and its reply waits, on disk,
until the server has said what became of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from fedpace.clients.memory import DeviceMemory
from fedpace.clients.slot import Slot
from fedpace.clients.transfer import fetch, store
from fedpace.errors import PayloadError, RefusedError
from fedpace.hosting.settings import DeviceSettings
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.blobs import SmallBlobs, digest
from fedpace.protocol.chunks import FleetClient
from fedpace.protocol.failures import Code, failed_result
from fedpace.protocol.limits import INLINE_BYTES, MEASURED_BYTES, MESSAGE_BYTES
from fedpace.protocol.payloads import all_blobs

log = logging.getLogger("fedpace.client")


class Connection:
    """One stream to the server, while it lasts."""

    def __init__(self, client: FleetClient, metadata: list[tuple[str, str]], run: pb.Run) -> None:
        self.client = client
        self.metadata = metadata
        self.run = run
        self.outbox: asyncio.Queue[pb.DeviceMessage | None] = asyncio.Queue()
        self.measured_upload = False

    def send(self, message: pb.DeviceMessage) -> None:
        self.outbox.put_nowait(message)

    def end(self) -> None:
        """Nothing more will be said; the server ends the stream, and the agent connects anew."""
        self.outbox.put_nowait(None)

    async def outgoing(self) -> AsyncIterator[pb.DeviceMessage]:
        while (message := await self.outbox.get()) is not None:
            yield message


@dataclass
class Hand:
    """A task in hand: running while `result` is None, then waiting for its fate."""

    task_id: int
    result: pb.Result | None = None
    work: asyncio.Task[None] | None = None
    slot: Slot | None = None
    blobs: set[bytes] = field(default_factory=set)
    stage: str = "waiting"
    since: float = field(default_factory=time.monotonic)

    def enter(self, stage: str) -> None:
        self.stage, self.since = stage, time.monotonic()

    def progress(self) -> pb.Progress:
        return pb.Progress(task_id=self.task_id, stage=self.stage, seconds=time.monotonic() - self.since)


class Tasks:
    """All tasks in hand, and the slots that work on them; none is taken any more once `stopping` is set.

    `connection` is the one there is. `before_result` is called before a result goes home.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        settings: DeviceSettings,
        memory: DeviceMemory,
        stopping: asyncio.Event,
        before_result: Callable[[], None],
    ) -> None:
        self.connection: Connection | None = None
        self._slots = slots
        self._settings = settings
        self._memory = memory
        self._stopping = stopping
        self._before_result = before_result
        self._small = SmallBlobs()
        self._hands: dict[int, Hand] = {}
        self._free: asyncio.Queue[Slot] = asyncio.Queue()
        self._settled = asyncio.Event()

    def __len__(self) -> int:
        return len(self._hands)

    @property
    def ids(self) -> list[int]:
        return list(self._hands)

    def progress(self) -> list[pb.Progress]:
        return [hand.progress() for hand in self._hands.values()]

    async def start(self) -> None:
        """Starts the workers. Raises AppError where the app cannot be loaded."""
        await asyncio.gather(*(slot.start() for slot in self._slots))
        for slot in self._slots:
            self._free.put_nowait(slot)

    async def close(self) -> None:
        """Ends all work, and the workers."""
        for hand in self._hands.values():
            if hand.work is not None:
                hand.work.cancel()
        await asyncio.gather(*(slot.close() for slot in self._slots))

    def recall(self) -> int:
        """Takes replies in hand that an earlier process of this device may not have brought home. Returns their run."""
        run_id = 0
        for record in self._memory.last_run():
            if record.HasField("reply"):
                run_id = record.run_id
                self._hands[record.reply.task_id] = Hand(record.reply.task_id, record.reply)
        self._memory.empty_outbox(self._hands)
        return run_id

    def connected(self, connection: Connection) -> None:
        """Replies that wait go home."""
        self.connection = connection
        for hand in list(self._hands.values()):
            if hand.result is not None:
                hand.work = asyncio.create_task(self._deliver(hand, hand.result))

    async def all_settled(self, seconds: float) -> None:
        """Waits until nothing is in hand, or so long."""
        if self._hands:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._settled.wait(), seconds)

    # ------------------------------------------------------------ what the server says

    def take(self, offer: pb.Offer, connection: Connection) -> None:
        if offer.task_id in self._hands:
            return
        if self._stopping.is_set():
            leaving = failed_result(offer.task_id, Code.NODE_UNAVAILABLE, "the device is leaving")
            connection.send(pb.DeviceMessage(result=leaving))
            return
        hand = Hand(offer.task_id, blobs={blob.name for blob in all_blobs(offer.payload)})
        self._hands[offer.task_id] = hand
        self._settled.clear()
        connection.send(pb.DeviceMessage(accept=pb.Accept(task_id=offer.task_id)))
        hand.work = asyncio.create_task(self._work(hand, offer, connection))

    def settle(self, receipt: pb.Receipt) -> None:
        if receipt.verdict != pb.ACCEPTED:
            verdict = pb.Verdict.Name(receipt.verdict).lower()
            log.warning("the reply to task %d is %s: %s", receipt.task_id, verdict, receipt.reason)
        self._forget(receipt.task_id)

    def _forget(self, task_id: int) -> None:
        if self._hands.pop(task_id, None) is not None:
            self._memory.settle(task_id)
        if not self._hands:
            self._settled.set()

    def drop(self, task_id: int, reason: str) -> None:
        """Stops a task nobody waits for; its worker goes with it, for user code cannot be interrupted."""
        hand = self._hands.get(task_id)
        if hand is None:
            return
        if hand.slot is not None and hand.result is None:
            log.info("task %d is called off: %s", task_id, reason)
            hand.slot.kill(reason)
        elif hand.work is not None:
            hand.work.cancel()
        self._forget(task_id)

    # ------------------------------------------------------------ work

    def _holds(self, hand: Hand) -> bool:
        """Whether a task is still in hand; another run may have a task of the same number."""
        return self._hands.get(hand.task_id) is hand

    async def _work(self, hand: Hand, offer: pb.Offer, connection: Connection) -> None:
        slot = await self._free.get()
        try:
            result = await self._compute(hand, slot, offer, connection)
            if result is not None and self._holds(hand):
                hand.result = result
                await self._deliver(hand, result)
        except Exception:
            log.exception("task %d could not be worked on; the server may give it out again", hand.task_id)
            self._give_up(hand, connection)
        finally:
            hand.slot = None
            await self._renew(slot)

    def _give_up(self, hand: Hand, connection: Connection) -> None:
        """Forgets a task and connects anew, whereupon the server sees that it is not in hand."""
        if self._holds(hand):
            self._forget(hand.task_id)
        connection.end()

    async def _compute(self, hand: Hand, slot: Slot, offer: pb.Offer, connection: Connection) -> pb.Result | None:
        """Fetches what is missing and runs the task; None where the connection broke, so that it is offered again."""
        hand.enter("fetching")
        try:
            speed = await self._fetch(offer, connection)
        except ConnectionError as error:
            log.warning("the model of task %d has not come whole: %s", offer.task_id, error)
            self._give_up(hand, connection)
            return None
        except (RefusedError, PayloadError, OSError) as error:
            return failed_result(offer.task_id, Code.MESSAGE_UNAVAILABLE, f"the model could not be fetched: {error}")
        if not self._holds(hand):
            return None
        hand.slot = slot
        hand.enter("running")
        result = await slot.run(pb.WorkerTask(run=connection.run, offer=offer))
        result.download_bytes_per_second = speed
        return result

    async def _renew(self, slot: Slot) -> None:
        try:
            if not self._stopping.is_set():
                await slot.renew()
        except Exception as error:  # noqa: BLE001 - the next task of this slot will say what is wrong
            log.error("a worker could not be replaced: %s", error)
        self._free.put_nowait(slot)

    async def _fetch(self, offer: pb.Offer, connection: Connection) -> float:
        """Makes sure every blob of an offer is here: small ones in the offer itself, large ones on disk.

        Returns the speed of the last transfer in bytes a second, 0 where there was none.
        """
        speed = 0.0
        for blob in all_blobs(offer.payload):
            if blob.HasField("data"):
                if digest([blob.data]) != blob.name:
                    raise PayloadError("a blob that came with the offer is not the bytes its name says")
                self._small.add(blob.name, blob.data)
            elif (data := self._small.get(blob.name)) is not None:
                blob.data = data
            elif not self._memory.blobs.has(blob):
                speed = await self._fetch_one(offer, connection, blob)
        return speed

    async def _fetch_one(self, offer: pb.Offer, connection: Connection, blob: pb.Blob) -> float:
        if blob.size > INLINE_BYTES:
            used = {name for hand in self._hands.values() for name in hand.blobs}
            self._memory.trim_blobs(max(0, self._settings.cache_bytes - blob.size), used)
        speed = await fetch(connection.client, connection.metadata, offer.task_id, blob, self._memory.blobs)
        if blob.size <= INLINE_BYTES:
            data = bytes(self._memory.blobs.get(blob))
            self._memory.blobs.remove(blob.name)
            self._small.add(blob.name, data)
            blob.data = data
        return speed

    async def _deliver(self, hand: Hand, result: pb.Result) -> None:
        """Brings a result home over the connection there is. Where that breaks, the next one does it again."""
        connection = self.connection
        if connection is None:
            return
        hand.enter("delivering")
        outgoing = pb.Result()
        outgoing.CopyFrom(result)
        try:
            outgoing.upload_bytes_per_second = await self._store_large(outgoing, connection)
        except ConnectionError as error:
            log.warning("the reply to task %d is not home yet: %s", hand.task_id, error)
            connection.end()
            return
        except (RefusedError, PayloadError, OSError) as error:
            log.warning("the reply to task %d cannot be sent: %s", hand.task_id, error)
            outgoing = failed_result(hand.task_id, Code.REPLY_MESSAGE_UNAVAILABLE, f"the reply cannot be sent: {error}")
        self._before_result()  # what the app said about it comes first
        connection.send(pb.DeviceMessage(result=outgoing))

    async def _store_large(self, result: pb.Result, connection: Connection) -> float:
        """Stores the blobs that do not ride along in the result. Returns the last transfer's bytes a second, or 0."""
        speed, room = 0.0, MESSAGE_BYTES // 2
        for blob in all_blobs(result.payload):
            measure = blob.size >= MEASURED_BYTES and not connection.measured_upload
            if blob.HasField("data") and blob.size <= room and not measure:
                room -= blob.size
                continue
            connection.measured_upload = True
            folder = self._memory.outbox(result.task_id)
            speed = await store(connection.client, connection.metadata, result.task_id, blob, folder)
            blob.ClearField("data")
        return speed
