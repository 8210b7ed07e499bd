"""Matrices as products of two thin ones: PowerSGD."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from fedpace.errors import ConfigError, PayloadError
from fedpace.protocol.codecs.codec import (
    BLOCK,
    LIMIT,
    Buffer,
    Coder,
    Context,
    Layout,
    Reducer,
    Sparse,
    Total,
    Values,
    Vector,
)
from fedpace.protocol.codecs.reader import Reader, varint

MEMORY = "lowrank"
"""Where the right factors of one time are kept for the next, in the `memory` of `encode`."""

Part = tuple[int, int]
"""Rows and columns of a matrix; (0, length) of numbers that are written as they are."""


@dataclass(frozen=True)
class LowRank(Reducer):
    """Every matrix M (first dimension x the others) as P Q^T with `rank` columns (1 to 255), by one power iteration.

    Vogels et al., PowerSGD (NeurIPS 2019), algorithm 1: P = orthonormal(M Q'), Q = M^T P, with Q' of the last time, where
    `memory` has it, or random. |M - P Q^T|^2 = |M|^2 - |Q|^2, so it never adds error, and a random Q' catches an expected
    |Q|^2 >= |M|^2 / min(rows, columns); a remembered one that catches less is drawn anew. Each column of P and of Q is
    written at the square root of its weight, so that a coder treats both alike. Arrays of one dimension, and those too
    small to gain, are written as they are.
    """

    rank: int

    code: ClassVar[int] = 3
    name: ClassVar[str] = "lowrank"

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= 255:
            raise ConfigError(f"lowrank takes a rank of 1 to 255, not {self.rank}")

    def error_bound(self, size: int) -> float:
        return 1 - 1 / math.sqrt(max(1, size))  # no matrix of so many numbers has a longer shorter side

    def chained_bound(self, size: int, coder: Coder) -> float:
        """With q = |P Q^T| / |M| and numbers that are off by a part u: |M - decoded| <= (sqrt(1 - q^2) + e q) |M|,
        e = (2u + u^2) sqrt(rank), for the columns of P have length 1. What follows has its square."""
        if not coder.numberwise:
            return math.inf
        part = math.sqrt(coder.error_bound(size))
        error = (2 * part + part**2) * math.sqrt(self.rank)
        caught = max(1 / math.sqrt(max(1, size)), (error / (1 - error**2)) ** 2) if error < 1 else 1.0
        return 1 - caught * (1 - error**2) + 2 * error * math.sqrt(caught)

    def pack(self) -> bytes:
        return bytes([self.rank])

    @classmethod
    def unpack(cls, reader: Reader) -> Self:
        return cls(reader.byte("the rank of lowrank"))

    def reduce(self, vector: Vector, context: Context) -> tuple[list[Buffer], Vector]:
        parts = self._parts(context, vector.size)
        starts = self._starts(parts, context)
        random = context.generator(self.code)
        numbers: list[Vector] = []
        rights: list[Vector] = []
        at = 0
        for rows, columns in parts:
            piece = vector[at : at + _length((rows, columns))]
            at += piece.size
            if not rows:
                numbers.append(piece)
                continue
            largest = float(np.abs(piece).max()) or 1.0
            scaled = piece.reshape(rows, columns) / np.float32(largest)
            left, right = _factors(scaled, self.rank, next(starts, None), random)
            rights.append(right.ravel())
            norms = np.sqrt(np.einsum("ij,ij->j", right, right))
            weights = np.sqrt(norms * np.float32(largest))
            numbers += [(left * weights).ravel(), (right * (weights / np.where(norms > 0, norms, 1))).ravel()]
        if context.memory is not None and rights:
            context.memory[MEMORY] = np.concatenate(rights)
        side: list[Buffer] = [varint(len(parts)), *(varint(number) for part in parts for number in part)]
        return side, np.concatenate(numbers) if numbers else vector

    def _parts(self, context: Context, size: int) -> list[Part]:
        if sum(math.prod(shape) for shape in context.shapes) != size:
            raise ConfigError(f"lowrank needs the shapes of the arrays; those given do not make {size} numbers")
        parts: list[Part] = []
        for shape in context.shapes:
            length = math.prod(shape)
            part = (shape[0], length // shape[0]) if length and len(shape) > 1 else (0, length)
            if part[0] and self._count(part) < length:
                parts.append(part)
            elif parts and not parts[-1][0]:
                parts[-1] = (0, parts[-1][1] + length)
            elif length:
                parts.append((0, length))
        return parts

    def _starts(self, parts: list[Part], context: Context) -> Iterator[Vector]:
        """The right factors of the last time, where they are those of these matrices."""
        wanted = [(columns, self._columns((rows, columns))) for rows, columns in parts if rows]
        kept = (context.memory or {}).get(MEMORY)
        if kept is None or kept.shape != (sum(columns * rank for columns, rank in wanted),):
            return
        at = 0
        for columns, rank in wanted:
            yield kept[at : at + columns * rank].reshape(columns, rank)
            at += columns * rank

    def _columns(self, part: Part) -> int:
        return min(self.rank, *part)

    def _count(self, part: Part) -> int:
        """How many numbers a part takes."""
        return sum(part) * self._columns(part) if part[0] else part[1]

    def open(self, reader: Reader, size: int) -> Layout:
        amount = reader.varint("the number of matrices")
        if 2 * amount > reader.left:
            raise PayloadError(f"the frame has {reader.left} bytes for the shapes of {amount} matrices")
        parts = [(reader.varint("a shape"), reader.varint("a shape")) for _ in range(amount)]
        if sum(map(_length, parts)) != size:
            raise PayloadError(f"the matrices of the frame do not make the {size} numbers of the vector")
        if not all(_length(part) for part in parts):
            raise PayloadError("the frame has an array without numbers")
        if any(part[0] and self._count(part) >= _length(part) for part in parts):
            raise PayloadError("the frame has a matrix of low rank that takes more than it has numbers")
        return LowRankLayout([(part, self._columns(part) if part[0] else 0, self._count(part)) for part in parts])


def _length(part: Part) -> int:
    return part[0] * part[1] if part[0] else part[1]


def _factors(matrix: Vector, rank: int, start: Vector | None, random: np.random.Generator) -> tuple[Vector, Vector]:
    """P, shape (rows, rank), orthonormal, and Q, shape (columns, rank), with P Q^T near the matrix (largest magnitude 1)."""
    rank = min(rank, *matrix.shape)
    if start is not None and np.isfinite(start).all():
        left, right = _power_step(matrix, start)
        if np.vdot(right, right) * min(matrix.shape) >= np.vdot(matrix, matrix):
            return left, right
    return _power_step(matrix, random.standard_normal((matrix.shape[1], rank), dtype=np.float32))


def _power_step(matrix: Vector, start: Vector) -> tuple[Vector, Vector]:
    left = np.linalg.qr(matrix @ start)[0]
    return left, matrix.T @ left


class LowRankLayout(Layout):
    """For every part its shape, its rank (0: written as it is) and how many numbers it takes."""

    def __init__(self, parts: list[tuple[Part, int, int]]) -> None:
        self.count = sum(count for _, _, count in parts)
        self._parts = parts

    def _pieces(self, numbers: Vector) -> Iterator[tuple[int, Vector, Vector | None]]:
        """(start in the vector, numbers, None), or with the left factor and the transposed right one."""
        start = at = 0
        for part, rank, count in self._parts:
            piece = numbers[at : at + count]
            if rank:
                left = part[0] * rank
                yield start, piece[:left].reshape(-1, rank), piece[left:].reshape(-1, rank).T
            else:
                yield start, piece, None
            start += _length(part)
            at += count

    def check(self, values: Values) -> None:
        for _, left, right in self._pieces(values.all()):
            if right is not None:
                peaks = [float(np.abs(factor).max()) for factor in (left, right)]
                if not math.prod(peaks) * right.shape[0] <= LIMIT:
                    raise PayloadError("the frame holds factors whose product is not finite")

    def sparse(self, values: Values) -> Sparse | None:
        return None

    def add_to(self, total: Total, values: Values, weight: float) -> None:
        for start, left, right in self._pieces(values.all()):
            if right is None:
                total[start : start + left.size] += left if weight == 1 else left * np.float32(weight)
                continue
            columns = right.shape[1]
            weighted = right if weight == 1 else right * np.float32(weight)
            step = max(1, BLOCK // columns)
            for row in range(0, left.shape[0], step):
                block = left[row : row + step] @ weighted
                at = start + row * columns
                total[at : at + block.size] += block.ravel()
