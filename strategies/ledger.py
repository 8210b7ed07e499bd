"""The model-sized arrays of a run, by version and by task. Changed by effects alone; decides nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord

from fedpace.errors import PayloadError
from fedpace.protocol.codecs import Codec
from fedpace.protocol.mapped import MAPPED_BYTES
from fedpace.protocol.paced import UpdateHandle
from fedpace.strategies.composition import Composition
from fedpace.strategies.downlink import Downlink
from fedpace.strategies.events import Fold, Scored
from fedpace.strategies.folders import Mean
from fedpace.strategies.layout import Layout, Model
from fedpace.strategies.parts import Folding, Vector
from fedpace.strategies.sums import Dense, add_dense
from fedpace.strategies.waiting import MAPPED, Update, Waiting

_NUMBERS = 1 << 18
"""Of updates that are folded at once: few enough to stay in the cache where models are small, and in memory where not."""

TREND = 0.5
"""How much of the step before counts in the consensus that updates are scored against."""


class Ledger:
    """Versions, updates that wait, and what compensators and the optimiser keep.

    `validation_fn` gives the loss of a model on the server's own data. `codecs` are those that devices may use, as
    `fedpace.protocol.codecs.open_frame` takes them (None: all). `downlink` makes the server's steps smaller, by random
    numbers of `seed` where it takes any.
    """

    def __init__(
        self,
        composition: Composition,
        initial: ArrayRecord,
        array_name: str,
        validation_fn: Callable[[ArrayRecord], float] | None = None,
        codecs: Collection[str] | None = None,
        *,
        downlink: Codec | None = None,
        seed: int = 0,
    ) -> None:
        self.layout = Layout(initial)
        self.downlink = None if downlink is None else Downlink(downlink, self.layout, seed)
        self.version = 0
        self._composition = composition
        self._array_name = array_name
        self._validation_fn = validation_fn
        self._sums = type(composition.folder) is Mean and not composition.compensators
        self._records = [part.record for part in composition.compensators if hasattr(part, "record")]
        self._by_rows = self._sums and self.layout.uniform
        self._models = {0: Model.of(self.layout, initial)}
        self._waiting = Waiting(self.layout, array_name, codecs)
        self._memories: list[dict[str, Any]] = [{} for _ in composition.compensators]
        self._optimiser_memory: dict[str, Any] = {}
        self._change: Vector | None = None
        self._trend: Vector | None = None

    # ------------------------------------------------------------ versions

    @property
    def current(self) -> Model:
        return self._models[self.version]

    def outgoing(self, version: int, held: int | None = None) -> dict[str, ArrayRecord]:
        """The array records that go out with a version, to devices that hold an earlier one, if there is one named."""
        model = self._models[version]
        if held is None or self.downlink is None:
            records = {self._array_name: model.record}
        else:
            records = {self._array_name: self.downlink.outgoing(held, version, model)}
        for part, memory in zip(self._composition.compensators, self._memories, strict=True):
            if (name := getattr(part, "record", None)) is not None:
                flat = part.outgoing(model.flat, memory)  # type: ignore[attr-defined]
                records[name] = self.layout.record(flat)
        return records

    def held(self, node_id: int, version: int) -> int | None:
        """The version that a device is known to hold, if it is better sent what has changed until `version`."""
        return None if self.downlink is None else self.downlink.held(node_id, version, self._models[version])

    def release(self, versions: Sequence[int]) -> None:
        for version in versions:
            self._models.pop(version, None)

    # ------------------------------------------------------------ updates

    def receive(self, task: int, version: int, handle: UpdateHandle, *, checked: bool) -> int | None:
        """Takes an update that began with `version`; `checked` ones are known to be finite.

        Returns the stream of a compressed one whose device wants to know its fate, else None. Raises PayloadError, and
        takes nothing, where it does not fit the model.
        """
        for name in self._records:
            try:
                self.layout.check(handle.arrays(name), finite=not checked)
            except PayloadError as error:
                raise PayloadError(f"record {name!r}: {error}; does the ClientApp use the mod for it?") from None
        return self._waiting.receive(task, version, handle, checked=checked)

    def discard(self, tasks: Sequence[int]) -> None:
        self._waiting.discard(tasks)

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
                base = self._models[self._waiting.updates[task].version]
                losses[-1] = float(self._validation_fn(base.moved(change).record))
            direction = change / max(norm, 1e-30)
            others = total - share * direction
            length = float(np.linalg.norm(others))
            agreement.append(float(direction @ others) / length if length > 0 and norm > 0 else math.nan)
        return Scored(at, list(tasks), agreement, norms, losses)

    def _change_of(self, task: int, out: Vector) -> Vector:
        """The change that an update stands for, whole, into `out`."""
        update = self._waiting.updates[task]
        arrays, against = self._waiting.arrays(update), self._against(update.version)
        if not update.compressed:
            return self.layout.change(arrays, against, out)
        out.fill(0.0)
        add_dense(self.layout, out, [*self._add_step(update, 1.0, out), Dense(1.0, arrays, against)])
        return out

    def _add_step(self, update: Update, weight: float, total: Vector) -> list[Dense]:
        """Adds a compressed update's change of floating-point arrays to `total`, but for what is returned."""
        self._waiting.add_step(update, weight, total[: self.layout.floats])
        base, against = self._models[update.version], self._against(update.version)
        if base is against:
            return []
        return [Dense(weight, {name: base.arrays[name] for name in self.layout.steps.shapes}, against)]

    # ------------------------------------------------------------ fold and step

    def fold_bytes(self, updates: int) -> int:
        """The memory that folding so many updates takes, in bytes: beside versions, copies, and what parts remember.

        A weighted mean adds each update up where it lies: one vector, however many they are. Compensators are given
        changes whole, one after the other, and a folder that needs all is given all at once.
        """
        vectors = 1 if self._sums else 2
        if self._composition.folder.needs == "all":
            vectors += updates
        elif self._composition.compensators:
            vectors += 2  # a change while the next one is made; the current model as a vector
        return vectors * self.layout.size * self.layout.dtype.itemsize

    def fold(self, effect: Fold) -> None:
        """Combines updates, each corrected and weighted, into the change that the next `step` makes."""
        if self._sums:
            change = self._fold_rows(effect) if self._by_rows else None
            self._change = self._fold_sums(effect) if change is None else change
        else:
            self._change = self._fold_changes(effect)
        self._waiting.commit(effect.tasks)
        self.discard(effect.tasks)

    def _fold_changes(self, effect: Fold) -> Vector:
        """For any folder and any compensators: each change whole."""
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
        return change

    def _fold_sums(self, effect: Fold) -> Vector:
        """For the weighted mean: no change is ever whole."""
        total = self.layout.zeros()
        dense: list[Dense] = []
        for task, weight in zip(effect.tasks, effect.weights, strict=True):
            update = self._waiting.updates[task]
            if update.compressed:
                dense += self._add_step(update, weight, total)
            if not update.compressed or self.layout.counters:
                dense.append(Dense(weight, self._waiting.arrays(update), self._against(update.version)))
            if len(dense) >= MAPPED:
                add_dense(self.layout, total, dense)
                dense.clear()
        add_dense(self.layout, total, dense)
        return total

    def _fold_rows(self, effect: Fold) -> Vector | None:
        """The same for updates that are rows of matrices: models are added up, then what they are taken from is taken off.

        None where one of them lies elsewhere.
        """
        matrices: dict[int, tuple[Any, list[int], list[float]]] = {}
        shares: dict[int, float] = {}
        updates = self._waiting.updates
        for task, weight in zip(effect.tasks, effect.weights, strict=True):
            update = updates[task]
            if update.place is None:
                return None
            version = update.version
            matrix, row = update.place
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
        update = self._waiting.updates[effect.tasks[i]]
        return Folding(
            task=effect.tasks[i],
            row=effect.rows[i],
            weight=effect.weights[i],
            staleness=effect.staleness[i],
            steps=effect.steps[i],
            base=self._models[update.version].flat,
            current=self.current.flat,
            extra=None if record is None else self.layout.flatten(update.handle.arrays(record)),
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
        take = moved is change and self._is_free(change)
        if self.downlink is not None:
            try:
                moved, take = self.downlink.quantised(moved, version), True
            except PayloadError:  # no codec takes numbers so large
                return math.inf
        self._models[version] = self.current.moved(moved, take=take)
        self.version = version
        return norm

    def _is_free(self, change: Vector) -> bool:
        """Whether a change may become the next version where it lies: it is large, and no part remembers it."""
        if change.nbytes < MAPPED_BYTES or not self._sums:
            return False
        return not any(
            isinstance(value, np.ndarray) and np.may_share_memory(value, change)
            for value in self._optimiser_memory.values()
        )


def _rows_of(matrix: Any, rows: list[int]) -> Any:
    """Rows of a matrix, without a copy where they follow one another."""
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return matrix[rows[0] : rows[0] + len(rows)]
    return matrix[rows]
