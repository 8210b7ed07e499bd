"""A choice of parts, and the settings beside them; refused where they cannot go together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedpace.errors import ConfigError
from fedpace.strategies.fleet import Floats
from fedpace.strategies.parts import (
    Compensator,
    Context,
    Devices,
    Folder,
    Gate,
    Optimiser,
    Planner,
    Selector,
    SelectorFunction,
    Updates,
    Weigher,
    WeigherFunction,
)


@dataclass(frozen=True, slots=True)
class Composition:
    """All that decides what a strategy does.

    `devices`: how many updates a round is to bring, or, without rounds, how many tasks are kept out; a count, or a
    share of the devices connected (1.0: all). `min_train` and `min_available`: wait until so many are connected.
    `fraction_evaluate`, `min_evaluate`, `evaluate_every`: devices that evaluate, and at every how many versions.
    `max_staleness`: older updates are discarded (None: none are). `samples_key` names the metric that counts samples.
    """

    selector: Selector | SelectorFunction
    planner: Planner
    gate: Gate
    weighers: Sequence[Any]
    compensators: Sequence[Compensator]
    folder: Folder
    optimiser: Optimiser
    devices: int | float = 1.0
    min_train: int = 1
    min_available: int = 1
    fraction_evaluate: float = 0.0
    min_evaluate: int = 1
    evaluate_every: int = 1
    max_staleness: int | None = None
    samples_key: str = "num-examples"

    def __post_init__(self) -> None:
        """Raises ConfigError with the reason."""
        self._check_numbers()
        self._check_parts()
        for role, part in self.parts():
            reason = getattr(part, "refuse", lambda _: None)(self)
            if reason:
                raise ConfigError(f"{role} {name_of(part)} cannot go with the other parts: {reason}")

    def _check_numbers(self) -> None:
        is_share = isinstance(self.devices, float)
        if is_share and not 0.0 < self.devices <= 1.0:
            raise ConfigError(f"devices is {self.devices}: a share is more than 0.0 and at most 1.0; a count is an int")
        if not is_share and self.devices < 1:
            raise ConfigError(f"devices is {self.devices}: choose 1 or more, or a share of them such as 0.5")
        if not 0.0 <= self.fraction_evaluate <= 1.0:
            raise ConfigError(f"fraction_evaluate is {self.fraction_evaluate}: choose from 0.0 to 1.0")
        for name in ("min_train", "min_available", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: choose 1 or more")
        if self.min_evaluate < 0:
            raise ConfigError(f"min_evaluate is {self.min_evaluate}: choose 0 or more")
        if self.max_staleness is not None and self.max_staleness < 0:
            raise ConfigError(f"max_staleness is {self.max_staleness}: choose 0 or more, or None")

    def _check_parts(self) -> None:
        checks: list[tuple[str, Any, tuple[str, ...]]] = [
            ("planner", self.planner, ("plan",)),
            ("gate", self.gate, ("sends", "decide", "rounds", "late", "holds")),
            ("folder", self.folder, ("fold", "needs", "against")),
            ("optimiser", self.optimiser, ("step",)),
            *(("compensator", part, ("adjust", "finish")) for part in self.compensators),
        ]
        for role, part, needed in checks:
            for attribute in needed:
                if not hasattr(part, attribute):
                    raise ConfigError(f"{role} {name_of(part)} has no {attribute!r}: see fedpace.strategies.parts")
        if not (callable(self.selector) or hasattr(self.selector, "select")):
            raise ConfigError(f"selector {name_of(self.selector)} has no 'select' and is no function")
        for part in self.weighers:
            if not (callable(part) or hasattr(part, "weigh") or hasattr(part, "scale")):
                raise ConfigError(f"weigher {name_of(part)} has neither 'weigh' nor 'scale' and is no function")
        records = [part.record for part in self.compensators if hasattr(part, "record")]
        if len(set(records)) < len(records):
            raise ConfigError(f"two compensators use one array record: {', '.join(records)}")
        if self.folder.against == "current" and self.compensators:
            raise ConfigError(
                "a folder against the current model takes no compensators: they correct changes from the base model"
            )

    def parts(self) -> list[tuple[str, Any]]:
        """Every part with its role; the role is also the name of its memory."""
        return [
            ("selector", self.selector),
            ("planner", self.planner),
            ("gate", self.gate),
            *((f"weigher {i} {name_of(part)}", part) for i, part in enumerate(self.weighers)),
            *((f"compensator {i} {name_of(part)}", part) for i, part in enumerate(self.compensators)),
            ("folder", self.folder),
            ("optimiser", self.optimiser),
        ]

    @property
    def reads_pace(self) -> bool:
        """Whether any part may look at how fast devices are: those do that do not say otherwise."""
        parts = (self.selector, self.planner, self.gate, *self.weighers)
        return any(getattr(part, "reads_pace", True) for part in parts)

    @property
    def needs_scores(self) -> bool:
        return any(getattr(part, "needs_scores", False) for part in self.weighers)

    @property
    def needed(self) -> int:
        """Devices that must be there before anything is sent."""
        return max(self.min_available, self.min_train)

    def target(self, alive: int) -> int:
        """Updates wanted of a round, or tasks to keep out, in a fleet of so many devices."""
        count = math.floor(alive * self.devices + 1e-9) if isinstance(self.devices, float) else self.devices
        return max(1, self.min_train, int(count))


def name_of(part: Any) -> str:
    """What a part is called: the name of its class, or of the function that it is."""
    return getattr(part, "__name__", None) or type(part).__name__


def select(selector: Selector | SelectorFunction, devices: Devices, count: int, context: Context) -> Any:
    return (
        selector.select(devices, count, context) if hasattr(selector, "select") else selector(devices, count, context)
    )


def weigh(weigher: Weigher | WeigherFunction, updates: Updates, context: Context) -> Floats | Sequence[float]:
    return weigher.weigh(updates, context) if hasattr(weigher, "weigh") else weigher(updates, context)
