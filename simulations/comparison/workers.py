"""Spreads runs over worker processes: which of them makes which run, and what happens when one dies.

Results do not depend on it: each run is a process of its own, seeded by its spec. A worker has one app prepared for one
seed, so a run goes to a worker that has its app where one is free.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from fedpace.errors import ConfigError, RunError
from fedpace.simulations.comparison.runs import Outcome, RunSpec, keep, partial_folder, read_run, write_run

_LOOK_SECONDS = 0.5
_PREPARING_SECONDS = 600.0
"""What an app's preparation is given beyond the time of a run."""
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
"""A run has one core. Compilers that start threads could not be forked."""


@dataclass(eq=False)
class _Worker:
    """`key`: the app that it has; `spec` and `folder`: the run it is at."""

    asks: int
    answers: int
    key: str
    pid: int = 0
    spec: RunSpec | None = None
    folder: Path = Path()
    since: float = 0.0
    used: float = 0.0
    heard: bytes = b""
    runs: int = 0


class Workers:
    """At most `count` runs at a time, into a comparison's folder. A context manager: at its end nothing that it started is
    left."""

    def __init__(self, directory: Path, count: int) -> None:
        self._directory, self._count = directory, count
        self._workers: list[_Worker] = []
        self._waiting: list[RunSpec] = []
        self._selector = selectors.DefaultSelector()
        self._nursery: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in list(self._workers):
            self._end(worker)
        self._selector.close()
        if self._nursery is not None and self._line is not None:
            self._line.close()
            self._nursery.kill()
            self._nursery.wait()

    def ask(self, specs: Sequence[RunSpec]) -> None:
        """Runs that are to be made, the first ones first if it makes no difference."""
        self._waiting.extend(specs)

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or any(worker.spec for worker in self._workers)

    def ended(self, look: Callable[[], None]) -> Iterator[tuple[RunSpec, Outcome]]:
        """Waits until a run has ended, and gives those that have. `look` is called at least every half a second.

        Raises ConfigError where an app cannot be run as the scenario says.
        """
        found: list[tuple[RunSpec, Outcome]] = []
        while self.busy and not found:
            self._assign()
            for event, _ in self._selector.select(_LOOK_SECONDS):
                worker: _Worker = event.data
                if (spec := self._heard(worker)) is not None:
                    found.append((spec, self._outcome(spec)))
            found += [(spec, self._outcome(spec)) for spec in self._late()]
            look()
        yield from found

    # ------------------------------------------------------------ runs to workers

    def _assign(self) -> None:
        """Gives waiting runs to workers: to one that has the app, else to a new one, if need be in the place of another."""
        while self._waiting and sum(worker.spec is not None for worker in self._workers) < self._count:
            idle = {worker.key: worker for worker in self._workers if worker.spec is None}
            spec = next((spec for spec in self._waiting if spec.app_key in idle), self._waiting[0])
            worker = idle.get(spec.app_key)
            if worker is None:
                if len(self._workers) >= 2 * self._count:  # as many again are kept, with what they have prepared
                    self._end(min(idle.values(), key=lambda worker: worker.used))
                worker = self._start(spec.app_key)
            self._waiting.remove(spec)
            self._give(worker, spec)

    def _start(self, key: str) -> _Worker:
        """A fork of the nursery, which is started with the first one."""
        if self._nursery is None or self._line is None:
            self._line, theirs = socket.socketpair()
            with theirs:
                self._nursery = subprocess.Popen(
                    [sys.executable, "-m", "fedpace.simulations.comparison.worker", str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env={**os.environ, **_ENVIRONMENT},
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # Ctrl-C is for the comparison alone
                )
        (asks_here, asks_there), (answers_there, answers_here) = os.pipe()[::-1], os.pipe()[::-1]
        try:
            socket.send_fds(self._line, [b"+"], [asks_there, answers_there])
        except BrokenPipeError:
            raise RunError("the process that runs are made from has died; start the comparison again") from None
        finally:
            os.close(asks_there)
            os.close(answers_there)
        worker = _Worker(asks_here, answers_here, key)
        self._workers.append(worker)
        self._selector.register(answers_here, selectors.EVENT_READ, worker)
        return worker

    def _give(self, worker: _Worker, spec: RunSpec) -> None:
        worker.spec, worker.folder, worker.since = spec, partial_folder(self._directory, spec), time.monotonic()
        asked = json.dumps({"spec": spec.to_plain(), "folder": str(worker.folder)})
        with contextlib.suppress(BrokenPipeError):  # it has died, which is heard soon
            os.write(worker.asks, asked.encode() + b"\n")

    # ------------------------------------------------------------ what becomes of them

    def _heard(self, worker: _Worker) -> RunSpec | None:
        """The run that a worker has ended, once it said so; one that died has ended its run too."""
        data = os.read(worker.answers, 1 << 16)
        spec = worker.spec
        if not data:
            self._end(worker)
            if spec is not None:
                self._close(worker, "its worker process died")
            return spec
        *lines, worker.heard = (worker.heard + data).split(b"\n")
        for line in lines:
            answer = json.loads(line)
            if "refused" in answer:
                raise ConfigError(answer["refused"])
            if "pid" in answer:
                worker.pid = answer["pid"]
            else:
                worker.runs += 1
                self._close(worker, answer["ended"])
                return spec
        return None

    def _close(self, worker: _Worker, died: str) -> None:
        """Keeps the folder of the run that a worker was at; of one whose process died, with the reason."""
        spec = worker.spec
        assert spec is not None
        if died:
            write_run(worker.folder, spec, Outcome("failed", died))
        keep(worker.folder, self._directory, spec)
        worker.spec, worker.used = None, time.monotonic()

    def _outcome(self, spec: RunSpec) -> Outcome:
        outcome = read_run(self._directory, spec)
        assert outcome is not None, f"{spec} was made, but is not there"
        return outcome

    def _late(self) -> Iterator[RunSpec]:
        """Runs that took too long, whose workers are ended."""
        now = time.monotonic()
        for worker in list(self._workers):
            spec = worker.spec
            if spec is None:
                continue
            patience = spec.wall_seconds + (0.0 if worker.runs else _PREPARING_SECONDS)
            if now - worker.since > patience:
                self._end(worker)
                self._close(worker, f"it took more than {spec.wall_seconds:g} s")
                yield spec

    def _end(self, worker: _Worker) -> None:
        """Ends a worker and the run that it is at."""
        self._workers.remove(worker)
        self._selector.unregister(worker.answers)
        os.close(worker.asks)
        os.close(worker.answers)
        if worker.pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
