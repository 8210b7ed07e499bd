"""What tests of whole fleets stand on: real processes, and a ServerApp on strings that does what the test says."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO, TypeVar

from fedpace.certs.authority import issue_device
from fedpace.certs.identity import Identity, load_identity, node_id
from fedpace.hosting.app import load_app_folder
from fedpace.localfleet import LocalFleet
from tests.raw_device import SECONDS, RawDevice

T = TypeVar("T")
Settings = Mapping[str, float | bool]

QUICK_SERVER: Settings = {
    "heartbeat-seconds": 0.3,
    "lost-after-seconds": 3,
    "reconnect-grace-seconds": 1,
    "drain-seconds": 3,
}
"""A server that does not wait long for those that are gone, nor a device for a server that is."""
QUICK_DEVICE: Settings = {"backoff-max-seconds": 1, "drain-seconds": 20}


def wait_for(look: Callable[[], T | None], what: str, seconds: float = SECONDS) -> T:
    """What `look` finds, as soon as it finds something that is neither None nor false."""
    until = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < until, f"{what}: not within {seconds:g} s"
        time.sleep(0.02)
    return found


def copy_app(
    target: Path,
    *,
    server: Settings | None = None,
    device: Settings | None = None,
    change: tuple[str, str, str] | None = None,
) -> Path:
    """The misbehaving app with settings of its own; `change` replaces a text in one of its files (name, old, new)."""
    source = Path(__file__).with_name("flower") / "misbehaving"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    with (target / "pyproject.toml").open("a") as file:
        for table, settings in (("server", server), ("device", device)):
            file.write(f"\n[tool.fedpace.{table}]\n")
            file.writelines(f"{key} = {json.dumps(value)}\n" for key, value in (settings or {}).items())
    if change is not None:
        name, old, new = change
        text = (target / name).read_text()
        assert old in text
        (target / name).write_text(text.replace(old, new))
    return target


class PuppetFleet(LocalFleet):
    """A fleet whose ServerApp does what the test says: see tests/flower/misbehaving."""

    def __init__(self, directory: Path, *, server: Settings | None = None, device: Settings | None = None) -> None:
        super().__init__(directory, copy_app(directory / "app", server=server, device=device))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(SECONDS)
        self._strings: TextIO | None = None

    @property
    def authority(self) -> Path:
        return self.directory / "certs"

    def start(self, *options: str, address: str = "127.0.0.1:0") -> Self:
        """Starts the server, whose ServerApp waits for no device."""
        config = f"port={self._listener.getsockname()[1]}"
        self.start_server("--min-nodes", "0", "--run-config", config, *options, address=address)
        self._strings = None
        return self

    def order(self, do: str, **what: Any) -> Any:
        """Has the ServerApp do something. Returns its answer."""
        self.send_order(do, **what)
        return self.read_answer()

    def send_order(self, do: str, **what: Any) -> None:
        if self._strings is None:
            connection, _ = self._listener.accept()
            connection.settimeout(2 * SECONDS)
            self._strings = connection.makefile("rw")
            connection.close()
        self._strings.write(json.dumps({"do": do, **what}) + "\n")
        self._strings.flush()

    def read_answer(self) -> Any:
        assert self._strings is not None
        return json.loads(self._strings.readline() or "null")

    def join(self, name: str, *options: str, app: Path | None = None) -> None:
        """Starts a device and waits until the ServerApp sees it."""
        self.start_device(name, *options, app=app)
        self.wait_node(name)

    def wait_node(self, name: str, *, there: bool = True) -> None:
        """Waits until the ServerApp sees a device, or sees it no more."""
        wait_for(
            lambda: (node_id(name) in self.order("nodes")) is there, f"{name} there: {there}\n{self.log('server')}"
        )

    def push(
        self,
        name: str,
        do: str = "well",
        *,
        kind: str = "train",
        size: int = 3,
        records: int = 1,
        ttl: float | None = None,
        **order: Any,
    ) -> str:
        """Sends a device a message: `records` models of `size` ones, and an order for its ClientApp."""
        order = {"do": do, **order}
        sent: str = self.order("push", node=node_id(name), kind=kind, order=order, size=size, records=records, ttl=ttl)
        return sent

    def pull(self, message_id: str, seconds: float = SECONDS) -> dict[str, Any]:
        """The answer to a message, as the ServerApp sees it."""
        found: dict[str, Any] | None = self.order("pull", message_id=message_id, seconds=seconds)
        assert found is not None, f"no answer to message {message_id} within {seconds} s:\n{self.log('server')}"
        return found

    def ask(self, name: str, do: str = "well", **order: Any) -> dict[str, Any]:
        """Sends a device a message and waits for the answer."""
        return self.pull(self.push(name, do, **order))

    def wait_log(self, name: str, text: str, *, count: int = 1, seconds: float = SECONDS) -> str:
        """Waits until a process has logged a text so many times. Returns its log."""
        with contextlib.suppress(AssertionError):
            wait_for(lambda: self.log(name).count(text) >= count, text, seconds)
        log = self.log(name)
        assert log.count(text) >= count, (
            f"{name} did not log {text!r} {count} times within {seconds:g} s:\n{log[-3000:]}"
        )
        return log

    def check_log(self, name: str) -> None:
        """Whatever went wrong is told in sentences."""
        log = self.log(name)
        for word in ("Traceback", "never retrieved", "was destroyed"):
            assert word not in log, log[-3000:]

    def result(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / "result.json").read_text())
        return found

    def end(self) -> dict[str, Any]:
        """Lets the ServerApp return. Returns the run's result."""
        self.send_order("return")
        assert self.wait(SECONDS) == 0, self.log("server")
        return self.result()

    def identity(self, name: str) -> Identity:
        """A device's identity; its certificate is made where it has none."""
        if not (self.authority / "devices" / name).exists():
            issue_device(self.authority, name)
        return load_identity(self.authority, expect_role="device", name=name)

    @contextlib.contextmanager
    def raw(self, name: str) -> Iterator[RawDevice]:
        """A device of this fleet that is not ours."""
        with RawDevice(self.address, self.identity(name), load_app_folder(self.app)) as device:
            yield device

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._strings is not None:
            self._strings.close()  # the ServerApp returns, and its server has nothing to wait for
        super().__exit__(kind, error, trace)
        self._listener.close()
