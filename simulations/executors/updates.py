"""Updates as rows of a cohort's matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedpace.protocol.paced import UpdateHandle
from fedpace.simulations.executors.structure import Floats, Structure

METRICS = "metrics"
_EMPTY: Floats = np.empty((0, 0), np.float32)
_NOTHING: Mapping[str, NDArray[np.generic]] = {}


@dataclass(frozen=True, slots=True)
class Reply:
    """What the updates made from one content have in common.

    `record` names the array record; `nbytes` is what its arrays take as Flower's; `as_sent` tells whether the rows'
    order and dtype, which are `structure`'s, are those in which the arrays were sent.
    """

    record: str
    structure: Structure
    nbytes: int
    as_sent: bool


class RowUpdate(UpdateHandle):
    """One trained model: row `row` of `matrix`, float32 of shape (devices, numbers), whose layout is `structure`'s."""

    __slots__ = ("_reply", "matrix", "metrics", "nbytes", "row")

    nbytes: int

    def __init__(self, matrix: Floats, row: int, reply: Reply, metrics: Mapping[str, Any], nbytes: int) -> None:
        """`nbytes` is the size of arrays and metrics."""
        self.matrix = matrix
        self.row = row
        self.metrics = metrics
        self.nbytes = nbytes
        self._reply = reply

    @property
    def structure(self) -> Structure:
        return self._reply.structure

    def place(self, record: str) -> tuple[Floats, int] | None:
        reply = self._reply
        return (self.matrix, self.row) if reply.as_sent and record == reply.record and len(self.matrix) else None

    def arrays(self, record: str | None = None) -> Mapping[str, NDArray[np.generic]]:
        if record not in (None, self._reply.record) or not len(self.matrix):
            return _NOTHING
        return self._reply.structure.views(self.matrix[self.row])

    def content(self) -> RecordDict:
        arrays = {name: Array(np.ascontiguousarray(array)) for name, array in self.arrays().items()}
        records = {self._reply.record: ArrayRecord(arrays)} if arrays else {}
        return RecordDict({**records, METRICS: MetricRecord(dict(self.metrics))})

    def release(self) -> None:
        self.matrix = _EMPTY


class MetricsUpdate(UpdateHandle):
    """A reply without arrays."""

    __slots__ = ("_metrics", "nbytes")

    nbytes: int

    def __init__(self, metrics: Mapping[str, Any]) -> None:
        self._metrics = metrics
        self.nbytes = metric_bytes(metrics)

    def arrays(self, record: str | None = None) -> Mapping[str, NDArray[np.generic]]:
        return _NOTHING

    def content(self) -> RecordDict:
        return RecordDict({METRICS: MetricRecord(dict(self._metrics))})

    def release(self) -> None:
        """There is nothing to let go."""


def metric_bytes(metrics: Mapping[str, Any]) -> int:
    """As Flower counts numbers: eight bytes each, and their names."""
    return sum(len(name.encode()) + 8 for name in metrics)
