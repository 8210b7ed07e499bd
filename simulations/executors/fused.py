"""`FusedExecutor`: the declared local work of many devices as one compiled program."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import MessageType

from fedpace.clients.training.declaration import CONFIG_KEYS, EVALUATION_BATCH, NO_SAMPLES, LocalRun, LocalTraining
from fedpace.errors import ConfigError
from fedpace.hosting.flower import ErrorCode
from fedpace.protocol.received import content_bytes
from fedpace.simulations.executors.chunks import ChunkRunner
from fedpace.simulations.executors.fused_workers import Here, Job, Workers
from fedpace.simulations.executors.schedule import Chunk
from fedpace.simulations.executors.structure import Floats
from fedpace.simulations.executors.updates import MetricsUpdate, Reply, RowUpdate, metric_bytes
from fedpace.simulations.work import Answer, Computation, Content

_NUMBERS = itertools.count()
_COHORT = 200
"""Computations that are run as one: enough for a few workers,"""
_COHORT_BYTES = 256 << 20
"""and, of large models, no more than that in memory."""


@dataclass
class _Received:
    """A content as this executor needs it: the model, or why there is none; its config; what runs that config led to."""

    reply: Reply | None
    model: Floats | None
    refused: str
    config: dict[str, Any]
    runs: dict[tuple[Any, ...], LocalRun]


@dataclass(slots=True)
class _Task:
    """A computation that can be run. `index` is its place among those handed over."""

    index: int
    computation: Computation
    received: _Received
    run: LocalRun
    samples: int
    steps: int


class FusedExecutor:
    """Runs computations of an app that is a `LocalTraining`, many devices in one program; their contexts are not used.

    `workers`: processes; with 1 everything is run in this one. `device`: "cpu", or "cuda" for a GPU. `cohort`: how many
    computations the grid should hand over at once, `width`: how many are run side by side (None: by the model).
    `run_config`: the run's, which is laid under the messages' config. Not `compiled`: ready at once, but slower. The
    same cohorts give the same bits for any number of workers. Raises ConfigError where the declared work cannot be run
    so, and says why.
    """

    def __init__(
        self,
        training: LocalTraining,
        *,
        workers: int = 1,
        device: str = "cpu",
        cohort: int | None = None,
        width: int | None = None,
        run_config: Mapping[str, Any] | None = None,
        compiled: bool = True,
    ) -> None:
        for name, count in (("workers", workers), ("cohort", cohort), ("width", width)):
            if count is not None and count < 1:
                raise ConfigError(f"fused: {name} is {count}; choose 1 or more")
        self._name = f"fused-{next(_NUMBERS)}"
        self._training = training
        self._data = training.federation
        self._run_config = dict(run_config or {})
        training.plan(self._run_config)
        runner = _checked(training, device, width, compiled)
        self._structure, self._width = runner.structure, runner.width
        self._cohort = cohort or max(1, min(_COHORT, _COHORT_BYTES // (4 * runner.structure.size)))
        self._sizes = {MessageType.TRAIN: self._data.training.partitions.sizes}
        self._sizes[MessageType.EVALUATE] = self._data.testing.partitions.sizes
        self._largest = {kind: int(sizes.max()) for kind, sizes in self._sizes.items()}
        self._engine = Here(runner) if workers == 1 else Workers(training, (device, runner.width, compiled), workers)

    @property
    def cohort(self) -> int:
        return self._cohort

    @property
    def keeps_state(self) -> bool:
        return False

    def steps(self, device: int, message_type: str, config: Mapping[str, Any]) -> float | None:
        """Batches; None where the task will fail."""
        sizes = self._sizes.get(message_type)
        if sizes is None or not 0 <= device < len(sizes):
            return None
        if message_type == MessageType.EVALUATE:
            return float(-(-int(sizes[device]) // EVALUATION_BATCH))
        try:
            run = self._training.plan({**self._run_config, **config})
        except ConfigError:
            return None
        return float(run.steps_of(run.samples(int(sizes[device]))))

    def run(self, computations: Sequence[Computation]) -> list[Answer]:
        """As the contract says. Raises RunError where a worker process has died, and where the declared work fails though
        it could be traced: on targets that are no classes of the model, for one."""
        answers: list[Answer | None] = [None] * len(computations)
        ready: dict[tuple[str, int], list[_Task]] = {}
        for index, computation in enumerate(computations):
            try:
                task = self._task(index, computation)
            except ConfigError as error:
                answers[index] = _failed(str(error))
                continue
            kind = computation.message_type
            # A batch that no device can fill would only be padded.
            batch_size = min(task.run.batch_size, self._largest[kind])
            ready.setdefault((kind, batch_size), []).append(task)
        for (kind, batch_size), tasks in ready.items():
            # Devices with as many steps side by side: nobody then waits long for the others of a chunk.
            tasks.sort(key=lambda task: task.steps)
            for task, answer in zip(tasks, self._together(kind, batch_size, tasks), strict=True):
                answers[task.index] = answer
        return [answer for answer in answers if answer is not None]

    def close(self) -> None:
        self._engine.close()

    def _task(self, index: int, computation: Computation) -> _Task:
        """Raises ConfigError, with what the device's app would have said."""
        sizes = self._sizes.get(computation.message_type)
        if sizes is None:
            raise ConfigError(f"local training answers train and evaluate messages, not {computation.message_type!r}")
        if not 0 <= computation.device < len(sizes):
            raise ConfigError(f"local training: no partition {computation.device}; there are {len(sizes)}")
        received = self._received(computation.content)
        if received.refused:
            raise ConfigError(received.refused)
        held = int(sizes[computation.device])
        if computation.message_type == MessageType.EVALUATE:
            run, samples = _EVALUATION, held
        else:
            run = self._planned(received, computation)
            samples = run.samples(held)
        if not samples:
            raise ConfigError(NO_SAMPLES)
        return _Task(index, computation, received, run, samples, run.steps_of(samples))

    def _received(self, content: Content) -> _Received:
        found = content.kept.get(self._name)
        if not isinstance(found, _Received):
            found = content.kept[self._name] = self._receive(content)
        return found

    def _receive(self, content: Content) -> _Received:
        records = content.records
        config = dict(self._run_config)
        for values in records.config_records.values():
            config.update(values)
        if len(records.array_records) != 1:
            refused = (
                f"local training: the message has {len(records.array_records)} array records; it takes one, the model"
            )
            return _Received(None, None, refused, config, {})
        ((name, record),) = records.array_records.items()
        try:
            model = self._structure.row(record)
        except ConfigError as error:
            return _Received(None, None, str(error), config, {})
        as_sent = list(record) == self._structure.names and all(array.dtype == "float32" for array in record.values())
        reply = Reply(name, self._structure, content_bytes(type(records)({name: record})), as_sent)
        return _Received(reply, model, "", config, {})

    def _planned(self, received: _Received, computation: Computation) -> LocalRun:
        told = tuple(map(computation.config.get, CONFIG_KEYS))
        try:
            found = received.runs.get(told)
        except TypeError:  # a list: no number, as planning will say
            return self._training.plan({**received.config, **computation.config})
        if found is None:
            found = received.runs[told] = self._training.plan({**received.config, **computation.config})
        return found

    def _together(self, kind: str, batch_size: int, tasks: list[_Task]) -> list[Answer]:
        matrix = self._engine.matrix(len(tasks), self._structure.size)
        for row, task in zip(matrix, tasks, strict=True):
            row[:] = task.received.model
        starts = range(0, len(tasks), self._width)
        jobs = [Job(kind, _chunk(batch_size, tasks[start : start + self._width]), start) for start in starts]
        found = self._engine.run(jobs, matrix)
        matrix.flags.writeable = False
        if kind == MessageType.TRAIN:
            return [
                self._trained(matrix, row, task, loss)
                for row, (task, loss) in enumerate(zip(tasks, found[0].tolist(), strict=True))
            ]
        return [_evaluated(loss, right, task.samples) for task, loss, right in zip(tasks, *found.tolist(), strict=True)]

    def _trained(self, matrix: Floats, row: int, task: _Task, loss: float) -> Answer:
        metrics = {"train-loss": loss, "num-examples": task.samples, "local-steps": task.steps}
        reply = task.received.reply
        assert reply is not None  # or it would have been refused
        return Answer(RowUpdate(matrix, row, reply, metrics, reply.nbytes + metric_bytes(metrics)), metrics)


