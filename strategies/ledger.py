"""The model-sized arrays of a run, by version and by task. Changed by effects alone; decides nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord

from fedpace.errors import PayloadError
from fedpace.protocol.paced import UpdateHandle
from fedpace.strategies.composition import Composition
from fedpace.strategies.events import Fold, Scored
from fedpace.strategies.folders import Mean
from fedpace.strategies.layout import Layout, Model
from fedpace.strategies.parts import Folding, Vector

_NUMBERS = 1 << 18
"""Of updates that are folded at once: few enough to stay in the cache where models are small, and in memory where not."""

TREND = 0.5
"""How much of the step before counts in the consensus that updates are scored against."""


class Ledger:
    """Versions, updates that wait, and what compensators and the optimiser keep.

    `validation_fn` gives the loss of a model on the server's own data.
    """

    def __init__(
        self,
        composition: Composition,
        initial: ArrayRecord,
        array_name: str,
        validation_fn: Callable[[ArrayRecord], float] | None = None,
    ) -> None:
        self.layout = Layout(initial)
        self.version = 0
        self._composition = composition
        self._array_name = array_name
        self._validation_fn = validation_fn
        self._by_rows = type(composition.folder) is Mean and not composition.compensators and self.layout.uniform
        self._models = {0: Model.of(self.layout, initial)}
        self._updates: dict[int, tuple[UpdateHandle, int]] = {}
        self._memories: list[dict[str, Any]] = [{} for _ in composition.compensators]
        self._optimiser_memory: dict[str, Any] = {}
        self._change: Vector | None = None
        self._trend: Vector | None = None

    # ------------------------------------------------------------ versions

    @property
    def current(self) -> Model:
        return self._models[self.version]

    def outgoing(self, version: int) -> dict[str, ArrayRecord]:
        """The array records that go out with a version."""
        records = {self._array_name: self._models[version].record}
        for part, memory in zip(self._composition.compensators, self._memories, strict=True):
            if (name := getattr(part, "record", None)) is not None:
                flat = part.outgoing(self._models[version].flat, memory)  # type: ignore[attr-defined]
                records[name] = self.layout.record(flat)
        return records

    def release(self, versions: Sequence[int]) -> None:
        for version in versions:
            self._models.pop(version, None)

    # ------------------------------------------------------------ updates

    def receive(self, task: int, version: int, handle: UpdateHandle, *, checked: bool) -> None:
        """Takes an update that began with `version`; `checked` ones are known to be finite.

        Raises PayloadError, and takes nothing, where it does not fit the model.
        """
        if not (checked and self._place(handle) is not None):
            self.layout.check(handle.arrays(self._array_name), finite=not checked)
        for part in self._composition.compensators:
            if (name := getattr(part, "record", None)) is not None:
                try:
                    self.layout.check(handle.arrays(name), finite=not checked)
                except PayloadError as error:
                    raise PayloadError(f"record {name!r}: {error}; does the ClientApp use the mod for it?") from None
        self._updates[task] = (handle, version)

    def _place(self, handle: UpdateHandle) -> tuple[Any, int] | None:
        """The matrix and the row of an update that can be folded with others without being taken apart; None elsewhere."""
        place = handle.place(self._array_name)
        if place is None or place[0].dtype != self.layout.dtype or place[0].shape[1] != self.layout.size:
            return None
        return place

    def discard(self, tasks: Sequence[int]) -> None:
        for task in tasks:
            handle, _ = self._updates.pop(task)
            handle.release()

    def score(self, tasks: Sequence[int], samples: Sequence[float], at: float) -> Scored:
        """How each update agrees with the others and the step before; its length; its model's own loss.

        The consensus is the mean of directions (changes of length 1) weighted by samples: a long change has one voice.
        """
        shares = np.array(samples) / max(sum(samples), 1e-12)
        scratch = self.layout.zeros()
        total = self.layout.zeros() if self._trend is None else TREND * self._trend
        norms = []
        for task, share in zip(tasks, shares, strict=True):
            change = self._change_of(task, scratch)
            norms.append(float(np.linalg.norm(change)))
            if norms[-1] > 0:
                total += change * (share / norms[-1])
        agreement, losses = [], []
        for task, share, norm in zip(tasks, shares, norms, strict=True):
            change = self._change_of(task, scratch)
            losses.append(math.nan)
            if self._validation_fn is not None:
                base = self._models[self._updates[task][1]]
                losses[-1] = float(self._validation_fn(base.moved(change).record))
            direction = change / max(norm, 1e-30)
            others = total - share * direction
            length = float(np.linalg.norm(others))
            agreement.append(float(direction @ others) / length if length > 0 and norm > 0 else math.nan)
        return Scored(at, list(tasks), agreement, norms, losses)

    def _change_of(self, task: int, out: Vector) -> Vector:
        handle, version = self._updates[task]
        return self.layout.change(handle.arrays(self._array_name), self._against(version), out)

    # ------------------------------------------------------------ fold and step

    def fold(self, effect: Fold) -> None:
        """Combines updates, each corrected and weighted, into the change that the next `step` makes."""
        if self._by_rows and (change := self._fold_rows(effect)) is not None:
            self._change = change
            self.discard(effect.tasks)
            return
        folded: list[Folding] = []
        parts = list(zip(self._composition.compensators, self._memories, strict=True))
        reusable = self.layout.zeros() if not parts and self._composition.folder.needs == "sums" else None

        def changes() -> Iterator[tuple[float, Vector]]:
            for i, task in enumerate(effect.tasks):
                change = self._change_of(task, self.layout.zeros() if reusable is None else reusable)
                for part, memory in parts:
                    update = self._folding(effect, i, getattr(part, "record", None))
                    change = part.adjust(change, update, memory)
                if parts:
                    folded.append(self._folding(effect, i, None))
                yield effect.weights[i], change

        change = self._composition.folder.fold(changes(), self.layout.zeros())
        for part, memory in parts:
            change = part.finish(change, folded, memory)
        self._change = change
        self.discard(effect.tasks)

    def _fold_rows(self, effect: Fold) -> Vector | None:
        """The same for updates that are rows of matrices: models are added up, then what they are taken from is taken off.

        None where one of them lies elsewhere.
        """
        matrices: dict[int, tuple[Any, list[int], list[float]]] = {}
        shares: dict[int, float] = {}
        for task, weight in zip(effect.tasks, effect.weights, strict=True):
            handle, version = self._updates[task]
            if (place := self._place(handle)) is None:
                return None
            matrix, row = place
            _, rows, weights = matrices.setdefault(id(matrix), (matrix, [], []))
            rows.append(row)
            weights.append(weight)
            shares[version] = shares.get(version, 0.0) + weight
        total = self.layout.zeros()
        for matrix, rows, weights in matrices.values():
            factors = np.array(weights, dtype=self.layout.dtype)
            together = max(1, min(len(rows), _NUMBERS // self.layout.size))
            for first in range(0, len(rows), together):
                part = slice(first, first + together)
                total += np.einsum("i,ij->j", factors[part], _rows_of(matrix, rows[part]))
        for version, share in shares.items():
            total -= total.dtype.type(share) * self._against(version).flat
        return total

    def _against(self, version: int) -> Model:
        """What the change of an update that began with a version is taken from."""
        return self._models[version] if self._composition.folder.against == "base" else self.current

    def _folding(self, effect: Fold, i: int, record: str | None) -> Folding:
        handle, version = self._updates[effect.tasks[i]]
        return Folding(
            task=effect.tasks[i],
            row=effect.rows[i],
            weight=effect.weights[i],
            staleness=effect.staleness[i],
            steps=effect.steps[i],
            base=self._models[version].flat,
            current=self.current.flat,
            extra=None if record is None else self.layout.flatten(handle.arrays(record)),
            count=len(effect.tasks),
            devices=effect.devices,
        )

    def step(self, version: int) -> float:
        """Makes `version` of the current one and what was folded. Returns the Euclidean length of the step; where that
        is not finite, nothing was made."""
        change = self._change
        assert change is not None
        self._change = None
        counters = [(place, change[place].copy()) for place in self.layout.integers]
        moved = self._composition.optimiser.step(change, self._optimiser_memory, version)
        for place, mean in counters:
            moved[place] = mean
        with np.errstate(over="ignore", invalid="ignore"):
            norm = float(np.linalg.norm(moved))
        if not math.isfinite(norm):
            return norm
        if self._composition.needs_scores and norm > 0:
            self._trend = moved / norm
        self._models[version] = self.current.moved(moved)
        self.version = version
        return norm


def _rows_of(matrix: Any, rows: list[int]) -> Any:
    """Rows of a matrix, without a copy where they follow one another."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return matrix[rows[0] : rows[0] + len(rows)]
    return matrix[rows]
