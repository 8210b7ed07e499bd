"""The server's steps in few bytes: what the codec drops is kept, and added to the next step.

A version *is* the version before it plus what the step's frame decodes to, so that devices which add up the same frames
hold the same bits (Tang, Yu, Lian, Zhang, Liu: "DoubleSqueeze", ICML 2019, algorithm 1, the server's half). What devices
hold is known from their replies; nothing is kept for devices that never replied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord

from fedpace.errors import ConfigError
from fedpace.protocol.codecs import Codec, encode, open_frame, parse_codec
from fedpace.protocol.downlink import MOST_STEPS, STEPS, VERSION, digest_of, pack_steps
from fedpace.protocol.mapped import size_of
from fedpace.strategies.layout import Layout, Model
from fedpace.strategies.parts import Vector


class Downlink:
    """The steps of a run, and which version each device holds, by node id.

    Beside the model it takes the memory of one more (what was dropped), and of frames as large as one at most.
    """

    def __init__(self, codec: Codec, layout: Layout, seed: int) -> None:
        """Raises ConfigError for a model without floating-point arrays."""
        if not layout.floats:
            raise ConfigError(f"downlink {codec}: the model has no floating-point arrays that it could make smaller")
        self._codec = codec
        self._layout = layout
        self._seed = seed
        self._shapes = list(layout.steps.shapes.values())
        self._dropped: Vector = np.zeros(layout.floats, layout.dtype)
        self._whole = sum(
            layout.dtypes[name].itemsize * math.prod(shape) for name, shape in layout.steps.shapes.items()
        )
        self._memory: dict[str, Any] = {}
        self._frames: dict[int, bytes] = {}
        self._bytes = 0
        self._held: dict[int, int] = {}
        self._packed: dict[tuple[int, int], Array] = {}
        self._digest: tuple[int, int] = (-1, 0)

    def quantised(self, step: Vector, version: int) -> Vector:
        """What replicas can follow of the step that leads to a version; the rest is part of the next one."""
        floats = self._layout.floats
        wanted = step[:floats] + self._dropped
        frame = encode(
            self._codec,
            wanted.astype(np.float32),
            seed=self._seed + version,
            shapes=self._shapes,
            memory=self._memory,
        )
        found = np.empty_like(step)
        found[floats:] = step[floats:]
        found[:floats] = open_frame(frame, size=floats).dense()
        self._dropped = wanted - found[:floats]
        self._keep(version, frame)
        return found

    def _keep(self, version: int, frame: bytes) -> None:
        """Frames that together are larger than the model serve nobody."""
        self._frames[version] = frame
        self._bytes += len(frame)
        while self._bytes > self._layout.floats * self._layout.dtype.itemsize or len(self._frames) > MOST_STEPS:
            self._bytes -= len(self._frames.pop(next(iter(self._frames))))
        self._packed = {}

    # ------------------------------------------------------------ who holds what

    def hear(self, node_id: int, version: int, metrics: Mapping[str, Any]) -> None:
        """A device replied to a task with a version: it says if it keeps it."""
        if metrics.get(VERSION) == version:
            self._held[node_id] = version
        else:
            self.forget(node_id)

    def forget(self, node_id: int) -> None:
        """Nobody knows what the device holds."""
        self._held.pop(node_id, None)

    def held(self, node_id: int, version: int, model: Model) -> int | None:
        """The version that a device holds, if the steps from there to `version` are known, and smaller than the model."""
        first = self._held.get(node_id)
        if first is None or first > version:
            return None
        if first < version and first + 1 not in self._frames:  # the oldest go first: later ones are there
            return None
        return first if size_of(self._steps(first, version, model)) < self._whole else None

    def outgoing(self, held: int, version: int, model: Model) -> ArrayRecord:
        """The array record for devices that hold a version: the steps since, and the arrays that no step is of."""
        record = {STEPS: self._steps(held, version, model)}
        counters = {name: model.record[name] for name in self._layout.counters}
        return ArrayRecord({**record, **counters})

    def _steps(self, held: int, version: int, model: Model) -> Array:
        key = (held, version)
        if key not in self._packed:
            frames = [self._frames[number] for number in range(held + 1, version + 1)]
            if self._digest[0] != version:
                self._digest = version, digest_of(model.arrays[name] for name in self._layout.steps.shapes)
            self._packed[key] = pack_steps(frames, self._layout.steps, first=held, digest=self._digest[1])
        return self._packed[key]


def downlink_codec(codec: Codec | str | None) -> Codec | None:
    """A strategy's setting. Raises ConfigError for a codec that error feedback cannot make up for."""
    found = parse_codec(codec) if isinstance(codec, str) else codec
    if found is not None and not (found.contractive or found.unbiased):
        raise ConfigError(f"downlink: {found} is neither contractive nor unbiased, so what it drops would never arrive")
    return found
