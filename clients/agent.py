"""The device's agent: keeps it connected, takes tasks, hands them to workers, and brings replies home.

A task in hand outlives the connection: it goes on running while the agent reconnects, and its reply waits, on disk,
until the server has said what became of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc

from fedpace.certs.probe import explain_failure
from fedpace.clients.connection import DeviceOptions, open_channel
from fedpace.clients.logs import LogBuffer
from fedpace.clients.memory import DeviceMemory
from fedpace.clients.profile import accelerator, read_heartbeat, read_profile
from fedpace.clients.slot import Slot
from fedpace.clients.transfer import fetch, store
from fedpace.errors import PayloadError, RefusedError
from fedpace.hosting.settings import DeviceSettings, read_settings
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.blobs import SmallBlobs, digest
from fedpace.protocol.chunks import FleetClient
from fedpace.protocol.failures import Code, failed_result
from fedpace.protocol.limits import INLINE_BYTES, MEASURED_BYTES, MESSAGE_BYTES, PROTOCOL_VERSION
from fedpace.protocol.payloads import all_blobs
from fedpace.protocol.values import encode_values

log = logging.getLogger("fedpace.client")

_FIRST_ANSWER_SECONDS = 20.0
"""Flower's codes for a message that is not to be had, a reply that is not, and a node that is not."""


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


