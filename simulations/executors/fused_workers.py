"""Who runs chunks: this process, or worker processes that share the data and the models with it.

Models go to workers and come back in shared memory, in blocks that are handed over once and used again and again.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import pickle
import signal
import traceback
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import connection, get_context, reduction
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np

from fedpace.clients.training.declaration import LocalTraining
from fedpace.errors import ConfigError, RunError
from fedpace.simulations.executors.blocks import Block, Blocks, Shared, mapped, share
from fedpace.simulations.executors.chunks import ChunkRunner, Done
from fedpace.simulations.executors.schedule import Chunk
from fedpace.simulations.executors.structure import Floats

Settings = tuple[str, int, bool]
"""What a `ChunkRunner` is told beside the training: device, width, compiled or not."""

_START_SECONDS = 300.0
_STOP_SECONDS = 5.0


@dataclass(frozen=True)
class Job:
    """A chunk of which the first device has row `start` of a matrix."""

    kind: str
    chunk: Chunk
    start: int


class Engine(Protocol):
    def matrix(self, rows: int, size: int) -> Floats:
        """Room for models, of shape (rows, size), that `run` can work in."""

    def run(self, jobs: Sequence[Job], matrix: Floats) -> list[Done]:
        """What came of each job. Raises RunError where a worker is lost."""

    def close(self) -> None:
        """Ends what was started."""


class Here:
    """This process."""

    def __init__(self, runner: ChunkRunner) -> None:
        self._runner = runner
        self._blocks = Blocks()  # whose memory is taken again, which costs less than new memory

    def matrix(self, rows: int, size: int) -> Floats:
        return self._blocks.matrix(rows, size)

    def run(self, jobs: Sequence[Job], matrix: Floats) -> list[Done]:
        return [_run(self._runner, job, matrix) for job in jobs]

    def close(self) -> None:
        """There is nothing to end."""


class Workers:
    """Warm processes, each with the data and the programs. They end with this object, and with this process."""

    def __init__(self, training: LocalTraining, settings: Settings, count: int) -> None:
        self._blocks = Blocks()
        self._workers: list[_Worker] = []
        self._finalizer = weakref.finalize(self, _stop, self._workers)
        try:
            shared, block = share(training.federation)
            for number in range(count):
                self._workers.append(_Worker(number, (training, shared, settings)))
            for worker in self._workers:
                worker.hand_over(block)
            for worker in self._workers:
                worker.receive(_START_SECONDS)
        except BaseException:
            self.close()
            raise

    def matrix(self, rows: int, size: int) -> Floats:
        return self._blocks.matrix(rows, size)

    def run(self, jobs: Sequence[Job], matrix: Floats) -> list[Done]:
        if not self._finalizer.alive:
            raise RunError("fused: the workers have been ended")
        block = self._blocks.block_of(matrix)
        waiting = deque(enumerate(jobs))
        found: dict[int, Done] = {}
        at_work: dict[_Worker, int] = {}
        try:
            while waiting or at_work:
                for worker in self._workers:
                    if waiting and worker not in at_work:
                        at_work[worker], job = waiting.popleft()
                        worker.start(job, block, matrix.shape, self._blocks.numbers())
                for worker in _ready(list(at_work)):
                    found[at_work.pop(worker)] = worker.receive()
        except BaseException:
            self.close()  # what is on its way would be taken for answers to the next cohort
            raise
        return [found[number] for number in range(len(jobs))]

    def close(self) -> None:
        self._finalizer()


class _Worker:
    """The parent's end of a worker process."""

    def __init__(self, number: int, arguments: tuple[LocalTraining, Shared, Settings]) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.name = f"worker {number} of the fused executor"
        self.process = context.Process(
            target=_work, args=(number, theirs, *arguments), name=f"fused-{number}", daemon=True
        )
        self._has: set[int] = set()
        try:
            self.process.start()
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            self.connection.close()
            raise ConfigError(
                f"fused: the declared training cannot go to worker processes ({error}): make its model, data and loss of "
                "functions and classes at the top of a module, or use one worker"
            ) from error
        finally:
            theirs.close()

    def start(self, job: Job, block: Block, shape: tuple[int, ...], live: set[int]) -> None:
        """`live` are the blocks that there are: others are forgotten there too."""
        new = block.number not in self._has
        self._send((job, block.number, block.size if new else 0, shape, self._has - live))
        self._has &= live
        if new:
            self.hand_over(block)
            self._has.add(block.number)

    def receive(self, seconds: float | None = None) -> Any:
        """Its answer. Raises RunError where it has died, failed, or said nothing for so long."""
        try:
            if seconds is not None and not self.connection.poll(seconds):
                raise RunError(f"fused: {self.name} was not ready in {seconds:g} s")
            error, answer = self.connection.recv()
        except (EOFError, OSError):
            raise self._lost() from None
        if error:
            raise RunError(f"fused: {self.name} failed:\n{error}")
        return answer

    def _send(self, message: Any) -> None:
        try:
            self.connection.send(message)
        except OSError:
            raise self._lost() from None

    def hand_over(self, block: Block) -> None:
        assert self.process.pid is not None  # it has been started
        try:
            reduction.send_handle(self.connection, block.descriptor, self.process.pid)
        except OSError:
            raise self._lost() from None

    def _lost(self) -> RunError:
        self.process.join(_STOP_SECONDS)
        code = self.process.exitcode
        how = (
            "does not answer" if code is None else f"was ended by signal {-code}" if code < 0 else f"ended with {code}"
        )
        return RunError(f"fused: {self.name} (process {self.process.pid}) {how}; if memory is short, use fewer workers")


