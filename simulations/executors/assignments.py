"""What computations ask for, worked out once for all that are sent alike."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import MessageType, RecordDict

from fedpace.clients.training.declaration import CONFIG_KEYS, EVALUATION_BATCH, NO_SAMPLES, LocalRun, LocalTraining
from fedpace.errors import ConfigError
from fedpace.protocol.received import content_bytes
from fedpace.simulations.executors.schedule import Chunk
from fedpace.simulations.executors.structure import Floats, Structure
from fedpace.simulations.executors.updates import Reply
from fedpace.simulations.work import Computation, Content

_NUMBERS = itertools.count()
_EVALUATION = LocalRun(steps=None, epochs=1, batch_size=EVALUATION_BATCH, lr=0.0)


@dataclass(slots=True, eq=False)
class Assignment:
    """What computations have in common whose content, config and kind are the same: the run, or why there is none."""

    kind: str
    refused: str
    run: LocalRun = _EVALUATION
    model: Floats | None = None
    reply: Reply | None = None


@dataclass(slots=True)
class _Received:
    """A content: the model, or why there is none; its config; the assignments it led to, by what else they were told."""

    refused: str
    config: dict[str, Any]
    model: Floats | None = None
    reply: Reply | None = None
    assignments: dict[Any, Assignment] = field(default_factory=dict)


class Assignments:
    """Reads computations of a training. Raises ConfigError for a `run_config` that cannot be."""

    def __init__(self, training: LocalTraining, structure: Structure, run_config: Mapping[str, Any]) -> None:
        self._training = training
        self._structure = structure
        self._run_config = dict(run_config)
        self._name = f"fused-{next(_NUMBERS)}"  # of what is kept with contents
        self._planned: tuple[Mapping[str, Any], dict[str, Any], list[type], LocalRun | None]
        self._planned = {}, {}, [], self.plan({})
        data = training.federation
        self._sizes = {MessageType.TRAIN: data.training.partitions.sizes}
        self._sizes[MessageType.EVALUATE] = data.testing.partitions.sizes
        # A batch that no device can fill would only be padded.
        self._largest = {kind: int(sizes.max()) for kind, sizes in self._sizes.items()}

    def plan(self, config: Mapping[str, Any]) -> LocalRun:
        """Raises ConfigError for values that cannot be."""
        return self._training.plan({**self._run_config, **config})

    def steps(self, device: int, kind: str, config: Mapping[str, Any]) -> float | None:
        """Batches; None where the task will fail. What the last config led to is kept: many tasks are told the same."""
        sizes = self._sizes.get(kind)
        if sizes is None or not 0 <= device < len(sizes):
            return None
        held = sizes.item(device)
        if kind == MessageType.EVALUATE:
            return float(_EVALUATION.steps_of(held))
        same, told, types, run = self._planned
        if config is not same:  # which nobody changes, as it is part of a content
            if config != told or list(map(type, config.values())) != types:
                try:
                    run = self.plan(config)
                except ConfigError:
                    run = None
                told, types = dict(config), list(map(type, config.values()))
            self._planned = config, told, types, run
        return None if run is None else float(run.steps_of(run.samples(held)))

    def of(self, computation: Computation) -> Assignment:
        received = computation.content.kept.get(self._name)
        if received is None:
            received = computation.content.kept[self._name] = self._receive(computation.content)
        kind, config = computation.message_type, computation.config
        key: Any = kind
        if config:
            told = tuple(map(config.get, CONFIG_KEYS))
            # True and 1.0 are equal to 1, but no number of steps.
            key = kind, told, tuple(map(type, told))
        try:
            found = received.assignments.get(key)
        except TypeError:  # a list: no number, as planning will say
            return self._assignment(kind, received, config)
        if found is None:
            found = received.assignments[key] = self._assignment(kind, received, config)
        return found

    def chunk(self, assignment: Assignment, computations: Sequence[Computation]) -> tuple[Chunk, dict[int, str]]:
        """The work of computations of one assignment, and why some, by their places, have none."""
        sizes, run, count = self._sizes[assignment.kind], assignment.run, len(computations)
        rows = np.array([computation.device for computation in computations], np.int64)
        there = (rows >= 0) & (rows < len(sizes))
        held = sizes[rows] if there.all() else sizes[np.where(there, rows, 0)]
        samples = np.maximum((held if run.last is None else np.minimum(held, run.last)) - run.first, 0)
        failures = {}
        for place in np.flatnonzero(~there | (samples == 0)).tolist():
            failures[place] = (
                NO_SAMPLES if there[place] else f"local training: no partition {rows[place]}; there are {len(sizes)}"
            )
        chunk = Chunk(
            batch_size=min(run.batch_size, self._largest[assignment.kind]),
            rows=rows,
            seeds=np.array([computation.seed for computation in computations], np.uint64),
            first=np.full(count, run.first),
            sizes=samples,
            steps=-(-samples // run.batch_size) * run.epochs if run.steps is None else np.full(count, run.steps),
            lr=np.full(count, run.lr, np.float32),
            mu=np.full(count, run.mu, np.float32),
        )
        return (chunk.part(np.flatnonzero(there & (samples > 0))) if failures else chunk), failures

    def _assignment(self, kind: str, received: _Received, config: Mapping[str, Any]) -> Assignment:
        if kind not in self._sizes:
            return Assignment(kind, f"local training answers train and evaluate messages, not {kind!r}")
        if received.refused:
            return Assignment(kind, received.refused)
        assignment = Assignment(kind, "", model=received.model, reply=received.reply)
        if kind == MessageType.TRAIN:
            try:
                assignment.run = self.plan({**received.config, **config})
            except ConfigError as error:
                assignment.refused = str(error)
        return assignment

    def _receive(self, content: Content) -> _Received:
        records = content.records
        config: dict[str, Any] = {}
        for values in content.configs.values():
            config.update(values)
        models = records.array_records
        if len(models) != 1:
            refused = f"local training: the message has {len(models)} array records; it takes one, the model"
            return _Received(refused, config)
        ((name, record),) = models.items()
        try:
            model = self._structure.row(record)
        except ConfigError as error:
            return _Received(str(error), config)
        as_sent = list(record) == self._structure.names and all(array.dtype == "float32" for array in record.values())
        reply = Reply(name, self._structure, content_bytes(RecordDict({name: record})), as_sent)
        return _Received("", config, model, reply)
