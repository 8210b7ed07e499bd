"""What the two ends of the wire agree on: sizes in bytes, a version, a name."""

from __future__ import annotations

CHUNK_BYTES = 1 << 20
"""A blob travels in chunks of this size."""

INLINE_BYTES = 256 << 10
"""Blobs up to this size ride along in the control message that names them."""

MEASURED_BYTES = 1 << 10
"""The first blob of a connection of at least this size goes by itself, to measure the bandwidth."""

MESSAGE_BYTES = 4 << 20
"""No single gRPC message is larger; gRPC refuses it before it takes the memory."""

PROTOCOL_VERSION = 3
"""What a device says in its Hello; the coordinator refuses another."""

NAME_KEY = "fedpace-name"
"""Without TLS the caller says its name in the metadata of every call; with TLS only its certificate counts."""
