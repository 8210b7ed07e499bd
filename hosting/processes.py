"""Child processes that run user code: started with a socket to their parent, and never outliving it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import logging
import os
import signal
import socket
import sys
from dataclasses import dataclass
from typing import IO

from google.protobuf.message import Message

from fedpace.protocol.frames import frame

_PR_SET_PDEATHSIG = 1
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
SOCKET_OPTION = "--socket"
DIES_WITH_PARENT = "FEDPACE_DIES_WITH_PARENT"
"""Environment variable, set to 1, that makes a `fedpace` command end with the process that started it."""


@dataclass
class Child:
    """A running child. `reader` ends when the child closes its socket or dies."""

    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.returncode is None

    def send(self, message: Message) -> None:
        """Queues a message. A child that is gone takes it silently: its end is seen by whoever reads."""
        if not self.writer.is_closing():
            self.writer.write(frame(message))

    def kill(self) -> None:
        """Ends the child and whatever it started, at once."""
        self.writer.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    async def wait(self) -> int:
        """Its exit status; negative for the signal that ended it."""
        return await self.process.wait()


async def start_child(
    module: str,
    *,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
    environment: dict[str, str] | None = None,
) -> Child:
    """Starts `python -m module --socket FD` in a session of its own, with a socket pair to it.

    Raises OSError where the system refuses another process.
    """
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, 1 << 20)
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            SOCKET_OPTION,
            str(theirs.fileno()),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=_with_malloc_settings(environment),
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            limit=1 << 20,
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    reader, writer = await asyncio.open_connection(sock=ours, limit=1 << 22)
    return Child(process, reader, writer)


def _with_malloc_settings(environment: dict[str, str] | None) -> dict[str, str]:
    """Lets glibc take large arrays in pages of 2 MiB (one of 100 MB costs 50 faults, not 25,000), and keep, from the
    start, what it would come to keep by itself: the next task's arrays need no pages that the system clears first."""
    settings = {
        "glibc.malloc.hugetlb": 1,
        "glibc.malloc.mmap_threshold": 32 << 20,
        "glibc.malloc.trim_threshold": 64 << 20,
    }
    tunables = ":".join(f"{name}={value}" for name, value in settings.items())
    return {"GLIBC_TUNABLES": tunables, **(os.environ if environment is None else environment)}


def die_with_parent() -> None:
    """Asks the system, where it is Linux, to kill this process when the thread that started it ends."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_chunks_on_the_heap() -> None:
    """Lets this process, where its C library is glibc, reuse the memory of one chunk of a blob for the next.

    By default glibc gives every MiB back to the system and asks for it anew, page by page: for an agent that moves
    100 MB this was a third of the system's time.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 4 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 16 << 20)


def log_to_stderr() -> None:
    """In the child: fedpace's own log lines go to standard error as they are. Flower and the app log as they like."""
    handler = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("fedpace")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def parent_socket(arguments: list[str]) -> socket.socket:
    """In the child: the socket to its parent. Raises SystemExit where there is none."""
    if len(arguments) != 2 or arguments[0] != SOCKET_OPTION:
        raise SystemExit("this module is started by fedpace itself, not by hand")
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = socket.socket(fileno=int(arguments[1]))
    # A child that user code forks must not hold this end open: the parent would not see this process die.
    os.register_at_fork(after_in_child=functools.partial(os.close, connection.fileno()))
    return connection
