"""Runs a ClientApp on one message, whatever it does."""

from __future__ import annotations

import traceback
from dataclasses import dataclass

from flwr.app import Context, Message, Metadata
from flwr.clientapp import ClientApp

from fedpace.hosting.flower import ErrorCode, make_request, request_metadata
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.payloads import Get
from fedpace.protocol.records import decode


@dataclass(frozen=True)
class AppFailure:
    """Why there is no reply: one of Flower's error codes, a sentence, and the traceback where there is one."""

    code: int
    reason: str
    traceback: str = ""


def offered_message(offer: pb.Offer, node_id: int, get: Get) -> Message:
    """The message that a device is offered, as its ClientApp receives it; `get` finds the bytes of blobs.

    Raises what bytes that are no message do: PayloadError, TypeError, ValueError.
    """
    return make_request(offered_metadata(offer, node_id), decode(offer.payload, get))


def offered_metadata(offer: pb.Offer, node_id: int) -> Metadata:
    """The metadata of that message."""
    return request_metadata(offer.run_id, offer.message_id, node_id, offer, offer.src_node_id)


def run_clientapp(app: ClientApp, message: Message, context: Context) -> Message | AppFailure:
    """Calls the app. Exceptions and exits of its code come back as a failure; the context may have changed."""
    try:
        reply = app(message, context)
    except BaseException as error:  # noqa: BLE001 - user code may raise anything, and exit
        trace = "".join(traceback.format_exception(error))
        return AppFailure(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"{type(error).__name__}: {error}", trace)
    if not isinstance(reply, Message):
        kind = type(reply).__name__
        return AppFailure(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"the ClientApp returned a {kind}, not a Message")
    if reply.has_error():
        return AppFailure(reply.error.code, reply.error.reason or "the ClientApp replied with an error")
    return reply
