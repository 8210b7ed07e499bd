"""What a codec is: at most one stage that leaves fewer numbers, then one that makes the numbers smaller.

`TopK(0.01) >> Quantise(bits=4)` keeps one number in a hundred and writes each with four bits.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from fedpace.errors import ConfigError
from fedpace.protocol.codecs.reader import Reader

Vector = NDArray[np.float32]
Total = NDArray[np.float32] | NDArray[np.float64]
Buffer = bytes | memoryview
Sparse = tuple[NDArray[np.int64], Vector]

BLOCK = 1 << 16
"""Numbers that are worked on at a time: 256 kB of float32, which stay in a core's cache."""

_LARGE = 1 << 20  # numbers, of a vector that stands for all

LIMIT = 2.0**126
"""No decoded number is larger, so that sums of a few stay finite in float32."""


class Codec(ABC):
    """A rule that makes a float32 vector of shape (n,) into few bytes; one stage, or a chain of two."""

    @property
    @abstractmethod
    def reducer(self) -> Reducer | None:
        """None where every number is written."""

    @property
    @abstractmethod
    def coder(self) -> Coder | None:
        """None where the numbers stay float32."""

    @property
    def contractive(self) -> bool:
        """Whether E|x - decoded|^2 <= (1 - d) |x|^2 with some d > 0, for every x: what EF21 and error feedback need."""
        return self.error_bound(_LARGE) < 1

    @property
    def unbiased(self) -> bool:
        """Whether E[decoded] = x over seeds, so that it may go without error feedback."""
        return False

    @abstractmethod
    def error_bound(self, size: int) -> float:
        """The largest E|x - decoded|^2 / |x|^2 over vectors x of shape (size,), seeds averaged. `inf`: no bound."""

    def __rshift__(self, other: Codec) -> Codec:
        """This, then `other` on the numbers that are left. Raises ConfigError where `other` cannot follow."""
        if not isinstance(self, Reducer) or not isinstance(other, Coder):
            raise ConfigError(
                f"'{other}' cannot follow '{self}'; a chain is one of topk, randomk, lowrank, "
                "then one of quantise, qsgd, sign, half"
            )
        return Chain(self, other) if other.error_bound(_LARGE) else self  # float32 is how they are written anyhow


@dataclass(frozen=True)
class Stage(Codec):
    """A codec that is no chain. Its dataclass fields are its settings, checked where it is made (ConfigError)."""

    code: ClassVar[int]
    """Its byte in a frame."""

    name: ClassVar[str]

    def __str__(self) -> str:
        settings = []
        for position, field in enumerate(dataclasses.fields(self)):
            value = getattr(self, field.name)
            text = str(value).lower() if isinstance(value, bool) else str(value)
            if position == 0:
                settings.append(text)
            elif value != field.default:
                settings.append(f"{field.name}={text}")
        return f"{self.name}({', '.join(settings)})" if settings else self.name

    def pack(self) -> bytes:
        """Its settings as they are in a frame, after `code`."""
        return b""

    @classmethod
    def unpack(cls, reader: Reader) -> Self:
        """The inverse of `pack`. Raises PayloadError or ConfigError."""
        return cls()


@dataclass
class Context:
    """What an encoder may need beside the vector; see `encode`."""

    seed: int
    shapes: Sequence[tuple[int, ...]]
    memory: dict[str, NDArray[np.float32]] | None

    def generator(self, purpose: int) -> np.random.Generator:
        """Random numbers of this seed, others for every purpose."""
        return np.random.Generator(np.random.SFC64([purpose, self.seed]))


def add_sparse(total: Total, few: Sparse, weight: float) -> None:
    """Adds weight x numbers at their indices, in place."""
    indices, numbers = few
    np.add.at(total, indices, numbers if weight == 1 else numbers * np.float32(weight))


class Values(ABC):
    """The decoding half of a coder: `size` numbers in a frame, each at most `peak` in magnitude."""

    size: int
    peak: float

    @abstractmethod
    def blocks(self, weight: float = 1.0) -> Iterator[tuple[int, Vector]]:
        """(start, weight x numbers) from first to last; a block is good until the next one is asked for."""

    def sparse(self) -> Sparse | None:
        """The numbers that are not zero, where the frame holds only those."""
        return None

    def all(self) -> Vector:
        """All numbers, float32, shape (size,)."""
        found = np.empty(self.size, np.float32)
        for start, block in self.blocks():
            found[start : start + block.size] = block
        return found


class Layout(ABC):
    """The decoding half of a reducer: what `count` numbers say about the vector."""

    count: int

    def check(self, values: Values) -> None:
        """Raises PayloadError where these numbers would make one beyond LIMIT."""
        return

    @abstractmethod
    def sparse(self, values: Values) -> Sparse | None:
        """See `Frame.sparse`."""

    @abstractmethod
    def add_to(self, total: Total, values: Values, weight: float) -> None:
        """See `Frame.add_to`."""


class Reducer(Stage):
    """A stage that leaves fewer numbers, which a coder then writes."""

    @property
    def reducer(self) -> Reducer:
        return self

    @property
    def coder(self) -> None:
        return None

    @abstractmethod
    def reduce(self, vector: Vector, context: Context) -> tuple[list[Buffer], Vector]:
        """What a decoder must know beside the numbers, and the numbers."""

    @abstractmethod
    def open(self, reader: Reader, size: int) -> Layout:
        """Reads and checks what `reduce` wrote for a vector of shape (size,). Raises PayloadError."""

    @abstractmethod
    def chained_bound(self, size: int, coder: Coder) -> float:
        """`error_bound` where `coder` writes the numbers."""


class Coder(Stage):
    """A stage that writes every number, with fewer bits."""

    numberwise: ClassVar[bool] = False
    """Whether `error_bound` holds for every number by itself."""

    @property
    def reducer(self) -> None:
        return None

    @property
    def coder(self) -> Coder:
        return self

    @abstractmethod
    def write(self, values: Vector, context: Context) -> list[Buffer]:
        """The numbers as bytes."""

    @abstractmethod
    def open(self, reader: Reader, size: int) -> Values:
        """Reads and checks what `write` made of `size` numbers. Raises PayloadError."""


@dataclass(frozen=True)
class Chain(Codec):
    """A reducer whose numbers a coder writes."""

    first: Reducer
    then: Coder

    def __str__(self) -> str:
        return f"{self.first} >> {self.then}"

    @property
    def reducer(self) -> Reducer:
        return self.first

    @property
    def coder(self) -> Coder:
        return self.then

    @property
    def unbiased(self) -> bool:
        return self.first.unbiased and self.then.unbiased

    def error_bound(self, size: int) -> float:
        return self.first.chained_bound(size, self.then)
