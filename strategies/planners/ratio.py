"""A codec for each device, by what its link carries."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from fedpace.errors import ConfigError
from fedpace.protocol.codecs import Codec, parse_codec
from fedpace.protocol.encoded import CODEC
from fedpace.strategies.parts import Context, Devices, Planner, Work
from fedpace.strategies.planners.fixed import Fixed

_APPS_OWN = Fixed()


@dataclass(frozen=True, slots=True)
class CodecByBandwidth:
    """Work as `planner` plans it, and with it the codec that the `compress` mod is to use: that of the highest bound which
    the device's measured bytes a second reach. `codecs` are bounds in bytes a second (0 for the slowest) with codecs, or
    their texts. Devices of unknown bandwidth, or slower than every bound, use the mod's own codec.

    Bandwidth is what each device was seen to move while it transferred, both ways together.
    """

    same: ClassVar[None] = None
    reads_pace: ClassVar[bool] = True

    codecs: Mapping[float, Codec | str]
    planner: Planner = _APPS_OWN

    def __post_init__(self) -> None:
        if not self.codecs:
            raise ConfigError("codec by bandwidth: codecs is empty; give at least one, as {0.0: TopK(0.01)}")
        for bound, codec in self.codecs.items():
            if not 0 <= bound < math.inf:
                raise ConfigError(f"codec by bandwidth: {bound} bytes a second; choose a finite bound of 0 or more")
            parse_codec(str(codec))

    def __getattr__(self, name: str) -> Any:
        """What else the planner has: whether it remembers, what it learns from."""
        if name.startswith("__") or name == "planner":
            raise AttributeError(name)
        return getattr(self.planner, name)

    def plan(self, devices: Devices, context: Context) -> Sequence[Work]:
        works = self.planner.plan(devices, context)
        bounds = sorted(self.codecs)
        texts = [str(parse_codec(str(self.codecs[bound]))) for bound in bounds]
        speeds = devices.bytes_per_second
        places = np.where(np.isnan(speeds), 0, np.searchsorted(bounds, speeds, side="right"))
        return [
            replace(work, config={**work.config, CODEC: texts[place - 1]}) if place else work
            for work, place in zip(works, places.tolist(), strict=True)
        ]
