"""A frame: one vector as bytes, and what reads them. docs/codecs.md has every byte."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedpace.errors import ConfigError, PayloadError
from fedpace.protocol.codecs.codec import (
    LIMIT,
    Chain,
    Codec,
    Coder,
    Context,
    Layout,
    Reducer,
    Sparse,
    Total,
    Values,
    Vector,
    add_sparse,
)
from fedpace.protocol.codecs.floats import Half, Raw, peak_of
from fedpace.protocol.codecs.lowrank import LowRank
from fedpace.protocol.codecs.qsgd import QSGD
from fedpace.protocol.codecs.reader import Reader, varint
from fedpace.protocol.codecs.scaled import Quantise, Sign
from fedpace.protocol.codecs.sparse import RandomK, TopK

FORMAT_VERSION = 1
_REDUCER_KINDS: tuple[type[Reducer], ...] = (TopK, RandomK, LowRank)
_CODER_KINDS: tuple[type[Coder], ...] = (Raw, Half, Quantise, QSGD, Sign)
_REDUCERS = {kind.code: kind for kind in _REDUCER_KINDS}
_CODERS = {kind.code: kind for kind in _CODER_KINDS}
STAGES: Mapping[str, type[Reducer | Coder]] = {
    **{kind.name: kind for kind in _REDUCER_KINDS},
    **{kind.name: kind for kind in _CODER_KINDS},
}
"""Every stage by its name."""

_RAW = Raw()
_WHOLE = b"\0"
_ENCODED_LIMIT = 2.0**64
_MAX_SIZE = (1 << 31) - 1


def encode(
    codec: Codec,
    vector: Vector,
    *,
    seed: int,
    shapes: Sequence[tuple[int, ...]] = (),
    memory: dict[str, NDArray[np.float32]] | None = None,
) -> bytes:
    """The frame of a float32 vector of shape (n,), n below 2**31; the same bytes for the same arguments.

    `seed`, not negative, is what random choices and rounding follow from: another for every frame, or errors add up.
    `shapes` are those of the arrays in the vector, one after the other; lowrank needs them. `memory` belongs to the
    sender of these vectors: what a codec keeps from frame to frame, changed in place (lowrank's warm start, float32).
    Raises PayloadError where a number is not finite or beyond 2**64, and ConfigError for a wrong argument.
    """
    if vector.dtype != np.float32 or vector.ndim != 1 or vector.size > _MAX_SIZE:
        raise ConfigError(
            f"a codec takes a flat float32 vector below 2**31, not {vector.dtype} of shape {vector.shape}"
        )
    if seed < 0:
        raise ConfigError(f"the seed of a frame is {seed}; it is not negative")
    vector = np.ascontiguousarray(vector)
    if not peak_of(vector) <= _ENCODED_LIMIT:
        first = int(np.flatnonzero(~(np.abs(vector) <= _ENCODED_LIMIT))[0])
        raise PayloadError(f"number {first} of the vector is {vector[first]}; it is to be finite and at most 2**64")
    context = Context(seed, shapes, memory)
    reducer, coder = codec.reducer, codec.coder or _RAW
    head = bytes([FORMAT_VERSION])
    head += _WHOLE if reducer is None else bytes([reducer.code]) + reducer.pack()
    head += bytes([coder.code]) + coder.pack() + varint(vector.size)
    side, values = ([], vector) if reducer is None else reducer.reduce(vector, context)
    return b"".join([head, *side, *coder.write(values, context)])


def open_frame(view: bytes | memoryview, *, size: int, allowed: Collection[str] | None = None) -> Frame:
    """Checks a frame and reads it in place, where it can: `view` is to stay as it is for as long as the Frame is used.

    `size` is the length that the vector must have. `allowed` names the codecs that are: each is a stage (`topk`,
    `quantise`), good in any chain, or a whole codec (`topk(0.01) >> quantise(4)`); None allows all. Raises PayloadError
    that says what is wrong, before it takes memory beyond a multiple of the frame's.
    """
    reader = Reader(view)
    total = reader.left
    if (version := reader.byte("its version")) != FORMAT_VERSION:
        raise PayloadError(f"the frame has format version {version}; this side reads {FORMAT_VERSION}")
    reducer, coder = _read_codec(reader)
    codec = str(coder if reducer is None else reducer if coder == _RAW else Chain(reducer, coder))
    names = {part.split("(")[0] for part in codec.split(" >> ")}
    if allowed is not None and codec not in allowed and not names <= set(allowed):
        raise PayloadError(f"the codec {codec} is not allowed here; allowed: {', '.join(sorted(allowed)) or 'none'}")
    if (stated := reader.varint("its size")) != size:
        raise PayloadError(f"the frame is of a vector of {stated} numbers; the model has {size}")
    layout = _Whole(size) if reducer is None else reducer.open(reader, size)
    values = coder.open(reader, layout.count)
    if reader.left:
        raise PayloadError(f"the frame has {reader.left} bytes too many")
    if not values.peak <= LIMIT:
        raise PayloadError("the frame holds a number that is not finite, or beyond 2**126")
    layout.check(values)
    return Frame(codec, size, total, layout, values)


def _read_codec(reader: Reader) -> tuple[Reducer | None, Coder]:
    reducer: Reducer | None = None
    try:
        if code := reader.byte("its codec"):
            if code not in _REDUCERS:
                raise PayloadError(f"the frame has a first stage {code}, which this version does not know")
            reducer = _REDUCERS[code].unpack(reader)
        if (code := reader.byte("its codec")) not in _CODERS:
            raise PayloadError(f"the frame has a stage {code}, which this version does not know")
        return reducer, _CODERS[code].unpack(reader)
    except ConfigError as error:
        raise PayloadError(f"the frame has a codec that cannot be: {error}") from None


class Frame:
    """An encoded vector of shape (size,), checked. It keeps the bytes it was opened from in use."""

    def __init__(self, codec: str, size: int, nbytes: int, layout: Layout, values: Values) -> None:
        self.codec = codec
        """The codec as text, which `parse_codec` reads."""
        self.size = size
        self.nbytes = nbytes
        """Bytes of the frame."""
        self._layout = layout
        self._values = values

    @cached_property
    def sparse(self) -> Sparse | None:
        """Where the frame has few numbers: their indices (int64, rising, shape (k,)) and themselves (float32)."""
        return self._layout.sparse(self._values)

    def add_to(self, total: Total, weight: float = 1.0) -> None:
        """Adds weight x decoded to `total`, float32 or float64, shape (size,), in place and in blocks.

        A sparse frame touches only its indices. Raises ConfigError for another shape or dtype.
        """
        if total.shape != (self.size,) or total.dtype not in (np.float32, np.float64):
            raise ConfigError(
                f"a frame of {self.size} numbers is added to as many float32 or float64, "
                f"not to {total.dtype} of shape {total.shape}"
            )
        self._layout.add_to(total, self._values, weight)

    def dense(self) -> Vector:
        """The decoded vector, float32, shape (size,)."""
        found = np.zeros(self.size, np.float32)
        self.add_to(found)
        return found


class _Whole(Layout):
    """No reducer: every number is there."""

    def __init__(self, size: int) -> None:
        self.count = size

    def sparse(self, values: Values) -> Sparse | None:
        return values.sparse()

    def add_to(self, total: Total, values: Values, weight: float) -> None:
        if few := values.sparse():
            add_sparse(total, few, weight)
            return
        for start, block in values.blocks(weight):
            total[start : start + block.size] += block
