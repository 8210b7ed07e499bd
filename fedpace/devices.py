"""`fedpace devices`: asks a server who is connected, and shows it as a table or JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.json_format import MessageToDict
from rich.table import Table

from fedpace.certs.identity import Identity
from fedpace.clients.connection import channel_to
from fedpace.errors import RunError
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.fleet_pb2_grpc import FleetStub
from fedpace.protocol.limits import NAME_KEY

if TYPE_CHECKING:
    from fedpace.protocol.fleet_pb2_grpc import FleetAsyncStub


async def fetch_devices(server: str, identity: Identity | None) -> pb.DevicesReply:
    """Connects and asks once. Raises RunError where the server does not answer, or says no."""
    async with channel_to(server, identity) as channel:
        return await ask_devices(channel)


async def ask_devices(channel: grpc.aio.Channel, *, timeout: float = 10.0) -> pb.DevicesReply:
    """Asks over a channel. Raises RunError where no answer comes within `timeout` seconds, or it is a no."""
    stub: FleetAsyncStub = FleetStub(channel)
    try:
        return await stub.Devices(pb.DevicesRequest(), metadata=[(NAME_KEY, "operator")], timeout=timeout)
    except grpc.aio.AioRpcError as error:
        raise RunError(f"the server does not tell who is connected: {error.code().name}: {error.details()}") from None


def to_json(reply: pb.DevicesReply) -> dict[str, Any]:
    """Plain values, names as in the .proto; ids as text where 64 bits may be too many for a reader."""
    return MessageToDict(reply, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def device_table(reply: pb.DevicesReply) -> Table:
    """A table for people."""
    table = Table(title=f"{reply.run.app}: {reply.run.status}, {reply.run.versions} model versions", title_style="")
    for name in ("device", "state", "tasks", "failed", "s/task", "down", "up", "stale", "seen"):
        table.add_column(name, justify="left" if name in ("device", "state") else "right")
    for device in reply.devices:
        table.add_row(
            device.name,
            "; ".join(f"{task.stage} {task.seconds:.0f} s" for task in device.tasks) or device.state,
            str(device.tasks_done),
            str(device.tasks_failed),
            f"{device.seconds_per_task:.3g}" if device.HasField("seconds_per_task") else "",
            _rate(device.download_bytes_per_second) if device.HasField("download_bytes_per_second") else "",
            _rate(device.upload_bytes_per_second) if device.HasField("upload_bytes_per_second") else "",
            f"{device.staleness:.0f}" if device.HasField("staleness") else "",
            f"{device.seen_seconds_ago:.0f} s ago",
        )
    return table


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e6:.3g} MB/s"
