"""`FusedExecutor`: the declared local work of many devices as one compiled program."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import MessageType
from numpy.typing import NDArray

from fedpace.clients.training.declaration import LocalTraining
from fedpace.errors import ConfigError
from fedpace.hosting.flower import ErrorCode
from fedpace.simulations.executors.assignments import Assignment, Assignments
from fedpace.simulations.executors.chunks import ChunkRunner, Doubles
from fedpace.simulations.executors.fused_workers import Here, Job, Workers
from fedpace.simulations.executors.schedule import Chunk
from fedpace.simulations.executors.structure import Floats
from fedpace.simulations.executors.updates import MetricsUpdate, RowUpdate, metric_bytes
from fedpace.simulations.work import Answer, Computation

_COHORT = 200
"""Computations that are run as one: enough for a few workers,"""
_COHORT_BYTES = 256 << 20
"""and, of large models, no more than that in memory."""
_ALONE = 16
"""Devices of one job that are run one after the other: enough to plan them together, few enough to share out."""
_TRAIN_METRIC_BYTES = metric_bytes(dict.fromkeys(("train-loss", "num-examples", "local-steps")))


@dataclass(slots=True)
class _Cohort:
    """Computations that are run together: `indices`, their places among those handed over; `origins`, which of the
    `assignments` each has."""

    kind: str
    chunk: Chunk
    indices: list[int]
    origins: NDArray[np.int64]
    assignments: list[Assignment]


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
        runner = _checked(training, device, width, compiled)
        self._assignments = Assignments(training, runner.structure, run_config or {})
        self._structure, self._width, self._workers = runner.structure, runner.width, workers
        self._kernel = runner.kernel is not None
        self._cohort = cohort or max(1, min(_COHORT, _COHORT_BYTES // (4 * runner.structure.size)))
        self._engine = Here(runner) if workers == 1 else Workers(training, (device, runner.width, compiled), workers)

    @property
    def cohort(self) -> int:
        return self._cohort

    @property
    def keeps_state(self) -> bool:
        return False

    def steps(self, device: int, message_type: str, config: Mapping[str, Any]) -> float | None:
        """Batches; None where the task will fail."""
        return self._assignments.steps(device, message_type, config)

    def run(self, computations: Sequence[Computation]) -> list[Answer]:
        """As the contract says. Raises RunError where a worker process has died."""
        answers: list[Answer | None] = [None] * len(computations)
        for cohort in self._cohorts(computations, answers):
            for index, answer in zip(cohort.indices, self._together(cohort), strict=True):
                answers[index] = answer
        return [answer for answer in answers if answer is not None]

    def close(self) -> None:
        self._engine.close()

    def _cohorts(self, computations: Sequence[Computation], answers: list[Answer | None]) -> list[_Cohort]:
        """Answers what cannot be run."""
        alike: dict[Assignment, list[int]] = {}
        for index, computation in enumerate(computations):
            alike.setdefault(self._assignments.of(computation), []).append(index)
        parts: dict[tuple[str, int], list[tuple[Assignment, list[int], Chunk]]] = {}
        for assignment, indices in alike.items():
            if assignment.refused:
                failures = dict.fromkeys(range(len(indices)), assignment.refused)
            else:
                chunk, failures = self._assignments.chunk(assignment, [computations[index] for index in indices])
            for place, reason in failures.items():
                answers[indices[place]] = _failed(f"ConfigError: {reason}")
            if left := [index for place, index in enumerate(indices) if place not in failures]:
                parts.setdefault((assignment.kind, chunk.batch_size), []).append((assignment, left, chunk))
        return [_cohort(kind, found, self._kernel or self._width == 1) for (kind, _), found in parts.items()]

    def _together(self, cohort: _Cohort) -> list[Answer]:
        count = len(cohort.chunk)
        matrix = self._engine.matrix(count, self._structure.size)
        for number, assignment in enumerate(cohort.assignments):
            assert assignment.model is not None  # or it would have been refused
            matrix[slice(None) if len(cohort.assignments) == 1 else cohort.origins == number] = assignment.model
        trains = cohort.kind == MessageType.TRAIN
        span = self._width
        if self._width == 1 or (trains and self._kernel):  # each is run alone: cohorts may be cut anywhere
            span = min(-(-count // self._workers), count if self._kernel else _ALONE)
        starts = range(0, count, span)
        jobs = [Job(cohort.kind, cohort.chunk.part(slice(start, start + span)), start) for start in starts]
        done = self._engine.run(jobs, matrix)
        matrix.flags.writeable = False
        found = np.concatenate([each.found for each in done], axis=1)
        answers = self._trained(cohort, matrix, found) if trains else _evaluated(cohort, found)
        for start, each in zip(starts, done, strict=True):
            for place, reason in each.failures.items():
                answers[start + place] = _failed(reason)
        return answers

    def _trained(self, cohort: _Cohort, matrix: Floats, found: Doubles) -> list[Answer]:
        replies = [(each.reply, each.reply.nbytes + _TRAIN_METRIC_BYTES) for each in cohort.assignments if each.reply]
        columns = cohort.chunk.sizes.tolist(), cohort.chunk.steps.tolist(), cohort.origins.tolist()
        answers = []
        for row, (loss, samples, steps, origin) in enumerate(zip(found[0].tolist(), *columns, strict=True)):
            metrics = {"train-loss": loss, "num-examples": samples, "local-steps": steps}
            reply, nbytes = replies[origin]
            answers.append(Answer(RowUpdate(matrix, row, reply, metrics, nbytes), metrics))
        for row in np.flatnonzero(found[1] == 0).tolist():
            answers[row] = self._rejected(matrix[row], replies[columns[2][row]][0].record)
        return answers

    def _rejected(self, row: Floats, record: str) -> Answer:
        """Of an update that is not finite."""
        name = next(name for name, array in self._structure.views(row).items() if not np.isfinite(array).all())
        reason = f"rejected: array {name!r} of record {record!r} holds NaN or infinite numbers"
        return Answer(None, code=ErrorCode.REPLY_MESSAGE_UNAVAILABLE, reason=reason)


def _cohort(kind: str, parts: Sequence[tuple[Assignment, list[int], Chunk]], alone: bool) -> _Cohort:
    """Devices with as many steps side by side: nobody then waits long for the others of a chunk. Those that are trained
    alone lie in the order in which they are needed, and are folded without being gathered."""
    assignments, indices, chunks = zip(*parts, strict=True)
    chunk, places = Chunk.joined(chunks), [index for some in indices for index in some]
    origins = np.repeat(np.arange(len(parts)), [len(some) for some in indices])
    key = np.array(places) if alone else chunk.steps
    if (np.diff(key) < 0).any():
        order = np.argsort(key, kind="stable")
        chunk, origins, places = chunk.part(order), origins[order], [places[place] for place in order.tolist()]
    return _Cohort(kind, chunk, places, origins, list(assignments))


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


def _evaluated(cohort: _Cohort, found: Doubles) -> list[Answer]:
    """The share that is right is NaN where targets are no labels."""
    answers = []
    for loss, right, samples in zip(*found.tolist(), cohort.chunk.sizes.tolist(), strict=True):
        accuracy = {} if math.isnan(right) else {"accuracy": right}
        metrics = {"loss": loss, **accuracy, "num-examples": samples}
        answers.append(Answer(MetricsUpdate(metrics), metrics))
    return answers


def _failed(reason: str) -> Answer:
    return Answer(None, code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason)
