"""A server and devices as processes of this machine: what the demo, the tests and the benchmarks stand on."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from fedpace.certs.authority import init_authority, issue_device
from fedpace.certs.identity import Identity, load_identity
from fedpace.errors import RunError
from fedpace.hosting.processes import DIES_WITH_PARENT

_LISTENING = re.compile(r"listening on (\S+:\d+)")


class LocalFleet:
    """Starts `fedpace server` and `fedpace client` processes, each with a log file, and leaves none behind.

    Everything lies under `directory`: certs/, state/, out/, logs/. Use it as a context manager.
    """

    def __init__(
        self, directory: Path, app: Path, *, insecure: bool = False, environment: Mapping[str, str] | None = None
    ) -> None:
        self.directory = directory
        self.app = app
        self.out = directory / "out"
        self.address = ""
        self.server: subprocess.Popen[bytes] | None = None
        self.devices: dict[str, subprocess.Popen[bytes]] = {}
        self._insecure = insecure
        self._environment = {**os.environ, DIES_WITH_PARENT: "1", **(environment or {})}
        (directory / "logs").mkdir(parents=True, exist_ok=True)
        if not insecure:
            init_authority(directory / "certs")

    def log(self, name: str) -> str:
        """What a process has logged so far; the server's name is `server`."""
        with contextlib.suppress(FileNotFoundError):
            return (self.directory / "logs" / f"{name}.log").read_text(encoding="utf-8", errors="replace")
        return ""

    def operator(self) -> Identity | None:
        """The identity that may ask about the fleet."""
        return None if self._insecure else load_identity(self.directory / "certs", expect_role="operator")

    def start_server(self, *options: str, address: str = "127.0.0.1:0", seconds: float = 60.0) -> str:
        """Starts the server and waits until it listens. Returns its address. Raises RunError where it does not."""
        arguments = ["server", "--app", str(self.app), "--address", address, "--out", str(self.out)]
        arguments += ["--state", str(self.directory / "state" / "server"), *self._security(), *options]
        self.server = self._start("server", arguments)
        until = time.monotonic() + seconds
        while (found := _LISTENING.search(self.log("server"))) is None:
            if self.server.poll() is not None or time.monotonic() > until:
                raise RunError(f"the server did not start:\n{self.log('server')}")
            time.sleep(0.02)
        self.address = found[1]
        return self.address

    def start_device(
        self, name: str, *options: str, node_config: str = "", app: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """Starts a device, or starts it again; its certificate is made the first time."""
        if not self._insecure and not (self.directory / "certs" / "devices" / name).exists():
            issue_device(self.directory / "certs", name)
        arguments = ["client", "--server", self.address, "--app", str(app or self.app), "--name", name]
        arguments += ["--state", str(self.directory / "state" / name), "--node-config", node_config]
        process = self._start(name, [*arguments, *self._security(), *options])
        self.devices[name] = process
        return process

    def _security(self) -> list[str]:
        return ["--insecure"] if self._insecure else ["--certs", str(self.directory / "certs")]

    def _start(self, name: str, arguments: list[str]) -> subprocess.Popen[bytes]:
        log = (self.directory / "logs" / f"{name}.log").open("ab")
        with log:
            return subprocess.Popen(
                [sys.executable, "-m", "fedpace", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )

    def wait(self, seconds: float) -> int:
        """Waits for the server to end by itself. Returns its exit code. Raises RunError where it does not."""
        assert self.server is not None, "start_server comes first"
        try:
            return self.server.wait(seconds)
        except subprocess.TimeoutExpired:
            raise RunError(f"the server has not ended after {seconds:g} s:\n{self.log('server')[-4000:]}") from None

    def stop_device(self, name: str, *, seconds: float = 10.0) -> int:
        """Lets a device leave gracefully, and waits until it has. Returns its exit code."""
        process = self.devices[name]
        _stop([process], seconds)
        return process.returncode

    def stop(self, *, seconds: float = 10.0) -> None:
        """Ends every process: politely, then, after so many seconds, not."""
        running = [*self.devices.values(), *([self.server] if self.server is not None else [])]
        _stop(running, seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(seconds=5.0)


def _stop(processes: Iterable[subprocess.Popen[bytes]], seconds: float) -> None:
    processes = list(processes)
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    until = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
