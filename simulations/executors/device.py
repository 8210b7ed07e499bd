"""One task of a simulated device: what a real device's worker, and then the server, do with it, in the same words."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedpace.clients.mods.clock import use_task_clock
from fedpace.errors import PayloadError
from fedpace.hosting.clientapp import AppFailure, run_clientapp
from fedpace.hosting.config import Config
from fedpace.hosting.flower import ErrorCode, become, make_context
from fedpace.hosting.seeds import seed_globals
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.failures import Code, failed_result
from fedpace.protocol.payloads import Get
from fedpace.protocol.records import Put, decode, encode
from fedpace.simulations.executors.messages import Messages
from fedpace.simulations.executors.replies import Replies

log = logging.getLogger("fedpace.simulations")

_REASON_CHARACTERS = 4096
_TRACES_KEPT = 256


@dataclass(frozen=True)
class Task:
    """What a device is given: an offer, the device it is for, the seed of its global generators, the state it finds."""

    offer: pb.Offer
    device: int
    node_id: int
    seed: int
    state: pb.Payload


class Devices:
    """Runs a ClientApp as any of `devices` devices of a run, one task after another.

    The app finds `partition-id` and `num-partitions` in its node config, and a task clock that stands still at the time
    its message was sent: what a task takes is the fleet model's to say. Replies are checked as a server checks them;
    without `check_updates` their arrays may be of any shape, and not finite.
    """

    def __init__(
        self, app: ClientApp, run_id: int, devices: int, run_config: Config, *, check_updates: bool = True
    ) -> None:
        self._app = app
        self._run_id = run_id
        self._devices = devices
        self._run_config = run_config
        self._messages = Messages()
        self._replies = Replies(check_updates=check_updates)
        self._traces: set[str] = set()

    def work(self, task: Task, get: Get, put: Put) -> pb.SlotRecord:
        """The reply to a task, and `state` where there is one after it. `get` finds the bytes of the task's blobs, and
        those that `put` took.

        Never raises for what the app does.
        """
        torch_was_there = "torch" in sys.modules
        try:
            context, reply = self._run(task, get)
            if not torch_was_there and "torch" in sys.modules:
                context, reply = self._run(task, get)  # torch came too late to be seeded
        except (PayloadError, TypeError, ValueError) as error:
            return self._failed(task, unreadable(error))
        return self._record(task, context, reply, get, put)

    def _run(self, task: Task, get: Get) -> tuple[Context, Message | AppFailure]:
        """Calls the app with a message and a state of its own to write into. Raises what bytes that are no message do."""
        node_config: Config = {"partition-id": task.device, "num-partitions": self._devices}
        context = make_context(self._run_id, task.node_id, node_config, self._run_config, decode(task.state, get))
        message = self._messages.message(task.offer, task.node_id, get)
        become(self._run_id, task.node_id)
        seed_globals(task.seed)
        if (torch := sys.modules.get("torch")) is not None:
            torch.set_num_threads(1)  # more cost more than they give, and may change the last bits
        sent_at = task.offer.created_at
        with use_task_clock(lambda: sent_at):
            return context, run_clientapp(self._app, message, context)

    def _record(self, task: Task, context: Context, reply: Message | AppFailure, get: Get, put: Put) -> pb.SlotRecord:
        """A failure leaves the state as it was; a reply that the server rejects does not, for the device knows no more."""
        if isinstance(reply, AppFailure):
            return self._failed(task, reply)
        record = pb.SlotRecord()
        try:
            payload, rejected = self._replies.write(reply.content, task.offer.payload, get, put)
            if context.state or task.state.ByteSize():
                record.state.CopyFrom(encode(context.state, put))
        except PayloadError as error:
            return self._failed(task, AppFailure(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error)))
        except Exception as error:  # noqa: BLE001 - the app may have left anything there
            reason = f"the ClientApp left a reply or a state that cannot be read: {type(error).__name__}: {error}"
            return self._failed(task, AppFailure(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason))
        if rejected is None:
            record.reply.CopyFrom(pb.Result(task_id=task.offer.task_id, payload=payload))
        else:
            record.reply.CopyFrom(failed_result(task.offer.task_id, Code.REPLY_MESSAGE_UNAVAILABLE, rejected))
        return record

    def _failed(self, task: Task, failure: AppFailure) -> pb.SlotRecord:
        """Tells where the app failed, once a place: a thousand devices fail alike."""
        place = failure.traceback.rpartition("\n  File ")[2] or failure.reason
        if place not in self._traces and len(self._traces) < _TRACES_KEPT:
            self._traces.add(place)
            what = (failure.traceback or failure.reason).rstrip()
            log.warning("task %d of device %d failed: %s", task.offer.task_id, task.device, what)
        reply = failed_result(task.offer.task_id, failure.code, failure.reason[:_REASON_CHARACTERS])
        return pb.SlotRecord(reply=reply)


def unreadable(error: Exception) -> AppFailure:
    return AppFailure(ErrorCode.MESSAGE_UNAVAILABLE, f"the message cannot be read: {error}")
