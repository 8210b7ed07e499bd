"""A slot of a device: one worker process, kept warm, replaced when it is worn out, gone or stuck."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable

import psutil

from fedpace.errors import AppError, FedpaceError, PayloadError
from fedpace.hosting.processes import Child, start_child
from fedpace.hosting.settings import DeviceSettings
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.failures import Code, failed_result
from fedpace.protocol.frames import receive

log = logging.getLogger("fedpace.client")


_READ_BYTES = 1 << 16
_LINE_BYTES = 1 << 14
_EXIT_SECONDS = 0.5


class Slot:
    """`run` gives a task to the worker and waits for its result; `kill` ends both. Lines printed go to `on_line`."""

    def __init__(self, setup: pb.Setup, settings: DeviceSettings, on_line: Callable[[int, str], None]) -> None:
        self._setup = setup
        self._settings = settings
        self._on_line = on_line
        self._child: Child | None = None
        self._readers: list[asyncio.Task[None]] = []
        self._done = 0
        self._killed = ""
        self._lock = asyncio.Lock()
        self.task_id = 0

    async def start(self) -> None:
        """Makes sure a worker is there with the app loaded. Raises AppError where the app cannot be loaded."""
        async with self._lock:
            if self._child is None or not self._child.alive:
                await self._start()

    async def _start(self) -> None:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        pipe = asyncio.subprocess.PIPE
        child = await start_child("fedpace.clients.worker", stdout=pipe, stderr=pipe, environment=environment)
        self._done = 0
        streams = [stream for stream in (child.process.stdout, child.process.stderr) if stream is not None]
        self._readers = [asyncio.create_task(self._read_lines(stream)) for stream in streams]
        child.send(pb.WorkerMessage(setup=self._setup))
        try:
            reply = await asyncio.wait_for(receive(child.reader, pb.WorkerReply), self._settings.load_seconds)
        except TimeoutError:
            child.kill()
            raise AppError(f"the ClientApp was not loaded after {self._settings.load_seconds:g} s") from None
        except BaseException:
            child.kill()
            raise
        if reply is None:
            status = await child.wait()
            raise AppError(f"the process that loads the ClientApp died: {_how(status)}")
        if reply.loaded.error:
            child.kill()
            raise AppError(f"the ClientApp cannot be loaded: {reply.loaded.error}")
        self._child = child

    async def _read_lines(self, stream: asyncio.StreamReader) -> None:
        """Passes on what the worker prints, line by line. Of a line without an end only a part is kept."""
        begun = b""
        while data := await stream.read(_READ_BYTES):
            *lines, begun = (begun + data).split(b"\n")
            begun = begun[:_LINE_BYTES]
            for line in lines:
                self._on_line(self.task_id, line.decode(errors="replace"))
            await asyncio.sleep(0)  # a flood of lines must not keep heartbeats waiting
        if begun:
            self._on_line(self.task_id, begun.decode(errors="replace"))

    async def run(self, task: pb.WorkerTask) -> pb.Result:
        """Runs one task. A worker that dies or is killed gives a failed result; nothing is raised."""
        self.task_id, self._killed = task.offer.task_id, ""
        try:
            await self.start()
        except (FedpaceError, OSError) as error:
            return self._failure(task, f"no worker could be started: {error}")
        child = self._child
        if child is None or self._killed:
            return self._failure(task, self._killed or "the device was stopped")
        try:
            child.send(pb.WorkerMessage(task=task))
        except PayloadError as error:
            return self._failure(task, str(error))
        reply = await receive(child.reader, pb.WorkerReply)
        if reply is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(child.wait(), _EXIT_SECONDS)
            child.kill()  # what it started may live on, or itself with its socket closed
            reason = f"the worker process died: {_how(await child.wait())}"
            if not self._killed:
                log.warning("task %d: %s", self.task_id, reason)
            return self._failure(task, self._killed or reason)
        for _ in range(2):  # asyncio hands on what is on the pipes two turns later than what is on the socket
            await asyncio.sleep(0)
        self._done += 1
        return reply.result

    def _failure(self, task: pb.WorkerTask, reason: str) -> pb.Result:
        return failed_result(task.offer.task_id, Code.CLIENT_APP_CRASHED, reason)

    def memory_bytes(self) -> int:
        """What the worker holds, 0 where there is none."""
        if self._child is None or not self._child.alive:
            return 0
        try:
            return int(psutil.Process(self._child.pid).memory_info().rss)
        except psutil.Error:
            return 0

    async def renew(self) -> None:
        """Between tasks: replaces a worker that is gone, has done its number of tasks, or is past its memory limit."""
        limit = self._settings.worker_memory_bytes
        if self._done >= self._settings.tasks_per_worker or (limit and self.memory_bytes() > limit):
            log.debug("slot %d gets a fresh worker after %d tasks", self._setup.slot, self._done)
            await self.close()
        await self.start()

    def kill(self, reason: str) -> None:
        """Ends the worker at once; a task it has fails with this reason."""
        self._killed = reason
        if self._child is not None:
            self._child.kill()

    async def close(self) -> None:
        """Ends the worker and waits until it is gone."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            await child.wait()
        for reader in self._readers:
            reader.cancel()


def _how(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
