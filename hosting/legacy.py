"""Flower's legacy server on a grid in virtual time.

It asks each device from a thread of its own, as many at a time as this machine has processors, and waits for devices on
the wall's clock: virtual time would pass as the threads happen to run. Here its threads take turns instead. One runs at
a time, in the order of the clients; each goes on until it is done or asks its device. Then all that was asked goes out
at once, and each thread goes on with its answer.
"""

from __future__ import annotations

import concurrent.futures
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from flwr.app import Message
from flwr.server import SimpleClientManager
from flwr.serverapp import Grid

from fedpace.hosting.flower import legacy_server
from fedpace.hosting.virtualtime import same_time

_LOOK_SECONDS = 1.0

_here = threading.local()


class Turn(concurrent.futures.Future[Any]):
    """One call in a thread of its own, which runs only while `go_on` waits for it."""

    def __init__(self, number: int, call: Callable[[], Any]) -> None:
        super().__init__()
        self.number = number
        self.asked: list[Message] = []
        self._call = same_time(call)
        self._answers: list[Message] | BaseException = []
        self._begin, self._pause = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def go_on(self, answers: list[Message] | BaseException) -> None:
        """Lets it go on until it asks something or is done. What it asked is answered, or raises an exception."""
        self.asked, self._answers = [], answers
        self._begin.release()
        self._pause.acquire()
        if self.done():
            self._thread.join()

    def ask(self, messages: Iterable[Message]) -> list[Message]:
        """Called by the thread itself."""
        if not (messages := list(messages)):
            return []
        self.asked = messages
        self._pause.release()
        self._begin.acquire()
        if isinstance(self._answers, BaseException):
            raise self._answers
        return self._answers

    def _run(self) -> None:
        self._begin.acquire()
        _here.turn = self
        try:
            self.set_result(self._call())
        except BaseException as error:  # noqa: BLE001 - for whoever asks for the result
            self.set_exception(error)
        self._pause.release()


def turn_of_this_thread() -> Turn | None:
    """What to ask instead of the grid, in a thread that takes turns."""
    turn: Turn | None = getattr(_here, "turn", None)
    return turn


@contextmanager
def legacy_in_turns(grid: Grid, sleep: Callable[[float], None]) -> Iterator[None]:
    """Inside, Flower's legacy server works in turns, and waits for devices with `sleep(seconds)`.

    The grid must hand what is sent in a thread that takes turns to `turn_of_this_thread`.
    """

    def wait(fs: Iterable[Turn], timeout: float | None = None) -> tuple[list[Turn], list[Turn]]:
        turns = sorted(fs, key=lambda turn: turn.number)
        for turn in turns:
            turn.go_on([])
        while asking := [turn for turn in turns if turn.asked]:
            _answer(grid, asking)
        return turns, []

    def wait_for(self: SimpleClientManager, num_clients: int, timeout: float = 86_400) -> bool:
        for _ in range(int(timeout / _LOOK_SECONDS)):
            if len(self.clients) >= num_clients or self.num_available() >= num_clients:
                return True
            sleep(_LOOK_SECONDS)
        return False

    futures = types.SimpleNamespace(ThreadPoolExecutor=_Pool, wait=wait, Future=concurrent.futures.Future)
    before = legacy_server.concurrent, SimpleClientManager.wait_for
    legacy_server.concurrent = types.SimpleNamespace(futures=futures)
    SimpleClientManager.wait_for = wait_for  # type: ignore[method-assign]
    try:
        yield
    finally:
        legacy_server.concurrent, SimpleClientManager.wait_for = before  # type: ignore[method-assign]


def _answer(grid: Grid, asking: list[Turn]) -> None:
    """Sends what was asked, and lets each go on with its answers."""
    messages = [message for turn in asking for message in turn.asked]
    try:
        replies = {reply.metadata.reply_to_message_id: reply for reply in grid.send_and_receive(messages)}
    except BaseException as error:
        for turn in asking:
            turn.go_on(error)
        raise
    for turn in asking:
        ids = [message.metadata.message_id for message in turn.asked]
        turn.go_on([replies[message_id] for message_id in ids if message_id in replies])


class _Pool:
    """Stands for a ThreadPoolExecutor. How many processors this machine has is nothing to a fleet."""

    def __init__(self, max_workers: int | None = None) -> None:
        self._submitted = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """All has been waited for."""

    def submit(self, function: Callable[..., Any], *args: Any) -> Turn:
        self._submitted += 1
        return Turn(self._submitted, lambda: function(*args))
