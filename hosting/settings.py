"""What can be tuned, with its default: tables [tool.fedpace.server] and [tool.fedpace.device] of an app's pyproject.toml.

Seconds, bytes and counts are in the names. Keys are written with dashes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from fedpace.errors import AppError, ConfigError
from fedpace.protocol.codecs import parse_codec
from fedpace.protocol.codecs.frame import STAGES


@dataclass(frozen=True)
class ServerSettings:
    heartbeat_seconds: float = 5.0
    """How often a device says that it is alive."""
    lost_after_seconds: float = 15.0
    """Silence after which a device counts as gone."""
    reconnect_grace_seconds: float = 5.0
    """How long the tasks of a device that is gone wait for it to return."""
    hello_seconds: float = 10.0
    """How long a peer that opened a stream may say nothing."""
    max_reply_bytes: int = 2 << 30
    """A larger reply is refused before memory is taken."""
    check_updates: bool = True
    """Whether floating-point arrays of a reply must have the shape and dtype sent out, and be finite."""
    codecs: tuple[str, ...] = ()
    """Codecs that devices may compress their updates with: stages ("topk", good in any chain) or whole codecs; () is all."""
    keep_versions: int = 0
    """How many of the last model versions stay on disk; 0 keeps all."""
    first_task_seconds: float = 3600.0
    """Deadline of a device's first tasks of a kind, while its speed is unknown."""
    deadline_factor: float = 20.0
    """A task may take this many times the longest its device took for the last ones of its kind, ..."""
    deadline_min_seconds: float = 60.0
    """... but never less than this."""
    attempts: int = 3
    """How often a task is given to a device that vanishes each time while it has it."""
    drain_seconds: float = 10.0
    """How long work under way may go on once the server is told to stop."""
    log_lines_per_second: int = 200
    """Lines of a device's app that reach the server's log; the rest is counted."""

    def __post_init__(self) -> None:
        if self.lost_after_seconds <= self.heartbeat_seconds:
            raise AppError(
                f"lost-after-seconds = {self.lost_after_seconds:g} must be longer than heartbeat-seconds = "
                f"{self.heartbeat_seconds:g}, or a device counts as gone between two heartbeats"
            )
        if self.codecs and not self.check_updates:
            raise AppError(
                "codecs are looked at where updates are: check-updates = false leaves them free; drop one of both"
            )


@dataclass(frozen=True)
class DeviceSettings:
    tasks_per_worker: int = 1000
    """A worker process is replaced after this many tasks, ..."""
    worker_memory_bytes: int = 0
    """... or when it holds more memory than this; 0 is no limit."""
    load_seconds: float = 300.0
    """How long a worker may take to load the app."""
    cache_bytes: int = 64 << 20
    """Blobs kept on disk beside those of tasks in hand; the least recently used go first."""
    backoff_max_seconds: float = 30.0
    """Longest pause between two tries to connect."""
    drain_seconds: float = 30.0
    """How long a running task may go on once the device is told to stop."""


S = TypeVar("S", ServerSettings, DeviceSettings)

_MAY_BE_ZERO = frozenset(
    {
        "reconnect_grace_seconds",
        "keep_versions",
        "deadline_factor",
        "drain_seconds",
        "log_lines_per_second",
        "worker_memory_bytes",
        "cache_bytes",
    }
)
_MOST = 1 << 62
"""Beyond any count, size or time: what is larger is a slip."""


def read_settings(kind: type[S], settings: Mapping[str, Any], table: str) -> S:
    """Reads one table. Raises AppError for an unknown key, a wrong type or a number that makes no sense."""
    found = settings.get(table, {})
    if not isinstance(found, dict):
        raise AppError(f"pyproject.toml: [tool.fedpace.{table}] is not a table")
    known = {field.name: type(field.default) for field in fields(kind)}
    values: dict[str, Any] = {}
    for key, value in found.items():
        where = f"pyproject.toml: [tool.fedpace.{table}] {key}"
        name = key.replace("-", "_")
        if name not in known:
            raise AppError(f"{where} is unknown; there are {', '.join(sorted(known)).replace('_', '-')}")
        values[name] = _read(f"{where} = {value!r}", value, known[name], zero=name in _MAY_BE_ZERO)
    return kind(**values)


def _read(where: str, value: Any, wanted: type, *, zero: bool) -> bool | int | float | tuple[str, ...]:
    if wanted is tuple:
        return _read_codecs(where, value)
    if wanted is bool:
        if not isinstance(value, bool):
            raise AppError(f"{where} is neither true nor false")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise AppError(f"{where} is not a number")
    if wanted is int and not isinstance(value, int):
        raise AppError(f"{where} is not a whole number")
    if not 0 <= value <= _MOST or (value == 0 and not zero):
        raise AppError(f"{where} is out of range: it must be {'at least' if zero else 'above'} 0, and finite")
    return wanted(value)  # type: ignore[no-any-return]


def _read_codecs(where: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise AppError(f"{where} is not a list of texts")
    try:
        return tuple(text if text in STAGES else str(parse_codec(text)) for text in value)
    except ConfigError as error:
        raise AppError(f"{where}: {error}") from None
