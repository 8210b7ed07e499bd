"""Devices in an order: by turns, by the length of their tasks, by priority. The classics of operating systems
(Silberschatz et al., "Operating system concepts", chapter on CPU scheduling).

An order by anything but turns would starve those at its end. So a share of the choices, `explore`, goes to those that
were selected longest ago, new devices before all: everybody's turn comes. With `explore` 0 it does not.

In a fleet with more than 4,096 idle devices the order is that of those shown, drawn at random; with `needs_all` it is
that of all, and each choice then costs time in proportion to the fleet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedpace.errors import ConfigError
from fedpace.strategies.fleet import Floats, Rows
from fedpace.strategies.parts import Context, Devices
from fedpace.strategies.selectors.drawing import best, best_and_waiting, check_range, expected_seconds


@dataclass(frozen=True, slots=True)
class RoundRobin:
    """The least recently selected first."""

    reads_pace: ClassVar[bool] = False

    needs_all: bool = False

    def select(self, devices: Devices, count: int, context: Context) -> Rows:
        return best(count, context.rng, devices.last_selected)


@dataclass(frozen=True, slots=True)
class ShortestJobFirst:
    """Those first whose tasks are expected to take the least time, from sending to arrival.

    A device without any observation is expected to be as fast as its profile says beside those observed.
    """

    explore: float = 0.1
    needs_all: bool = False

    def __post_init__(self) -> None:
        check_range(self, "explore", 0.0, 1.0)

    def select(self, devices: Devices, count: int, context: Context) -> Rows:
        seconds = expected_seconds(devices, context)
        return best_and_waiting(devices, count, self.explore, context.rng, seconds)


@dataclass(frozen=True, slots=True)
class LongestJobFirst:
    """Those first whose tasks are expected to take the most time: what takes longest begins at once (Graham 1969,
    "Bounds on multiprocessing timing anomalies", the LPT rule)."""

    explore: float = 0.1
    needs_all: bool = False

    def __post_init__(self) -> None:
        check_range(self, "explore", 0.0, 1.0)

    def select(self, devices: Devices, count: int, context: Context) -> Rows:
        seconds = expected_seconds(devices, context)
        return best_and_waiting(devices, count, self.explore, context.rng, -seconds)


@dataclass(frozen=True, slots=True)
class Priority:
    """The highest priority first; among equals the one that waits longest.

    `priorities` are numbers by node id, or a function of `Devices` that returns one number a device. A device that the
    mapping does not hold, or for which the function says NaN, has the priority `default`.
    """

    reads_pace: ClassVar[bool] = False

    priorities: Mapping[int, float] | Callable[[Devices], Floats | Sequence[float]]
    default: float = 0.0
    explore: float = 0.1
    needs_all: bool = False
    _node_ids: NDArray[np.uint64] = field(init=False, repr=False, compare=False)
    _values: Floats = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_range(self, "explore", 0.0, 1.0)
        given: dict[Any, Any] = {} if callable(self.priorities) else dict(self.priorities)
        for node_id in given:
            if not isinstance(node_id, int) or not 0 <= node_id < 1 << 64:
                raise ConfigError(f"Priority: {node_id!r} is no node id; give priorities by ints of 64 bits")
        for whose, value in [*given.items(), ("default", self.default)]:
            if not np.isfinite(value):
                raise ConfigError(f"Priority: the priority of {whose} is {value}; give a finite number")
        ordered = sorted(given)
        object.__setattr__(self, "_node_ids", np.array(ordered, dtype=np.uint64))
        object.__setattr__(self, "_values", np.array([given[node_id] for node_id in ordered], dtype=np.float64))

    def select(self, devices: Devices, count: int, context: Context) -> Rows:
        keys = -self._priority(devices), devices.last_selected
        return best_and_waiting(devices, count, self.explore, context.rng, *keys)

    def _priority(self, devices: Devices) -> Floats:
        if callable(self.priorities):
            said = np.asarray(self.priorities(devices), dtype=np.float64)
            if said.shape != (len(devices),):
                raise ConfigError(
                    f"Priority: the function returned shape {said.shape} for {len(devices)} devices; return one number each"
                )
            return np.where(np.isnan(said), self.default, said)
        if not len(self._node_ids):
            return np.full(len(devices), self.default)
        node_ids = devices.node_id
        places = np.minimum(np.searchsorted(self._node_ids, node_ids), len(self._node_ids) - 1)
        return np.where(self._node_ids[places] == node_ids, self._values[places], self.default)