def _ready(workers: list[_Worker]) -> list[_Worker]:
    """Those that have an answer, or are gone. A dead process closes its end, which wakes this."""
    ready = connection.wait([worker.connection for worker in workers])
    return [worker for worker in workers if worker.connection in ready]


def _stop(workers: list[_Worker]) -> None:
    """They end when nobody is at the other end; what does not is killed."""
    for worker in workers:
        worker.connection.close()
    for worker in workers:
        if worker.process.pid is None:
            continue
        worker.process.join(_STOP_SECONDS)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
    workers.clear()


def _run(runner: ChunkRunner, job: Job, matrix: Floats) -> Done:
    """Where devices fail together, they are run alone: only those whose own work fails then do."""
    rows, chunk = matrix[job.start : job.start + len(job.chunk)], job.chunk
    try:
        return runner.run(job.kind, chunk, rows)
    except Exception as error:  # noqa: BLE001 - whatever the model's and the loss's code raises
        if len(chunk) == 1:
            return Done(np.full((2, 1), np.nan), {0: f"{type(error).__name__}: {error}"})
    alone = [
        _run(runner, Job(job.kind, chunk.part(slice(at, at + 1)), job.start + at), matrix) for at in range(len(chunk))
    ]
    failures = {at: done.failures[0] for at, done in enumerate(alone) if done.failures}
    return Done(np.concatenate([done.found for done in alone], axis=1), failures)


def _work(number: int, parent: Connection, training: LocalTraining, shared: Shared, settings: Settings) -> None:
    """A worker process: runs jobs until nobody is at the other end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; the parent decides
    if number > 0:
        logging.disable(logging.WARNING)  # the first one says what there is to say
    with contextlib.suppress(EOFError, OSError):
        try:
            data = shared.value(mapped(reduction.recv_handle(parent), 0))
            runner = ChunkRunner(training.with_data(data), *settings)
        except Exception:  # noqa: BLE001 - whatever user code raises
            parent.send((traceback.format_exc(), None))
            return
        parent.send(("", None))
        memory: dict[int, mmap.mmap] = {}
        while True:
            job, block, size, shape, gone = parent.recv()
            for old in gone:
                del memory[old]
            if size:
                memory[block] = mapped(reduction.recv_handle(parent), size)
            matrix = np.frombuffer(memory[block], np.float32, count=shape[0] * shape[1]).reshape(shape)
            parent.send(("", _run(runner, job, matrix)))
