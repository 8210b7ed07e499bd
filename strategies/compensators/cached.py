"""Cached-update calibration: the last update of every device stands in for it while it does not come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpace.errors import ConfigError
from fedpace.strategies.blocks import BLOCK, blocks
from fedpace.strategies.parts import Folding, Vector

CHUNK = 1024
"""Numbers that share one scale in a quantised update; a block is a whole number of chunks."""
assert BLOCK % CHUNK == 0


@dataclass(frozen=True, slots=True)
class CachedCalibration:
    """CA2FL (Wang et al. 2024, "Tackling the Data Heterogeneity in Asynchronous Federated Learning with Cached Update
    Calibration", algorithm 2): v = h + 1/K sum of (delta_i - h_i), then h_i <- delta_i.

    h_i is the last update of device i, h their mean. With weights w_i: v = (sum of w_i) h + sum of w_i (delta_i - h_i).

    - `unseen`: what h_i is for a device that is not in the cache. "mean": it is h, so it is not calibrated, and h is the
      mean of what the cache holds. "zero", as in the paper: it is 0, and h is the sum of the cache over all devices.
      Both leave the mean over all devices as it is; they agree once the cache holds everybody.
    - `trust`, 0 to 1: the calibration h - h_i counts so much. 0 is no calibration.
    - `decay`: the cache ages by this factor a version.
    - `limit_bytes`: the cache takes no more; whoever came longest ago is put out of it, and out of h. Two vectors of
      sums come on top (12 bytes a parameter).
    - `quantisation`: "int8" stores a byte a parameter and a scale for every 1,024 (as the paper's MF-CA2FL quantises its
      cache), or None. h is the mean of what is stored, so rounding adds noise but no bias.

    A device that is folded twice at once is calibrated the second time with its first update.
    """

    trust: float = 1.0
    decay: float = 1.0
    limit_bytes: int = 1 << 30
    quantisation: str | None = "int8"
    unseen: str = "mean"

    def __post_init__(self) -> None:
        if not 0.0 <= self.trust <= 1.0:
            raise ConfigError(f"cached calibration: trust is {self.trust}; choose from 0.0 to 1.0")
        if not 0.0 < self.decay <= 1.0:
            raise ConfigError(f"cached calibration: decay is {self.decay}; choose more than 0.0 and at most 1.0")
        if self.limit_bytes < 1:
            raise ConfigError(f"cached calibration: limit_bytes is {self.limit_bytes}; choose 1 or more")
        if self.quantisation not in ("int8", None):
            raise ConfigError(f'cached calibration: quantisation is {self.quantisation!r}; choose "int8" or None')
        if self.unseen not in ("mean", "zero"):
            raise ConfigError(f'cached calibration: unseen is {self.unseen!r}; choose "mean" or "zero"')

    def adjust(self, delta: Vector, update: Folding, memory: dict[str, Any]) -> Vector:
        """Raises ConfigError if not even one update fits into `limit_bytes`."""
        if self.trust == 0.0:
            return delta
        if not memory:
            memory.update(version=0, cached={}, total=np.zeros(len(delta)), mean=np.zeros_like(delta))
        cached, total, row = memory["cached"], memory["total"], str(update.row)
        known = row in cached
        if not known:
            self._make_room(delta, memory)
            self._create(row, delta, memory)
        age = self._age(row, memory)
        for block in blocks(len(delta)):
            new = delta[block].copy()
            if known:
                before = self._read(row, block, memory) * age
                total[block] -= before
                delta[block] -= self.trust * before
            elif self.unseen == "mean":
                delta[block] -= self.trust * memory["mean"][block]
            self._write(row, block, new, memory)
            total[block] += self._read(row, block, memory)
        cached.pop(row, None)  # to the end: the order of `cached` is that of use
        cached[row] = memory["version"]
        return delta

    def finish(self, step: Vector, folded: Sequence[Folding], memory: dict[str, Any]) -> Vector:
        if self.trust == 0.0 or not memory:
            return step
        calibration = self.trust * sum(update.weight for update in folded)
        memory["version"] += 1
        total, mean, count = memory["total"], memory["mean"], len(memory["cached"])
        if self.unseen == "zero":
            count = max(count, folded[-1].devices)
        for block in blocks(len(step)):
            step[block] += mean[block] * step.dtype.type(calibration)
            total[block] *= self.decay
            np.divide(total[block], count, out=mean[block], casting="same_kind")
        return step

    # ------------------------------------------------------------ the cache

    def _age(self, row: str, memory: dict[str, Any]) -> float:
        """The factor by which a cached update has aged."""
        return float(self.decay ** (memory["version"] - memory["cached"].get(row, memory["version"])))

    def _make_room(self, like: Vector, memory: dict[str, Any]) -> None:
        """Puts out those who came longest ago until one more fits."""
        size = len(like) + 4 * _chunks(like) if self.quantisation else like.nbytes
        if size > self.limit_bytes:
            raise ConfigError(
                f"cached calibration: one update takes {size} bytes and limit_bytes is {self.limit_bytes}; choose several "
                "times as many as an update takes, or leave the calibration out"
            )
        cached, total = memory["cached"], memory["total"]
        while cached and (len(cached) + 1) * size > self.limit_bytes:
            row = next(iter(cached))
            age = self._age(row, memory)
            for block in blocks(len(like)):
                total[block] -= self._read(row, block, memory) * age
            for name in (f"update {row}", f"scales {row}"):
                memory.pop(name, None)
            del cached[row]
        if not cached:
            total.fill(0.0)  # and no rounding is left

    def _create(self, row: str, like: Vector, memory: dict[str, Any]) -> None:
        if self.quantisation:
            memory[f"update {row}"] = np.empty(len(like), dtype=np.int8)
            memory[f"scales {row}"] = np.empty(_chunks(like), dtype=np.float32)
        else:
            memory[f"update {row}"] = np.empty_like(like)

    def _write(self, row: str, block: slice, values: Vector, memory: dict[str, Any]) -> None:
        if not self.quantisation:
            memory[f"update {row}"][block] = values
            return
        starts = np.arange(0, len(values), CHUNK)
        scales = (np.maximum.reduceat(np.abs(values), starts) / 127.0).astype(np.float32)
        memory[f"scales {row}"][block.start // CHUNK :][: len(scales)] = scales
        wide = _spread(scales, len(values))
        np.divide(values, wide, out=values, where=wide > 0)
        memory[f"update {row}"][block] = np.clip(np.rint(values), -127, 127)

    def _read(self, row: str, block: slice, memory: dict[str, Any]) -> NDArray[np.float64]:
        values: NDArray[np.float64] = memory[f"update {row}"][block].astype(np.float64)
        if self.quantisation:
            scales = memory[f"scales {row}"][block.start // CHUNK : -(-block.stop // CHUNK)]
            values *= _spread(scales, len(values))
        return values


def _chunks(vector: Vector) -> int:
    return -(-len(vector) // CHUNK)


def _spread(scales: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Each scale as often as there are numbers in its chunk."""
    return np.repeat(scales, CHUNK)[:size]
