"""A network line that breaks when a test says so."""

from __future__ import annotations

import contextlib
import math
import socket
import threading
from typing import Self

from tests.raw_device import SECONDS

_UNLIMITED = {"up": math.inf, "down": math.inf}


class BadLine:
    """A TCP line to an address that can be cut, after some bytes too, or held: then nothing passes from the device."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: set[socket.socket] = set()
        self._flowing = threading.Event()
        self._flowing.set()
        self._left = dict(_UNLIMITED)
        self._limits: list[dict[str, float]] = []
        self.passed = {"up": 0, "down": 0}
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def hold(self) -> None:
        self._flowing.clear()

    def cut_after(self, *, times: int = 1, up: float = math.inf, down: float = math.inf) -> None:
        """Cuts the line once so many bytes have gone `up` to the server or `down` to the device; so many times."""
        self._limits = [{"up": up, "down": down}] * (times - 1)
        self._left = {"up": up, "down": down}

    def cut(self) -> None:
        self.cuts += 1
        self._left = dict(self._limits.pop() if self._limits else _UNLIMITED)
        for end in list(self._sockets):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._sockets.clear()
        self._flowing.set()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target, SECONDS)
                far.settimeout(None)
                self._sockets |= {near, far}
                for source, sink, way in ((near, far, "up"), (far, near, "down")):
                    threading.Thread(target=self._pump, args=(source, sink, way), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        with contextlib.suppress(OSError), source:
            while data := source.recv(1 << 16):
                if way == "up":
                    self._flowing.wait(SECONDS)
                self._left[way] -= len(data)
                if self._left[way] < 0:
                    self.cut()
                    return
                self.passed[way] += len(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.close()
        self.cut()
