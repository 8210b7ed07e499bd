"""What devices are offered: tasks with the small blobs that they need and do not have."""

from __future__ import annotations

from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.blobs import BlobStore, SmallBlobs
from fedpace.protocol.limits import INLINE_BYTES, MESSAGE_BYTES
from fedpace.protocol.payloads import all_blobs
from fedpace.server.session import Session


class Offers:
    """Of one run; `blobs` holds what tasks carry."""

    def __init__(self, run_id: int, blobs: BlobStore) -> None:
        self._run_id = run_id
        self._blobs = blobs
        self._small = SmallBlobs()

    def make(self, session: Session, task: pb.Task, deadline_seconds: float) -> tuple[pb.Offer, int]:
        """A task as it is offered on a session, and how many bytes go along."""
        offer = pb.Offer(
            task_id=task.task_id,
            run_id=self._run_id,
            message_id=str(task.task_id),
            message_type=task.message_type,
            group_id=task.group_id,
            created_at=task.created_at,
            ttl=task.ttl,
            src_node_id=1,
            payload=task.payload,
            deadline_seconds=deadline_seconds,
        )
        room, along = MESSAGE_BYTES // 2, len(task.payload.head)
        for blob in all_blobs(offer.payload):
            if blob.size <= min(room, INLINE_BYTES) and session.needs(blob):
                blob.data = self._small_blob(blob)
                room -= blob.size
                along += blob.size
        return offer, along

    def _small_blob(self, blob: pb.Blob) -> bytes:
        data = self._small.get(blob.name)
        if data is None:
            data = bytes(self._blobs.get(blob))
            self._small.add(blob.name, data)
        return data
