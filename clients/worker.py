"""A warm worker: `python -m fedpace.clients.worker`, started by the agent. Runs the ClientApp, one task after another.

Whatever user code does here costs this process and the task it has, never the agent.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedpace.clients.memory import DeviceMemory
from fedpace.errors import FedpaceError, PayloadError
from fedpace.hosting.app import load_app_folder
from fedpace.hosting.clientapp import AppFailure, offered_message, run_clientapp
from fedpace.hosting.flower import ErrorCode, become, load_client_app, make_context
from fedpace.hosting.processes import log_to_stderr, parent_socket
from fedpace.hosting.seeds import derive_seed, seed_globals
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.blobs import BlobStore, inline_blob, read_blob, whole_blob
from fedpace.protocol.failures import failed_result
from fedpace.protocol.frames import FrameSocket
from fedpace.protocol.payloads import all_blobs
from fedpace.protocol.records import decode, encode
from fedpace.protocol.values import decode_values

_REASON_CHARACTERS = 4096


def main() -> None:
    connection = FrameSocket(parent_socket(sys.argv[1:]))
    log_to_stderr()
    faulthandler.enable()
    first = connection.receive(pb.WorkerMessage)
    if first is None:
        return
    threading.Thread(target=_end_with_agent, args=(connection,), daemon=True).start()
    try:
        app = load_client_app(load_app_folder(Path(first.setup.app_directory)))
    except FedpaceError as error:
        connection.send(pb.WorkerReply(loaded=pb.Loaded(error=str(error))))
        return
    except BaseException as error:  # noqa: BLE001 - whatever importing user code raises
        traceback.print_exc()
        connection.send(pb.WorkerReply(loaded=pb.Loaded(error=f"{type(error).__name__}: {error}")))
        return
    connection.send(pb.WorkerReply(loaded=pb.Loaded()))
    worker = Worker(app, first.setup)
    gc.freeze()  # what is here now stays, and need not be looked through again
    while (message := connection.receive(pb.WorkerMessage)) is not None:
        result = worker.work(message.task)
        sys.stdout.flush()
        sys.stderr.flush()
        connection.send(pb.WorkerReply(result=result))
        if any(not blob.HasField("data") for blob in all_blobs(message.task.offer.payload)):
            gc.collect()  # Flower's records refer to themselves: the model would stay mapped
    os._exit(0)  # threads of the app must not keep the process alive


def _end_with_agent(connection: FrameSocket) -> None:
    """Whatever runs here ends as soon as nobody waits for it."""
    connection.wait_gone()
    os._exit(0)


class Worker:
    """Runs tasks for one slot of a device. `context.state` is kept on disk, a run and slot, with the reply it led to."""

    def __init__(self, app: ClientApp, setup: pb.Setup) -> None:
        self._app = app
        self._memory = DeviceMemory(Path(setup.state_directory), f"slot-{setup.slot}")
        self._slot = setup.slot
        self._node_id = setup.node_id
        self._node_config = decode_values(setup.node_config)
        self._slowdown = setup.slowdown
        self._context: Context | None = None

    def work(self, task: pb.WorkerTask) -> pb.Result:
        """One task, from its bytes to the bytes of its reply."""
        offer = task.offer
        try:
            message = offered_message(offer, self._node_id, self._memory.blobs.get)
            context = self._load_context(task.run)
        except (PayloadError, TypeError, ValueError) as error:
            return _failure(offer, ErrorCode.MESSAGE_UNAVAILABLE, f"the message cannot be read: {error}")
        become(offer.run_id, self._node_id)
        seed_globals(derive_seed(task.run.seed, "clientapp", self._node_id, offer.task_id))
        started = time.monotonic()
        reply = run_clientapp(self._app, message, context)
        seconds = time.monotonic() - started
        if self._slowdown > 1:
            time.sleep((self._slowdown - 1) * seconds)
            seconds *= self._slowdown
        if isinstance(reply, AppFailure):
            return self._failed(offer, reply, seconds)
        try:
            result = self._result(offer, reply, seconds)
            state = encode(context.state, whole_blob)
        except PayloadError as error:
            return self._failed(offer, AppFailure(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error)), seconds)
        self._memory.keep(pb.SlotRecord(run_id=offer.run_id, state=state, reply=result), self._slot)
        return result

    def _load_context(self, run: pb.Run) -> Context:
        if self._context is None or self._context.run_id != run.run_id:
            record = self._memory.load(run.run_id, self._slot)
            state = RecordDict() if record is None else decode(record.state, partial(read_blob, Path()))
            config = decode_values(run.run_config)
            self._context = make_context(run.run_id, self._node_id, self._node_config, config, state)
        return self._context

    def _result(self, offer: pb.Offer, reply: Message, seconds: float) -> pb.Result:
        outbox = self._memory.outbox(offer.task_id)

        def put(buffers: Sequence[bytes | memoryview]) -> pb.Blob:
            return inline_blob(buffers) or BlobStore(outbox, self._memory.spares).put(buffers)

        return pb.Result(task_id=offer.task_id, payload=encode(reply.content, put), compute_seconds=seconds)

    def _failed(self, offer: pb.Offer, failure: AppFailure, seconds: float) -> pb.Result:
        """A failure leaves the state as it was: what the app did to it in memory is forgotten."""
        self._context = None
        print((failure.traceback or failure.reason).rstrip(), file=sys.stderr)
        return _failure(offer, failure.code, failure.reason, seconds)


def _failure(offer: pb.Offer, code: int, reason: str, seconds: float = 0.0) -> pb.Result:
    return failed_result(offer.task_id, code, reason[:_REASON_CHARACTERS], seconds)


if __name__ == "__main__":
    main()
