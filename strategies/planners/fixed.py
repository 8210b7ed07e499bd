"""The same work for everybody."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedpace.errors import ConfigError
from fedpace.strategies.parts import Context, Devices, Work


@dataclass(frozen=True, slots=True)
class Fixed:
    """`steps` local steps for every device; None: what the app does by itself."""

    reads_pace: ClassVar[bool] = False

    steps: int | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"fixed work: steps is {self.steps}; choose 1 or more, or None")

    @property
    def same(self) -> Work:
        """What everybody gets; of planners that have it, nothing else is asked."""
        return Work(steps=self.steps)

    def plan(self, devices: Devices, context: Context) -> Sequence[Work]:
        return [self.same] * len(devices)
