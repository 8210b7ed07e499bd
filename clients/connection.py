"""How a device reaches its server, and as whom."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import grpc

from fedpace.certs.identity import Identity, node_id
from fedpace.hosting.app import AppFolder
from fedpace.hosting.config import Config
from fedpace.protocol.chunks import WINDOW_OPTIONS
from fedpace.protocol.limits import MESSAGE_BYTES, NAME_KEY

CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    *WINDOW_OPTIONS,
    ("grpc.use_local_subchannel_pool", 1),
]


@dataclass(frozen=True)
class DeviceOptions:
    """What the command line says. `identity` is None with --insecure; `slots` 0 means one a GPU, else one."""

    server: str
    app: AppFolder
    name: str
    state: Path
    identity: Identity | None
    node_config: Config = field(default_factory=dict)
    slots: int = 0
    slowdown: float = 1.0

    @property
    def node_id(self) -> int:
        return node_id(self.name)

    @property
    def metadata(self) -> list[tuple[str, str]]:
        return [(NAME_KEY, self.name)]


def open_channel(options: DeviceOptions) -> grpc.aio.Channel:
    """A channel to the server, not connected yet."""
    return channel_to(options.server, options.identity)


def channel_to(server: str, identity: Identity | None) -> grpc.aio.Channel:
    """A channel with an identity's certificate, or without TLS."""
    if identity is None:
        return grpc.aio.insecure_channel(server, CHANNEL_OPTIONS)
    credentials = grpc.ssl_channel_credentials(identity.ca, identity.key, identity.cert)
    return grpc.aio.secure_channel(server, credentials, CHANNEL_OPTIONS)