class Agent:
    """One device. `run` returns when it is told to `stop`."""

    def __init__(self, options: DeviceOptions) -> None:
        self._options = options
        self._settings = read_settings(DeviceSettings, options.app.settings, "device")
        self._memory = DeviceMemory(options.state)
        self._profile = read_profile()
        self._instance = secrets.token_bytes(8)
        self._small = SmallBlobs()
        self._hands: dict[int, Hand] = {}
        self._run_id = 0
        self._connection: Connection | None = None
        self._life: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._logs = LogBuffer(self._send_log)
        count = options.slots or len(self._profile.gpus) or 1
        self._slots = [Slot(self._setup(index), self._settings, self._logs.add) for index in range(count)]
        self._free: asyncio.Queue[Slot] = asyncio.Queue()
        self._settled = asyncio.Event()

    def _setup(self, slot: int) -> pb.Setup:
        options = self._options
        config = {"device": accelerator(self._profile, slot), **options.node_config}
        return pb.Setup(
            app_directory=str(options.app.directory),
            state_directory=str(options.state),
            node_id=options.node_id,
            slot=slot,
            node_config=encode_values(config),
            slowdown=options.slowdown,
        )

    # ------------------------------------------------------------ life

    async def run(self) -> None:
        """Works until stopped. Raises AppError where the app cannot be loaded, RefusedError where the server says so."""
        self._recall()
        self._logs.start()
        self._life = asyncio.create_task(self._live())
        try:
            await asyncio.wait({self._life})
            if not self._life.cancelled():
                self._life.result()
        finally:
            self._stopping.set()
            self._logs.stop()
            for hand in self._hands.values():
                if hand.work is not None:
                    hand.work.cancel()
            await asyncio.gather(*(slot.close() for slot in self._slots))

    async def _live(self) -> None:
        await asyncio.gather(*(slot.start() for slot in self._slots))
        for slot in self._slots:
            self._free.put_nowait(slot)
        log.info("%s is ready: %s, %d slots", self._options.name, self._options.app, len(self._slots))
        await self._stay_connected()

    def stop(self) -> None:
        """Ends gracefully: running tasks may end, replies are brought home. A second call does not wait.

        Without a connection there is nothing to wait for: a reply that is ready stays on disk until the next start.
        """
        if self._life is not None and (self._connection is None or self._stopping.is_set()):
            self._life.cancel()
        self._stopping.set()

    def _recall(self) -> None:
        """Replies of the last run that an earlier process of this device may not have brought home."""
        for record in self._memory.last_run():
            if record.HasField("reply"):
                self._run_id = record.run_id
                self._hands[record.reply.task_id] = Hand(record.reply.task_id, record.reply)
        self._memory.empty_outbox(self._hands)

    async def _stay_connected(self) -> None:
        pause, said = 0.0, ""
        while not self._stopping.is_set():
            try:
                await self._connect()
                pause, said = 0.0, ""
            except (grpc.aio.AioRpcError, TimeoutError, OSError) as error:
                reason = await self._explain(error)
                without_times = re.sub(r"\d+", "", reason)
                log.log(logging.DEBUG if without_times == said else logging.WARNING, "not connected: %s", reason)
                said = without_times
            finally:
                self._connection = None
            pause = min(self._settings.backoff_max_seconds, max(0.5, pause * 2))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), random.uniform(0.5, 1.0) * pause)

    async def _explain(self, error: Exception) -> str:
        if not isinstance(error, grpc.aio.AioRpcError):
            return f"{self._options.server} does not answer"
        if error.code() is not grpc.StatusCode.UNAVAILABLE or self._options.identity is None:
            return f"{error.code().name}: {error.details()}"
        host, _, port = self._options.server.rpartition(":")
        cause = await asyncio.to_thread(explain_failure, host.strip("[]"), int(port), self._options.identity)
        return cause or f"{error.details()}"

    async def _connect(self) -> None:
        """One connection, from hello to its end."""
        async with open_channel(self._options) as channel:
            client = FleetClient(channel)
            connection = Connection(client, self._options.metadata, pb.Run())
            connection.send(pb.DeviceMessage(hello=self._hello()))
            call = client.stub.Connect(connection.outgoing(), metadata=connection.metadata)
            messages = aiter(call)
            first = await asyncio.wait_for(anext(messages, None), _FIRST_ANSWER_SECONDS)
            if first is None:
                raise OSError("the server closed the stream")
            if first.HasField("refused"):
                self._refused(first.refused)
                return
            welcome = first.welcome
            self._welcomed(welcome, connection)
            beats = asyncio.create_task(self._beat(connection, welcome.heartbeat_seconds))
            leaving = asyncio.create_task(self._leave(connection))
            try:
                async for message in messages:
                    self._handle(message, connection)
            finally:
                connection.end()
                beats.cancel()
                leaving.cancel()
                call.cancel()

    def _hello(self) -> pb.Hello:
        app = self._options.app
        return pb.Hello(
            protocol=PROTOCOL_VERSION,
            name=self._options.name,
            app=pb.App(name=app.name, version=app.version, sha256=app.sha256),
            profile=self._profile,
            slots=len(self._slots),
            tasks=list(self._hands),
            run_id=self._run_id,
            instance=self._instance,
        )

    def _refused(self, refused: pb.Refused) -> None:
        if refused.final:
            raise RefusedError(f"{self._options.server} refused this device: {refused.reason}")
        log.warning("%s: %s", self._options.server, refused.reason)

    def _welcomed(self, welcome: pb.Welcome, connection: Connection) -> None:
        log.info("connected to %s", self._options.server)
        self._connection = connection
        connection.run = welcome.run
        self._run_id = welcome.run.run_id
        for task_id in welcome.forget:
            self._drop(task_id, "nobody waits for it any more")
        for hand in list(self._hands.values()):
            if hand.result is not None:
                hand.work = asyncio.create_task(self._deliver(hand, hand.result))

    async def _beat(self, connection: Connection, seconds: float) -> None:
        while True:
            connection.send(pb.DeviceMessage(heartbeat=read_heartbeat()))
            for hand in self._hands.values():
                connection.send(pb.DeviceMessage(progress=hand.progress()))
            await asyncio.sleep(seconds)

    async def _leave(self, connection: Connection) -> None:
        """Once stopped: waits for what is in hand, says goodbye, ends the stream."""
        await self._stopping.wait()
        if self._hands:
            log.info("leaving: %d tasks in hand have %g s", len(self._hands), self._settings.drain_seconds)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._settled.wait(), self._settings.drain_seconds)
        connection.send(pb.DeviceMessage(goodbye=pb.Goodbye(reason="it was stopped")))
        connection.end()

    # ------------------------------------------------------------ what the server says

    def _handle(self, message: pb.ServerMessage, connection: Connection) -> None:
        kind = message.WhichOneof("kind")
        if kind == "offer":
            self._take(message.offer, connection)
        elif kind == "receipt":
            self._receipt(message.receipt)
        elif kind == "cancel":
            for task_id in message.cancel.task_ids:
                self._drop(task_id, message.cancel.reason)
        elif kind == "refused":
            self._refused(message.refused)
        elif kind == "drain":
            log.info("the server is going: %s", message.drain.reason)

    def _take(self, offer: pb.Offer, connection: Connection) -> None:
        if offer.task_id in self._hands:
            return
        if self._stopping.is_set():
            leaving = failed_result(offer.task_id, Code.NODE_UNAVAILABLE, "the device is leaving")
            connection.send(pb.DeviceMessage(result=leaving))
            return
        hand = Hand(offer.task_id, blobs={blob.sha256 for blob in all_blobs(offer.payload)})
        self._hands[offer.task_id] = hand
        self._settled.clear()
        connection.send(pb.DeviceMessage(accept=pb.Accept(task_id=offer.task_id)))
        hand.work = asyncio.create_task(self._work(hand, offer, connection))

    def _receipt(self, receipt: pb.Receipt) -> None:
        if receipt.verdict != pb.ACCEPTED:
            verdict = pb.Verdict.Name(receipt.verdict).lower()
            log.warning("the reply to task %d is %s: %s", receipt.task_id, verdict, receipt.reason)
        self._forget(receipt.task_id)

    def _forget(self, task_id: int) -> None:
        if self._hands.pop(task_id, None) is not None:
            self._memory.settle(task_id)
        if not self._hands:
            self._settled.set()

    def _drop(self, task_id: int, reason: str) -> None:
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
                if digest([blob.data]) != blob.sha256:
                    raise PayloadError("a blob that came with the offer is not the bytes its name says")
                self._small.add(blob.sha256, blob.data)
            elif (data := self._small.get(blob.sha256)) is not None:
                blob.data = data
            elif not self._memory.blobs.has(blob):
                speed = await self._fetch_one(offer, connection, blob)
        return speed

    async def _fetch_one(self, offer: pb.Offer, connection: Connection, blob: pb.Blob) -> float:
        speed = await fetch(connection.client, connection.metadata, offer.task_id, blob, self._memory.blobs)
        if blob.size <= INLINE_BYTES:
            data = bytes(self._memory.blobs.get(blob))
            self._memory.blobs.remove(blob.sha256)
            self._small.add(blob.sha256, data)
            blob.data = data
        else:
            used = {sha256 for hand in self._hands.values() for sha256 in hand.blobs}
            self._memory.trim_blobs(self._settings.cache_bytes, used)
        return speed

    async def _deliver(self, hand: Hand, result: pb.Result) -> None:
        """Brings a result home over the connection there is. Where that breaks, the next one does it again."""
        connection = self._connection
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
        self._logs.flush()  # what the app said about it comes first
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

    def _send_log(self, entry: pb.Log) -> bool:
        if self._connection is None:
            return False
        self._connection.send(pb.DeviceMessage(log=entry))
        return True
