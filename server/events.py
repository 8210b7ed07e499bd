"""The coordinator's messages as a ServerApp's process sees them: events, entries of the decision log, profiles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.paced import DeviceProfile, Event, Expired, Failed, Joined, Left, Replied, Reported
from fedpace.server.updates import StoredUpdate


def task_of(message: pb.FleetMessage) -> int:
    """The task an answer is to."""
    return message.replied.task_id if message.HasField("replied") else message.failed.task_id


def event_of(message: pb.FleetMessage, update: StoredUpdate) -> Event:
    """The event a message tells of; `update` is what it brought, if it brought anything."""
    sequence, at = message.sequence, message.at
    kind = message.WhichOneof("kind")
    if kind == "joined":
        return Joined(sequence, at, message.joined.node_id, message.joined.name)
    if kind == "left":
        return Left(sequence, at, message.left.node_id, message.left.reason)
    if kind == "beat":
        return Reported(sequence, at, message.beat.node_id)
    if kind == "replied":
        replied = message.replied
        metrics = update.metrics
        return Replied(sequence, at, replied.node_id, str(replied.task_id), metrics, update, replied.compute_seconds)
    failed = message.failed
    if failed.expired:
        return Expired(sequence, at, failed.node_id, str(failed.task_id), failed.reason)
    return Failed(sequence, at, failed.node_id, str(failed.task_id), failed.code, failed.reason)


def log_entry(message: pb.FleetMessage) -> dict[str, Any]:
    """What the decision log says of an answer."""
    if message.HasField("replied"):
        return {"what": "replied", "task": message.replied.task_id, "node": message.replied.node_id}
    failed = message.failed
    what = "expired" if failed.expired else "failed"
    return {"what": what, "task": failed.task_id, "node": failed.node_id, "reason": failed.reason}


def arrival_row(message: pb.FleetMessage) -> dict[str, Any]:
    """What a recording says of a message: see `hosting.recording.Arrival`."""
    kind = message.WhichOneof("kind")
    row: dict[str, Any] = {"what": kind, "sequence": message.sequence, "at": message.at}
    if kind == "joined":
        return {**row, "node_id": message.joined.node_id, "name": message.joined.name}
    if kind == "left":
        return {**row, "node_id": message.left.node_id, "reason": message.left.reason}
    if kind == "beat":
        return {**row, "node_id": message.beat.node_id}
    if kind == "replied":
        replied = message.replied
        task = {"node_id": replied.node_id, "task": replied.task_id}
        return {**row, **task, "compute_seconds": replied.compute_seconds}
    if kind == "failed":
        failed = message.failed
        row["what"] = "expired" if failed.expired else "failed"
        return {**row, "node_id": failed.node_id, "task": failed.task_id, "code": failed.code, "reason": failed.reason}
    return {**row, "reason": message.stop.reason}


def profile_of(node: pb.Node, known: DeviceProfile | None) -> DeviceProfile:
    """What a device says of itself, with what was observed of it before."""
    profile = node.profile
    says = DeviceProfile(
        node_id=node.node_id,
        name=node.name,
        slots=node.slots,
        cpu_count=profile.cpu_count,
        cpu_model=profile.cpu_model,
        memory_bytes=profile.memory_bytes,
        gpus=tuple(gpu.name for gpu in profile.gpus),
        gpu_memory_bytes=tuple(gpu.memory_bytes for gpu in profile.gpus),
        battery_percent=_charge(profile.battery),
    )
    if known is None:
        return says
    return replace(
        says,
        seconds_per_task=known.seconds_per_task,
        download_bytes_per_second=known.download_bytes_per_second,
        upload_bytes_per_second=known.upload_bytes_per_second,
    )


def after_beat(profile: DeviceProfile, beat: pb.Heartbeat) -> DeviceProfile:
    """The profile of a device that said how busy it is."""
    return replace(
        profile,
        load=beat.load,
        free_memory_bytes=beat.free_memory_bytes or None,
        battery_percent=_charge(beat.battery),
    )


def after_reply(profile: DeviceProfile, replied: pb.Replied) -> DeviceProfile:
    """The profile of a device whose task was seen to take its time."""
    return replace(
        profile,
        seconds_per_task=replied.compute_seconds,
        download_bytes_per_second=replied.download_bytes_per_second or None,
        upload_bytes_per_second=replied.upload_bytes_per_second or None,
    )


def _charge(battery: pb.Battery) -> float | None:
    """What a battery has left in percent; None where the device does not live on it."""
    return None if battery.plugged or not battery.percent > 0 else min(100.0, battery.percent)
