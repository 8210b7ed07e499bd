"""The model on its way down as what has changed since a version that the device holds.

In place of the floating-point arrays of an array record there is one array called "fedpace.steps": the steps of the server
from the version held to the one that is meant, as codecs' frames. Arrays of other kinds stay as they are. Its bytes are,
in little-endian order:

    offset  bytes
    0       1      version of this format: 1
    1       4      digest of the layout: names and shapes of the arrays that steps are of
    5       4      CRC-32 of the floating-point arrays of the version that the steps lead to
    9       4      the version before the first step
    13      2      steps, n
    15      4 n    length of each frame
    ...            the codecs' frames, see `fedpace.protocol.codecs`

The version that steps lead to *is* the sum of what the frames decode to, added up in `moved`: so who adds up the same
frames holds the same bits.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array
from numpy.typing import NDArray

from fedpace.errors import PayloadError
from fedpace.protocol.codecs import Frame, open_frame
from fedpace.protocol.encoded import StepLayout

STEPS = "fedpace.steps"
"""Name of the array."""
STEPS_TYPE = "fedpace.steps/1"
"""Its `stype`."""
VERSION = "fedpace.version"
"""Key of the config that says which version of the model a message has, and of the metric that says which one is held."""
MOST_STEPS = 10_000

_HEAD = struct.Struct("<B4sIIH")
_FORMAT = 1


@dataclass(frozen=True)
class Steps:
    """Steps from version `first` to `first + len(frames)`, whose floating-point arrays have the CRC-32 `digest`."""

    first: int
    frames: Sequence[Frame]
    digest: int

    @property
    def last(self) -> int:
        return self.first + len(self.frames)


def pack_steps(frames: Sequence[bytes], layout: StepLayout, *, first: int, digest: int) -> Array:
    """The array that carries the steps after version `first`, at most MOST_STEPS."""
    head = _HEAD.pack(_FORMAT, layout.digest, digest, first, len(frames))
    lengths = struct.pack(f"<{len(frames)}I", *map(len, frames))
    return Array("float32", (layout.size,), STEPS_TYPE, b"".join([head, lengths, *frames]))


def read_steps(view: bytes | memoryview, layout: StepLayout, allowed: Collection[str] | None = None) -> Steps:
    """Steps from the bytes of their array, which frames go on to look at.

    Raises PayloadError for bytes that are no steps of this layout, before it takes memory beyond a multiple of theirs.
    """
    view = memoryview(view)
    if len(view) < _HEAD.size:
        raise PayloadError(f"are no steps: {len(view)} bytes, and their head takes {_HEAD.size}")
    version, own, digest, first, count = _HEAD.unpack_from(view)
    if version != _FORMAT:
        raise PayloadError(f"are steps of format {version}, and only {_FORMAT} is known here")
    if own != layout.digest:
        raise PayloadError("are steps of a model with other arrays than the one that is held")
    start = _HEAD.size + 4 * count
    if count > MOST_STEPS or len(view) < start:
        raise PayloadError(f"are no steps: {count} of them do not fit {len(view)} bytes")
    lengths = struct.unpack_from(f"<{count}I", view, _HEAD.size)
    if start + sum(lengths) != len(view):
        raise PayloadError(f"are no steps: their frames take {sum(lengths)} bytes, and {len(view) - start} are there")
    frames = []
    for length in lengths:
        frames.append(open_frame(view[start : start + length], size=layout.size, allowed=allowed))
        start += length
    return Steps(first, frames, digest)


def steps_kind(view: bytes | memoryview) -> str:
    """What is remembered of steps that were sent, to hold replies against: `layout_told` reads it."""
    return f"{STEPS_TYPE} {bytes(view[1:5]).hex()}"


def layout_told(kind: str, shape: tuple[int, ...]) -> StepLayout:
    """The layout of the model that was sent as steps of that shape."""
    return StepLayout.told(shape[0], bytes.fromhex(kind.split()[1]))


def sum_dtype(dtypes: Iterable[np.dtype[Any]]) -> np.dtype[Any]:
    """In which numbers the arrays of a model are moved: float64 where it has such arrays, else float32."""
    return np.dtype(np.float64 if np.dtype(np.float64) in set(dtypes) else np.float32)


def moved(array: NDArray[Any], step: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """A floating-point array, moved by a step of its shape: added in `dtype`, kept in its own."""
    return np.asarray(array.astype(dtype, copy=False) + step, array.dtype)


def advanced(arrays: Mapping[str, NDArray[Any]], steps: Sequence[Frame], layout: StepLayout) -> dict[str, NDArray[Any]]:
    """Floating-point arrays, by name, moved by steps one after the other."""
    found = dict(arrays)
    dtype = sum_dtype(array.dtype for array in found.values())
    for frame in steps:
        vector = frame.dense()
        for name, place in layout.places.items():
            found[name] = moved(found[name], vector[place].reshape(layout.shapes[name]), dtype)
    return found


def digest_of(arrays: Iterable[NDArray[Any]]) -> int:
    """CRC-32 of arrays' numbers, one array after the other."""
    found = 0
    for array in arrays:
        found = zlib.crc32(np.ascontiguousarray(array).view(np.uint8).reshape(-1).data, found)
    return found
