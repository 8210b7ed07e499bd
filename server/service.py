"""The gRPC service: who may call what, the control streams, the transfer of blobs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.message import DecodeError

from fedpace.certs.identity import Caller, caller_from_sans, node_id, parse_uri
from fedpace.errors import PayloadError, RefusedError
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol import fleet_pb2_grpc
from fedpace.protocol.blobs import BlobStore, IncomingBlob
from fedpace.protocol.chunks import Bytes
from fedpace.protocol.limits import CHUNK_BYTES, NAME_KEY
from fedpace.protocol.payloads import all_blobs
from fedpace.server.board import BoardTask
from fedpace.server.coordinator import Coordinator
from fedpace.server.session import Session, one_line
from fedpace.server.turns import Turns
from fedpace.server.writing import Writers

log = logging.getLogger("fedpace.server")

ROLES = {
    "Connect": {"device"},
    "Fetch": {"device"},
    "Store": {"device"},
    "Devices": {"operator", "admin"},
}
"""Which roles may call what: the one place that says so."""

Context = grpc.aio.ServicerContext[Any, Any]
M = TypeVar("M")


def _not_a_broken_connection(record: logging.LogRecord) -> bool:
    """gRPC logs a traceback where a connection breaks while it is written to; here that is one line: who left."""
    return "ExecuteBatchError" not in record.getMessage()


logging.getLogger("grpc._cython.cygrpc").addFilter(_not_a_broken_connection)


class FleetService(fleet_pb2_grpc.FleetServicer):
    """Translates between gRPC and the coordinator."""

    def __init__(self, coordinator: Coordinator, *, insecure: bool) -> None:
        self._coordinator = coordinator
        self._insecure = insecure
        self._storing: dict[int, IncomingBlob] = {}
        self._turns = Turns()
        self._writers = Writers()

    # ------------------------------------------------------------ who is calling

    async def _caller(self, context: Context, method: str) -> Caller:
        """The caller of an RPC; ends the call where its identity or role does not allow it."""
        caller = self._claimed(context, method) if self._insecure else self._certified(context)
        if caller is None:
            await _abort(context, grpc.StatusCode.UNAUTHENTICATED, "no identity of this fleet comes with the call")
        if caller.role not in ROLES[method]:
            roles = " or ".join(sorted(ROLES[method]))
            await _abort(context, grpc.StatusCode.PERMISSION_DENIED, f"{method} is for {roles}, not for {caller.role}")
        return caller

    def _certified(self, context: Context) -> Caller | None:
        return caller_from_sans(context.auth_context().get("x509_subject_alternative_name", ()))

    def _claimed(self, context: Context, method: str) -> Caller | None:
        name = dict(context.invocation_metadata() or ()).get(NAME_KEY)
        role = "device" if "device" in ROLES[method] else "operator"
        return parse_uri(f"fedpace://{role}/{name!s}")

    # ------------------------------------------------------------ the control stream

    async def Connect(
        self, request_iterator: AsyncIterator[pb.DeviceMessage], context: Context
    ) -> AsyncIterator[pb.ServerMessage]:
        caller = await self._caller(context, "Connect")
        first = await self._first(request_iterator, context, caller)
        if first.WhichOneof("kind") != "hello":
            log.warning("%s opened a stream and began with something else than a hello", caller.name)
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, "the first message on a stream is a hello")
        hello, node = first.hello, node_id(caller.name)
        session = Session(caller.name, node, hello.instance)
        try:
            welcome = self._coordinator.join(caller.name, node, hello, session)
        except RefusedError as error:
            log.warning("refused: %s", one_line(str(error)))
            yield pb.ServerMessage(refused=pb.Refused(reason=str(error), final=not self._coordinator.draining))
            return
        reader = asyncio.create_task(self._read(request_iterator, session))
        try:
            yield pb.ServerMessage(welcome=welcome)
            self._coordinator.offer(session.device)
            while (message := await session.outbox.get()) is not None:
                yield message
        finally:
            reader.cancel()
            self._coordinator.leave(session, session.reason or "its connection broke")

    async def _first(self, messages: AsyncIterator[M], context: Context, caller: Caller) -> M:
        """The first message of a stream; ends the call where none comes, or none that can be read."""
        seconds = self._coordinator.settings.hello_seconds
        try:
            return await asyncio.wait_for(anext(messages), seconds)
        except TimeoutError:
            code, reason = grpc.StatusCode.DEADLINE_EXCEEDED, f"said nothing for {seconds:g} s"
        except StopAsyncIteration:
            code, reason = grpc.StatusCode.INVALID_ARGUMENT, "closed it before it said anything"
        except DecodeError as error:
            code, reason = grpc.StatusCode.INVALID_ARGUMENT, f"began with what cannot be read: {error}"
        log.warning("%s opened a stream and %s", caller.name, reason)
        await _abort(context, code, f"{caller.name} opened a stream and {reason}")

    async def _read(self, messages: AsyncIterator[pb.DeviceMessage], session: Session) -> None:
        """Hands what the device says to the coordinator until the stream ends."""
        try:
            async for message in messages:
                if session.closed:
                    return
                self._coordinator.handle(session, message)
        except DecodeError as error:
            session.refuse(f"it sent what cannot be read: {error}", final=False)
        except Exception as error:
            log.exception("%s: its message could not be handled", session.name)
            session.refuse(f"its message could not be handled: {error}", final=False)
        session.close(session.left or "its connection closed")

    # ------------------------------------------------------------ blobs

    async def _held(self, context: Context, caller: Caller, task_id: int) -> BoardTask:
        """A task the caller holds; ends the call where it holds no such task."""
        task = self._coordinator.board.get(task_id)
        if task is None or task_id not in self._coordinator.board.held(node_id(caller.name)):
            await _abort(context, grpc.StatusCode.NOT_FOUND, f"{caller.name} holds no task {task_id}: it may be over")
        return task

    async def Fetch(  # type: ignore[override]  # its chunks go out as they are: see protocol.chunks
        self, request: pb.FetchRequest, context: Context
    ) -> AsyncIterator[memoryview]:
        caller = await self._caller(context, "Fetch")
        task = await self._held(context, caller, request.task_id)
        blob = next((blob for blob in all_blobs(task.task.payload) if blob.name == request.name), None)
        if blob is None or request.offset > blob.size:
            reason = f"task {task.id} has no blob {request.name.hex()[:12]} with a byte {request.offset}"
            await _abort(context, grpc.StatusCode.NOT_FOUND, reason)
        coordinator = self._coordinator
        progress = partial(coordinator.progress, task.node_id, task.id)
        async with self._turns.take(blob.size - request.offset, progress) as moved:
            await self._held(context, caller, task.id)
            bytes_of_blob = coordinator.blobs.get(blob)
            for start in range(request.offset, blob.size, CHUNK_BYTES):
                data = bytes_of_blob[start : start + CHUNK_BYTES]
                yield data
                moved()
                coordinator.counts.bytes_down += len(data)

    async def Store(
        self, request_iterator: AsyncIterator[pb.StoreChunk | Bytes], context: Context
    ) -> AsyncIterator[pb.StoreState]:
        caller = await self._caller(context, "Store")
        first = await self._first(request_iterator, context, caller)
        if not isinstance(first, pb.StoreChunk):
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, "the first message of a transfer names its blob")
        task = await self._held(context, caller, first.task_id)
        progress = partial(self._coordinator.progress, task.node_id, task.id)
        async with self._turns.take(first.size, progress) as moved:
            await self._held(context, caller, task.id)
            store = BlobStore(self._coordinator.updates / str(task.id), self._coordinator.spares)
            if (older := self._storing.pop(task.id, None)) is not None:
                older.close()
            limit = self._coordinator.settings.max_reply_bytes
            if first.size + _bytes_of_others(store, first.name) > limit:
                reason = f"a blob of {first.size} bytes is refused: a reply may have at most {limit}"
                await _abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, reason)
            if store.has(pb.Blob(name=first.name, size=first.size)):
                yield pb.StoreState(offset=first.size, complete=True)
                return
            try:
                incoming = self._storing[task.id] = store.incoming(first.name, first.size)
                yield pb.StoreState(offset=incoming.offset)
                async with self._writers.open(incoming) as writer:
                    async for chunk in request_iterator:
                        moved()
                        await self._check_transfer(context, caller, task, incoming)
                        data = chunk.data if isinstance(chunk, pb.StoreChunk) else chunk
                        await writer.write(data)
                        self._coordinator.counts.bytes_up += len(data)
                    await writer.flush()
                    await self._check_transfer(context, caller, task, incoming)
                    incoming.finish()
            except PayloadError as error:
                await _abort(context, grpc.StatusCode.DATA_LOSS, str(error))
            yield pb.StoreState(offset=first.size, complete=True)

    async def _check_transfer(self, context: Context, caller: Caller, task: BoardTask, incoming: IncomingBlob) -> None:
        """Ends a transfer whose task is over, or after which its device has begun another."""
        await self._held(context, caller, task.id)
        if self._storing.get(task.id) is not incoming:
            await _abort(context, grpc.StatusCode.ABORTED, "a newer transfer has replaced this one")

    # ------------------------------------------------------------ operators

    async def Devices(self, request: pb.DevicesRequest, context: Context) -> pb.DevicesReply:
        await self._caller(context, "Devices")
        coordinator = self._coordinator
        run = pb.RunState(
            run_id=coordinator.run.run_id,
            app=str(coordinator.app),
            status="draining" if coordinator.draining else "running",
            versions=coordinator.versions,
            seconds=coordinator.seconds,
        )
        return pb.DevicesReply(devices=coordinator.device_states(), run=run)


async def _abort(context: Context, code: grpc.StatusCode, reason: str) -> NoReturn:
    await context.abort(code, reason)
    raise AssertionError("abort raises")


def _bytes_of_others(store: BlobStore, name: bytes) -> int:
    """What lies in a reply's folder besides one blob, complete or in part."""
    return sum(path.stat().st_size for path in store.directory.iterdir() if path.stem != name.hex())
