"""The device's agent: keeps it connected, says who it is and how it fares, and passes on what the server says."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
import secrets

import grpc

from fedpace.certs.probe import explain_failure
from fedpace.clients.connection import DeviceOptions, open_channel
from fedpace.clients.logs import LogBuffer
from fedpace.clients.memory import DeviceMemory
from fedpace.clients.profile import accelerator, read_heartbeat, read_profile
from fedpace.clients.slot import Slot
from fedpace.clients.tasks import Connection, Tasks
from fedpace.errors import RefusedError
from fedpace.hosting.settings import DeviceSettings, read_settings
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.chunks import FleetClient
from fedpace.protocol.limits import PROTOCOL_VERSION
from fedpace.protocol.values import encode_values

log = logging.getLogger("fedpace.client")

_FIRST_ANSWER_SECONDS = 20.0


class Agent:
    """One device. `run` returns when it is told to `stop`."""

    def __init__(self, options: DeviceOptions) -> None:
        self._options = options
        self._settings = read_settings(DeviceSettings, options.app.settings, "device")
        self._profile = read_profile()
        self._instance = secrets.token_bytes(8)
        self._run_id = 0
        self._life: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._logs = LogBuffer(self._send_log)
        count = options.slots or len(self._profile.gpus) or 1
        self._slots = [Slot(self._setup(index), self._settings, self._logs.add) for index in range(count)]
        memory = DeviceMemory(options.state)
        self._tasks = Tasks(self._slots, self._settings, memory, self._stopping, self._logs.flush)

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
        self._run_id = self._tasks.recall()
        self._logs.start()
        self._life = asyncio.create_task(self._live())
        try:
            await asyncio.wait({self._life})
            if not self._life.cancelled():
                self._life.result()
        finally:
            self._stopping.set()
            self._logs.stop()
            await self._tasks.close()

    async def _live(self) -> None:
        await self._tasks.start()
        log.info("%s is ready: %s, %d slots", self._options.name, self._options.app, len(self._slots))
        await self._stay_connected()

    def stop(self) -> None:
        """Ends gracefully: running tasks may end, replies are brought home. A second call does not wait.

        Without a connection there is nothing to wait for: a reply that is ready stays on disk until the next start.
        """
        if self._life is not None and (self._tasks.connection is None or self._stopping.is_set()):
            self._life.cancel()
        self._stopping.set()

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
                self._tasks.connection = None
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
            tasks=self._tasks.ids,
            run_id=self._run_id,
            instance=self._instance,
        )

    def _refused(self, refused: pb.Refused) -> None:
        if refused.final:
            raise RefusedError(f"{self._options.server} refused this device: {refused.reason}")
        log.warning("%s: %s", self._options.server, refused.reason)

    def _welcomed(self, welcome: pb.Welcome, connection: Connection) -> None:
        log.info("connected to %s", self._options.server)
        connection.run = welcome.run
        self._run_id = welcome.run.run_id
        for task_id in welcome.forget:
            self._tasks.drop(task_id, "nobody waits for it any more")
        self._tasks.connected(connection)

    async def _beat(self, connection: Connection, seconds: float) -> None:
        while True:
            connection.send(pb.DeviceMessage(heartbeat=read_heartbeat()))
            for progress in self._tasks.progress():
                connection.send(pb.DeviceMessage(progress=progress))
            await asyncio.sleep(seconds)

    async def _leave(self, connection: Connection) -> None:
        """Once stopped: waits for what is in hand, says goodbye, ends the stream."""
        await self._stopping.wait()
        if self._tasks:
            log.info("leaving: %d tasks in hand have %g s", len(self._tasks), self._settings.drain_seconds)
            await self._tasks.all_settled(self._settings.drain_seconds)
        connection.send(pb.DeviceMessage(goodbye=pb.Goodbye(reason="it was stopped")))
        connection.end()

    # ------------------------------------------------------------ what the server says

    def _handle(self, message: pb.ServerMessage, connection: Connection) -> None:
        kind = message.WhichOneof("kind")
        if kind == "offer":
            self._tasks.take(message.offer, connection)
        elif kind == "receipt":
            self._tasks.settle(message.receipt)
        elif kind == "cancel":
            for task_id in message.cancel.task_ids:
                self._tasks.drop(task_id, message.cancel.reason)
        elif kind == "refused":
            self._refused(message.refused)
        elif kind == "drain":
            log.info("the server is going: %s", message.drain.reason)

    def _send_log(self, entry: pb.Log) -> bool:
        if self._tasks.connection is None:
            return False
        self._tasks.connection.send(pb.DeviceMessage(log=entry))
        return True
