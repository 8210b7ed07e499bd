"""What is looked at before anybody uses a reply: that it is whole, of a size that is taken, and an answer to what was sent."""

from __future__ import annotations

import logging
import math
from functools import partial
from pathlib import Path

from fedpace.errors import PayloadError
from fedpace.hosting.settings import ServerSettings
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.blobs import BlobStore, digest, read_blob
from fedpace.protocol.check import Sent, check_reply, sent_arrays
from fedpace.protocol.payloads import all_blobs, payload_bytes
from fedpace.server.board import BoardTask

log = logging.getLogger("fedpace.server")

_LAYOUTS_KEPT = 32


class Inspection:
    """`blobs` holds what was sent; in `updates` each task has a folder of what was stored for its reply."""

    def __init__(self, settings: ServerSettings, blobs: BlobStore, updates: Path) -> None:
        self._settings = settings
        self._blobs = blobs
        self._updates = updates
        self._layouts: dict[bytes, Sent] = {}

    def admit(self, result: pb.Result) -> tuple[int, int]:
        """The size of a reply, and how much of it rode along, in bytes.

        Raises PayloadError where it is too large, is not all here, or is not the bytes that it says.
        """
        if not result.HasField("payload"):
            raise PayloadError("the result holds neither a reply nor a failure")
        if not 0 <= result.compute_seconds < math.inf:
            raise PayloadError(f"{result.compute_seconds} is no number of compute seconds")
        size, along = payload_bytes(result.payload), len(result.payload.head)
        if size > self._settings.max_reply_bytes:
            raise PayloadError(f"the reply has {size} bytes; at most {self._settings.max_reply_bytes} are taken")
        for blob in all_blobs(result.payload):
            if blob.HasField("data"):
                if len(blob.data) != blob.size or digest([blob.data]) != blob.name:
                    raise PayloadError("a blob in the reply is not the bytes its name says: truncated or altered")
                along += blob.size
            elif not (self._updates / str(result.task_id) / blob.name.hex()).exists():
                raise PayloadError("the reply names bytes that were never stored here")
        return size, along

    def check(self, task: BoardTask, payload: pb.Payload) -> PayloadError | None:
        """Why a reply cannot be used; None where it can. Reads all of it: large ones take their time."""
        try:
            checked = self._settings.check_updates
            sent = self._sent_arrays(task.task.payload) if checked else {}
            get, codecs = partial(read_blob, self._updates / str(task.id)), self._settings.codecs or None
            check_reply(payload, get, sent, finite=checked, codecs=codecs)
        except PayloadError as error:
            return error
        except Exception as error:  # whatever made the check itself fail came with the reply
            log.exception("the reply to task %d cannot be checked", task.id)
            return PayloadError(f"the reply cannot be checked: {error!r}")
        return None

    def _sent_arrays(self, payload: pb.Payload) -> Sent:
        """What replies to this payload are held against; the same for all devices it went to."""
        key = payload.head + b"".join(blob.name for blob in all_blobs(payload))
        if key not in self._layouts:
            while len(self._layouts) >= _LAYOUTS_KEPT:
                self._layouts.pop(next(iter(self._layouts)))
            self._layouts[key] = sent_arrays(payload, self._blobs.get)
        return self._layouts[key]
