"""Flower's legacy server, which calls the grid from many threads, on a grid that is for one.

Its threads still run, but one at a time and in the order they were submitted: a thread that waits for answers lets the
next one go on, and once all of them wait the grid's time passes. So a simulation repeats, whatever the machine does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import SimpleNamespace, TracebackType
from typing import Any, Protocol, Self

from flwr.server import server as legacy_server
from flwr.server.client_manager import ClientManager
from flwr.server.compat import app as compat_app
from flwr.server.compat import app_utils
from flwr.server.workflow import default_workflows
from flwr.serverapp import Grid

from fedpace.hosting.virtualtime import carried

_LOOK_SECONDS = 5.0
"""Flower looks for new devices so often, in seconds."""


class WaitingGrid(Protocol):
    """What a grid does for threads in turn."""

    def now(self) -> float: ...

    def sleep(self, seconds: float) -> None: ...

    def pass_until(self, until: float) -> None:
        """Lets time pass to the next event, or to `until`."""


class _Member:
    """A job, in a thread of its own. While it waits, `ready` says whether it can go on, and `until` when it must."""

    def __init__(self, turns: Turns, future: Future[Any], job: Callable[[], Any]) -> None:
        self.waits = False
        self.ready: Callable[[], bool] = lambda: True
        self.until = float("inf")
        self.go = threading.Semaphore(0)
        self._turns, self._future, self._job = turns, future, job
        self.thread = threading.Thread(target=carried(self._run), daemon=True)

    def _run(self) -> None:
        self.go.acquire()
        self._turns.current.member = self
        try:
            self._future.set_result(self._job())
        except BaseException as error:  # noqa: BLE001 - the job is user code, and its future tells
            self._future.set_exception(error)
        self.waits = False
        self._turns.back.release()


class Turns:
    """Who runs: one thread at a time, handed on where it would wait."""

    def __init__(self) -> None:
        self.back = threading.Semaphore(0)
        self.current = threading.local()

    @property
    def here(self) -> bool:
        """Whether the thread that asks is one of those that take turns."""
        return getattr(self.current, "member", None) is not None

    def wait(self, ready: Callable[[], bool], until: float) -> None:
        """In a thread that takes turns: lets the others run, until `ready()` or the time `until`."""
        member: _Member = self.current.member
        member.waits, member.ready, member.until = True, ready, until
        self.back.release()
        member.go.acquire()

    def run_all(self, members: Iterable[_Member], grid: WaitingGrid) -> None:
        """Runs jobs to their ends."""
        members = list(members)
        for member in members:
            member.thread.start()
            self._let(member)
        waiting = [member for member in members if member.waits]
        while waiting:
            going = [member for member in waiting if member.until <= grid.now() or member.ready()]
            for member in going:
                self._let(member)
            waiting = [member for member in waiting if member.waits]
            if waiting and not going:
                grid.pass_until(min(member.until for member in waiting))

    def _let(self, member: _Member) -> None:
        member.waits = False
        member.go.release()
        self.back.acquire()


@contextmanager
def in_turns(grid: WaitingGrid) -> Iterator[Turns]:
    """Inside, Flower's legacy server works on `grid` in turns, however many workers it was told to use."""
    turns = Turns()
    jobs: dict[Future[Any], _Member] = {}

    def wait(fs: Iterable[Future[Any]], timeout: float | None = None) -> tuple[list[Future[Any]], list[Future[Any]]]:
        """All of them, in the order submitted: whoever adds results up gets the same bits each time."""
        wanted = set(fs)
        futures = [future for future in jobs if future in wanted]
        turns.run_all([jobs.pop(future) for future in futures], grid)
        return futures, []

    class Pool:
        """In place of a ThreadPoolExecutor: nothing begins before somebody waits for it."""

        def __init__(self, max_workers: int | None = None) -> None:
            pass

        def __enter__(self) -> Self:
            return self

        def __exit__(
            self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
        ) -> None:
            wait(list(jobs))

        def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
            future: Future[Any] = Future()
            jobs[future] = _Member(turns, future, lambda: function(*args))
            return future

    def follow_nodes(
        of_grid: Grid, manager: ClientManager
    ) -> tuple[threading.Thread, threading.Event, threading.Event]:
        """In place of a thread that looks for devices: they are looked for whenever they are asked for."""
        stop, done = threading.Event(), threading.Event()
        stop.set()
        app_utils._update_client_manager(of_grid, manager, stop, done)

        def wait_for(num_clients: int, timeout: float = 86_400) -> bool:
            until = grid.now() + timeout
            while manager.num_available() < num_clients:
                if grid.now() >= until:
                    return False
                grid.sleep(_LOOK_SECONDS)
            return True

        manager.wait_for = wait_for  # type: ignore[method-assign]
        thread = threading.Thread(target=done.wait)
        thread.start()
        return thread, stop, done

    futures = SimpleNamespace(ThreadPoolExecutor=Pool, wait=wait, Future=Future)
    changes: list[tuple[Any, str, Any]] = [
        (legacy_server, "concurrent", SimpleNamespace(futures=futures)),
        (compat_app, "start_update_client_manager_thread", follow_nodes),
        (default_workflows, "start_update_client_manager_thread", follow_nodes),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield turns
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
