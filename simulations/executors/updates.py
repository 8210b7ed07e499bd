"""Updates as rows of a cohort's matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedpace.protocol.paced import UpdateHandle
from fedpace.simulations.executors.structure import Floats, Structure

METRICS = "metrics"
_EMPTY: Floats = np.empty((0, 0), np.float32)
_NOTHING: Mapping[str, NDArray[np.generic]] = {}


class RowUpdate(UpdateHandle):
    """One trained model: row `row` of `matrix`, float32 of shape (devices, numbers), whose layout `structure` tells.

    `record` names the array record; `array_bytes` is what its arrays take as Flower's.
    """

    __slots__ = ("_array_bytes", "_metrics", "_record", "matrix", "row", "structure")

    def __init__(
        self, matrix: Floats, row: int, structure: Structure, record: str, array_bytes: int, metrics: Mapping[str, Any]
    ) -> None:
        self.matrix = matrix
        self.row = row
        self.structure = structure
        self._record = record
        self._array_bytes = array_bytes
        self._metrics = metrics

    @property
    def nbytes(self) -> int:
        return self._array_bytes + metric_bytes(self._metrics)

    def arrays(self, record: str | None = None) -> Mapping[str, NDArray[np.generic]]:
        if record not in (None, self._record) or not len(self.matrix):
            return _NOTHING
        return self.structure.views(self.matrix[self.row])

    def content(self) -> RecordDict:
        arrays = {name: Array(np.ascontiguousarray(array)) for name, array in self.arrays().items()}
        records = {self._record: ArrayRecord(arrays)} if arrays else {}
        return RecordDict({**records, METRICS: MetricRecord(dict(self._metrics))})

    def release(self) -> None:
        self.matrix = _EMPTY


class MetricsUpdate(UpdateHandle):
    """A reply without arrays."""

    __slots__ = ("_metrics",)

    def __init__(self, metrics: Mapping[str, Any]) -> None:
        self._metrics = metrics

    @property
    def nbytes(self) -> int:
        return metric_bytes(self._metrics)

    def arrays(self, record: str | None = None) -> Mapping[str, NDArray[np.generic]]:
        return _NOTHING

    def content(self) -> RecordDict:
        return RecordDict({METRICS: MetricRecord(dict(self._metrics))})

    def release(self) -> None:
        """There is nothing to let go."""


def metric_bytes(metrics: Mapping[str, Any]) -> int:
    """As Flower counts numbers: eight bytes each, and their names."""
    return sum(len(name.encode()) + 8 for name in metrics)