_EVALUATION = LocalRun(steps=None, epochs=1, batch_size=EVALUATION_BATCH, lr=0.0)


def _checked(training: LocalTraining, device: str, width: int | None, compiled: bool) -> ChunkRunner:
    """Where the model or the loss cannot be run side by side, devices are run one after the other."""
    runner = ChunkRunner(training, device, width, compiled)
    try:
        runner.check()
    except ConfigError:
        if width is not None or runner.width == 1:
            raise
        runner = ChunkRunner(training, device, 1, compiled)
        runner.check()
    return runner


def _chunk(batch_size: int, tasks: Sequence[_Task]) -> Chunk:
    return Chunk(
        batch_size=batch_size,
        rows=np.array([task.computation.device for task in tasks], np.int64),
        seeds=np.array([task.computation.seed for task in tasks], np.uint64),
        first=np.array([task.run.first for task in tasks], np.int64),
        sizes=np.array([task.samples for task in tasks], np.int64),
        steps=np.array([task.steps for task in tasks], np.int64),
        lr=np.array([task.run.lr for task in tasks], np.float32),
        mu=np.array([task.run.mu for task in tasks], np.float32),
    )


def _evaluated(loss: float, right: float, samples: int) -> Answer:
    """`right` is NaN where targets are no labels."""
    accuracy = {} if math.isnan(right) else {"accuracy": right}
    metrics = {"loss": loss, **accuracy, "num-examples": samples}
    return Answer(MetricsUpdate(metrics), metrics)


def _failed(reason: str) -> Answer:
    return Answer(None, code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=f"ConfigError: {reason}")
