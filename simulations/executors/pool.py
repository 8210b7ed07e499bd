"""Executor `pool`: any ClientApp, in warm processes, one computation after another in each."""

from __future__ import annotations

import itertools
import logging
import math
import select
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedpace.errors import AppError, PayloadError, RunError
from fedpace.hosting.app import load_app_folder
from fedpace.hosting.config import Config
from fedpace.hosting.processes import processors
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.failures import Code
from fedpace.protocol.records import Buffers, encode
from fedpace.simulations.executors.device import unreadable
from fedpace.simulations.executors.hired import Hired, Job, Setup
from fedpace.simulations.executors.packing import PackedContent, failed_answer, make_offer
from fedpace.simulations.executors.peer import Parts
from fedpace.simulations.executors.segments import Arena
from fedpace.simulations.executors.worker import LOADED
from fedpace.simulations.work import Answer, Computation, Content

log = logging.getLogger("fedpace.simulations")

START_SECONDS = 120.0
_TELL_SECONDS = 60.0
_DEATHS = 2
_AHEAD, _AHEAD_SECONDS = 8, 0.02
"""So many jobs, and of about so many seconds together, wait in a worker at most."""


class PoolExecutor:
    """The app in a folder, run as any of `devices` devices by `workers` processes (one a processor, if not said).

    Arrays lie in memory that all share: a model is written once, a reply is read where its worker put it. Each
    computation is seeded by itself and runs on one thread, so the answers do not depend on the number of workers.
    A worker that dies costs nothing but time; a computation of which two died fails. Used from one thread.
    """

    cohort = 64
    keeps_state = True
    _count = itertools.count()

    def __init__(
        self,
        app: Path,
        run_id: int,
        devices: int,
        run_config: Config | None = None,
        *,
        workers: int | None = None,
        check_updates: bool = True,
    ) -> None:
        """Raises AppError for a folder that is no app, or whose ClientApp cannot be loaded, and RunError where workers
        cannot be started."""
        folder = load_app_folder(app)
        self._setup = Setup(folder.directory, run_id, devices, run_config or {}, check_updates)
        self._wanted = workers or processors()
        self._arena = Arena()
        self._kept = f"pool {next(self._count)}"
        self._gone: deque[list[pb.Blob]] = deque()
        self._poll = select.poll()
        self._workers: dict[int, Hired] = {}
        self._seconds = math.inf  # that a computation took a worker in the last run
        self._start_all()

    def steps(self, device: int, message_type: str, config: Mapping[str, Any]) -> float | None:
        return None

    @property
    def pids(self) -> list[int]:
        """The processes that work now."""
        return [worker.pid for worker in self._workers.values()]

    def close(self) -> None:
        self._end_all()
        self._arena.close()

    # ------------------------------------------------------------ computations

    def run(self, computations: Sequence[Computation]) -> list[Answer]:
        """As the contract says. A Ctrl-C passes through, and ends the workers; the next `run` starts others.

        Raises RunError where a worker that is to take the place of another cannot be started.
        """
        answers: dict[int, Answer] = {}
        jobs = self._jobs(computations, answers)
        try:
            self._start_all()
            began = time.monotonic()
            job = next(jobs, None)
            while len(answers) < len(computations):
                for worker in self._workers.values():
                    given: list[Job] = []
                    while job is not None and worker.takes(job, given, self._ahead):
                        given.append(job)
                        job = next(jobs, None)
                    worker.give(given)
                if len(answers) < len(computations):
                    self._listen(answers)
        except BaseException:
            self._end_all()  # what they still answer nobody waits for
            raise
        if computations:
            self._seconds = (time.monotonic() - began) * len(self._workers) / len(computations)
        return [answers[index] for index in range(len(computations))]

    @property
    def _ahead(self) -> int:
        """How many jobs wait in each worker: of long ones, one, so that in the end all workers are done at about the same
        time; of short ones more, so that this process need not wake for each."""
        return max(1, min(_AHEAD, int(_AHEAD_SECONDS / self._seconds)))

    def _jobs(self, computations: Sequence[Computation], answers: dict[int, Answer]) -> Iterator[Job]:
        """The computations as jobs; those that cannot be sent are answered here."""
        while self._gone:
            self._arena.release(self._gone.popleft())
        for index, computation in enumerate(computations):
            try:
                payload = self._packed(computation.content).payload(computation.config_name, computation.config)
                state = pb.Payload() if computation.state is None else encode(computation.state, self._arena.put)
            except PayloadError as error:
                answers[index] = failed_answer(unreadable(error))
                continue
            yield Job(index, computation, make_offer(self._setup.run_id, computation, payload), state)

    def _packed(self, content: Content) -> PackedContent:
        """What is sent to many alike is written once, and given up when the content is."""
        if self._kept not in content.kept:
            written: list[pb.Blob] = []

            def put(buffers: Buffers) -> pb.Blob:
                written.append(self._arena.put(buffers))
                return written[-1]

            content.kept[self._kept] = PackedContent(content.records, put, self._arena.get)
            weakref.finalize(content, self._gone.append, written).atexit = False
        found: PackedContent = content.kept[self._kept]
        return found

    def _listen(self, answers: dict[int, Answer]) -> None:
        """Waits until a worker has something to say, or has died; where all have much to do, until half of that is done."""
        waiting = min(len(worker.jobs) for worker in self._workers.values()) - 1
        if waiting > 1:
            time.sleep(waiting / 2 * min(self._seconds, _AHEAD_SECONDS / _AHEAD))
        ready = self._poll.poll(_TELL_SECONDS * 1000)
        for descriptor, _ in ready:
            worker = self._workers[descriptor]
            self._take(worker, worker.peer.receive(), answers)
            while worker.peer.has_more:
                self._take(worker, worker.peer.receive(), answers)
        if not ready:
            busy = [worker.jobs[0].computation.task for worker in self._workers.values() if worker.jobs]
            log.info("nothing for %g s; at work on the tasks %s", _TELL_SECONDS, busy)

    def _take(self, worker: Hired, parts: Parts | None, answers: dict[int, Answer]) -> None:
        """What a worker says, or that it has died."""
        if parts is None:
            self._replace(worker, answers)
        elif parts[0] == LOADED:
            worker.loaded = True
            if parts[1]:
                raise AppError(f"{self._setup.app}: the ClientApp cannot be loaded: {parts[1].decode()}")
        else:
            job, answer = worker.answer(parts)
            answers[job.index] = answer
            self._arena.release(job.state_blobs)

    # ------------------------------------------------------------ workers

    def _replace(self, dead: Hired, answers: dict[int, Answer]) -> None:
        """Another worker takes over the jobs of one that died: the first had begun, the others had not."""
        how = self._end(dead)
        if not dead.loaded:
            raise RunError(f"a worker process of the pool {how} before it had loaded {self._setup.app}")
        if dead.jobs:
            first = dead.jobs[0]
            first.deaths += 1
            task = f"task {first.computation.task} of device {first.computation.device}"
            if first.deaths < _DEATHS:
                log.warning("worker %d %s during %s, which is run again", dead.pid, how, task)
            else:
                log.warning("worker %d %s during %s, as one did before: the task has failed", dead.pid, how, task)
                reason = f"the process that ran the ClientApp {how}, and so did another one before"
                answers[dead.jobs.popleft().index] = Answer(None, code=Code.CLIENT_APP_CRASHED, reason=reason)
                self._arena.release(first.state_blobs)
        worker = self._start()
        worker.give(dead.jobs)

    def _start_all(self) -> None:
        """Starts the workers that are missing, and waits until all are ready."""
        deadline = time.monotonic() + START_SECONDS
        try:
            while len(self._workers) < self._wanted:
                self._start()
            while not all(worker.loaded for worker in self._workers.values()):
                if time.monotonic() > deadline:
                    raise RunError(f"the ClientApp of {self._setup.app} is not loaded after {START_SECONDS:g} s")
                self._listen({})
        except BaseException:
            self._end_all()
            raise

    def _start(self) -> Hired:
        try:
            worker = Hired(self._setup, self._arena)
        except OSError as error:
            raise RunError(f"a worker process of the pool cannot be started: {error}") from error
        self._workers[worker.peer.fileno()] = worker
        self._poll.register(worker.peer.fileno(), select.POLLIN)
        return worker

    def _end(self, worker: Hired) -> str:
        self._poll.unregister(worker.peer.fileno())
        del self._workers[worker.peer.fileno()]
        return worker.end()

    def _end_all(self) -> None:
        for worker in list(self._workers.values()):
            self._end(worker)
            for job in worker.jobs:
                self._arena.release(job.state_blobs)
