"""The envelope of a compressed update: what stands before a codec's frame in a device's reply, and how it is read.

A device that compresses sends, in the array record that its model came in, one array called "fedpace.step" in place of
all floating-point arrays: the step, which is the arrays after training minus those received, one after the other in the
model's order, as one vector of float32. Arrays of other kinds stay as they are. The array's bytes are, in little-endian
order:

    offset  bytes
    0       1      version of this envelope: 1
    1       1      flags: 1 the device wants to know the update's fate, 2 EF21 (fields below are there)
    2       4      digest of the layout: names and shapes of the arrays that the step stands for
    6       4      stream: which residual the update was taken from; a device has one for each state it keeps, never 0
    10      4      EF21 only: the name of the copy that the frame is to be added to, 0 for zeros
    10, 14  ...    the codec's frame, see `fedpace.protocol.codecs`

EF21's frame is no step but the difference between the step and a copy that device and server both keep. The name of a
copy says all that was added up in it: CRC-32 over the frames, one after the other. Whoever holds a copy of another name
cannot take the frame; so two copies of one name are equal, bit for bit, whatever was lost on the way.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from flwr.app import Array

from fedpace.errors import PayloadError
from fedpace.protocol.codecs import Frame, open_frame

STEP = "fedpace.step"
"""Name of the array."""
STEP_TYPE = "fedpace.step/1"
"""Its `stype`."""

FATES = "fedpace.fates"
"""Key of the config that all devices get: who tells fates, a number that is another for every strategy that starts."""
FOLDED, OPEN = "fedpace.folded", "fedpace.open"
"""Keys of a device's own config, of words with spaces between: messages whose updates were folded, in that order, each as
`folded_name` says; and the ids of those whose updates have no fate yet."""
NONE = "-"
"""Stands for no words: Flower's `count_bytes` takes no empty value."""
CODEC = "fedpace.codec"
"""Key of a device's own config: the codec that it is to use, as text."""

_HEAD = struct.Struct("<BB4sI")
_COPY = struct.Struct("<I")
_VERSION = 1
_WANTS_FATE, _EF21 = 1, 2


@dataclass(frozen=True)
class StepLayout:
    """The arrays that a step stands for, in the model's order: shapes by name."""

    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, arrays: Iterable[tuple[str, str, tuple[int, ...]]]) -> StepLayout:
        """Of a model's arrays as (name, dtype, shape): those of floating-point numbers that numpy knows."""
        return cls({name: tuple(shape) for name, dtype, shape in arrays if is_float(dtype)})

    @classmethod
    def told(cls, size: int, digest: bytes) -> StepLayout:
        """One of which no more is known than how many numbers it has, and its digest."""
        layout = cls({})
        layout.__dict__.update(size=size, digest=digest)  # what the cached properties would work out
        return layout

    @cached_property
    def size(self) -> int:
        """Numbers in a step."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @cached_property
    def places(self) -> Mapping[str, slice]:
        """Where each array lies in the vector."""
        places, start = {}, 0
        for name, shape in self.shapes.items():
            places[name] = slice(start, start + math.prod(shape))
            start += math.prod(shape)
        return places

    @cached_property
    def digest(self) -> bytes:
        """4 bytes of names and shapes."""
        text = "\n".join(f"{name!r} {list(shape)}" for name, shape in self.shapes.items())
        return zlib.crc32(text.encode("utf-8", "surrogatepass")).to_bytes(4, "little")


@dataclass(frozen=True)
class Step:
    """A compressed update, read. `base` is EF21's: the name of the copy that `frame` is to be added to."""

    frame: Frame
    stream: int
    wants_fate: bool
    base: int | None = None
    after: int | None = None
    """EF21: the name of the copy once `frame` has been added to it."""


def is_float(dtype: str) -> bool:
    """Whether a dtype's arrays take part in steps."""
    try:
        return np.dtype(dtype).kind == "f"
    except Exception:  # noqa: BLE001 - a name may be anything, and numpy parses it with what Python has
        return False


def reply_record(sent: str) -> str:
    """In which array record a model comes back that went out in `sent`: in Flower's legacy API it has another name."""
    return sent.replace("fitins.parameters", "fitres.parameters")


def folded_name(message_id: str, stream: int) -> str:
    """How a device is told that the update it sent for a message was folded: a message may have been answered twice, from
    two states, of which the server took one."""
    return f"{message_id}@{stream:08x}"


def copy_name(base: int, frame: bytes | memoryview) -> int:
    """The name of EF21's copy `base` once `frame` (a codec's frame) has been added to it; never 0."""
    return zlib.crc32(frame, base) or 1


def pack_step(
    frame: bytes, layout: StepLayout, *, stream: int, wants_fate: bool = False, base: int | None = None
) -> Array:
    """The array that carries a frame. `base` is EF21's: the name of the copy that the frame is to be added to."""
    flags = (_WANTS_FATE if wants_fate else 0) | (0 if base is None else _EF21)
    head = _HEAD.pack(_VERSION, flags, layout.digest, stream) + (b"" if base is None else _COPY.pack(base))
    return Array("float32", (layout.size,), STEP_TYPE, head + frame)


def read_step(view: bytes | memoryview, layout: StepLayout, allowed: Collection[str] | None = None) -> Step:
    """A step from the bytes of its array, which the frame goes on to look at.

    `allowed` are the codecs that may be used, as `open_frame` takes them. Raises PayloadError for bytes that are no step
    of this layout, before it takes memory for more than the payload.
    """
    view = memoryview(view)
    if len(view) < _HEAD.size:
        raise PayloadError(f"is no step: it has {len(view)} bytes, and its head takes {_HEAD.size}")
    version, flags, digest, stream = _HEAD.unpack_from(view)
    if version != _VERSION:
        raise PayloadError(f"is a step of version {version}, and only version {_VERSION} is known here")
    if flags & ~(_WANTS_FATE | _EF21):
        raise PayloadError(f"is a step with flags {flags:#x}, of which some are not known here")
    if digest != layout.digest:
        raise PayloadError("is a step between models with other arrays than those that were sent out")
    if not stream:
        raise PayloadError("is a step of stream 0, and streams count from 1")
    start, base = _HEAD.size, None
    if flags & _EF21:
        if len(view) < start + _COPY.size:
            raise PayloadError(f"is no step: it ends after {len(view)} bytes, within its head")
        (base,) = _COPY.unpack_from(view, start)
        start += _COPY.size
    frame = open_frame(view[start:], size=layout.size, allowed=allowed)
    after = None if base is None else copy_name(base, view[start:])
    return Step(frame, stream, bool(flags & _WANTS_FATE), base, after)
