"""Flower's private names, all of them. Nothing else of fedpace touches them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from flwr.app import Context, Error, Message, Metadata, RecordDict
from flwr.app.message.message import make_message
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import ServerApp
from flwr.supercore.object_ref import load_app
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity

from fedpace.errors import AppError
from fedpace.hosting.app import AppFolder
from fedpace.hosting.config import Config

__all__ = [
    "SUPERLINK_NODE_ID",
    "ErrorCode",
    "Run",
    "RunNotRunningException",
    "become",
    "identity_kept",
    "load_client_app",
    "load_server_app",
    "make_context",
    "make_reply",
    "make_request",
    "request_metadata",
    "set_message_id",
    "unchecked",
]


def become(run_id: int, node_id: int) -> None:
    """Makes this process a task of a run, without which Flower makes no messages."""
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = node_id


@contextmanager
def identity_kept() -> Iterator[None]:
    """Whatever task this process is made inside, afterwards it is the one it was."""
    before = TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id
    try:
        yield
    finally:
        TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = before


def make_context(run_id: int, node_id: int, node_config: Config, run_config: Config, state: RecordDict) -> Context:
    return Context(
        run_id=run_id, node_id=node_id, node_config=dict(node_config), state=state, run_config=dict(run_config)
    )


def make_run(app: AppFolder, run_id: int, overrides: Config) -> Run:
    """What `grid.run` says."""
    run = Run.create_empty(run_id)
    run.fab_id = f"{app.publisher}/{app.name}"
    run.fab_version = app.version
    run.fab_hash = app.sha256
    run.override_config = dict(overrides)
    return run


def set_message_id(message: Message, message_id: str) -> None:
    message.metadata.__dict__["_message_id"] = message_id


def unchecked(record: MutableMapping[str, Any]) -> dict[str, Any]:
    """The dict behind a record, or behind records, for what is known to fit: Flower looks at each key and value."""
    found: dict[str, Any] = record.__dict__["_data"]
    return found


def make_request(metadata: Metadata, content: RecordDict) -> Message:
    """A message as a ClientApp receives it."""
    return make_message(metadata, content=content)


class Sent(Protocol):
    """What is known of a message that was sent: tasks, offers and Flower's own metadata have it under the same names."""

    @property
    def message_type(self) -> str: ...
    @property
    def group_id(self) -> str: ...
    @property
    def created_at(self) -> float: ...
    @property
    def ttl(self) -> float: ...


def request_metadata(
    run_id: int, message_id: str, node_id: int, sent: Sent, sender: int = SUPERLINK_NODE_ID
) -> Metadata:
    """The metadata of a message to a node, which its reply is made from."""
    return Metadata(
        run_id=run_id,
        message_id=message_id,
        src_node_id=sender,
        dst_node_id=node_id,
        reply_to_message_id="",
        group_id=sent.group_id,
        created_at=sent.created_at,
        ttl=sent.ttl,
        message_type=sent.message_type,
    )


def make_reply(
    request: Metadata, message_id: str, created_at: float, content: RecordDict | None, error: Error | None
) -> Message:
    """The answer to a request as a ServerApp receives it. `created_at` in Unix seconds."""
    metadata = Metadata(
        run_id=request.run_id,
        message_id=message_id,
        src_node_id=request.dst_node_id,
        dst_node_id=request.src_node_id,
        reply_to_message_id=request.message_id,
        group_id=request.group_id,
        created_at=created_at,
        ttl=max(0.0, request.created_at + request.ttl - created_at),
        message_type=request.message_type,
    )
    return make_message(metadata, content=content, error=error)


A = TypeVar("A")


def load_client_app(app: AppFolder) -> ClientApp:
    """Imports the ClientApp. Raises AppError for a wrong reference; what the app's own code raises passes through."""
    return _load(app.directory, app.clientapp, ClientApp)


def load_server_app(app: AppFolder) -> ServerApp:
    """Imports the ServerApp, likewise."""
    return _load(app.directory, app.serverapp, ServerApp)


def _load(directory: Path, reference: str, kind: type[A]) -> A:
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))
    module = reference.partition(":")[0]
    try:
        found = load_app(reference, AppError, directory)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            raise AppError(f"{directory} has no module {error.name!r}, which {reference!r} names") from None
        raise
    except AppError as error:  # Flower's, with an explanation of references below it
        raise AppError(f"{directory}: {str(error).partition(chr(10))[0]}, which {reference!r} names") from None
    if not isinstance(found, kind):
        raise AppError(f"{reference!r} in {directory} is a {type(found).__name__}, not a {kind.__name__}")
    return found
