"""Q-learning and SARSA: which kind of device is worth a task, learned from how its tasks end.

Each idle device is met in a state (how fast, loaded, short of memory and unreliable it is) and is selected or left idle.
A finished task pays a * T0 / T + b * C0 / C, with T its seconds from sending to arrival, C its cost, and T0 and C0 the
running medians of both, so that neither has a unit; one that fails pays nothing, nor does idling. The cost is the mean
of two: bytes moved and seconds computed, each in units of its own running median (a sum of megabytes and seconds would
weigh one against the other by the choice of units). One table serves all devices, so that what one taught holds for its
like, and it costs the same whatever the size of the fleet.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fedpace.errors import ConfigError
from fedpace.strategies.fleet import Floats, Rows
from fedpace.strategies.parts import Context, Devices, Outcome
from fedpace.strategies.selectors.drawing import all_but, best, check_range, portion

SKIP, SELECT = 0, 1
LOAD_EDGES = (0.3, 0.7)
FREE_MEMORY_EDGES = (0.25, 0.5)
"""Shares of load, and of memory that is free, that part their levels."""
SHAPE = (5, 4, 4, 3)
"""Levels of pace, load, free memory (0: unknown) and failures in a row (0, 1, more)."""
STATES = math.prod(SHAPE)
HIGHEST_RATIO = 10.0
"""Neither term of the reward counts for more than so many medians: a time of almost nothing is no proof of worth."""


@dataclass(frozen=True, slots=True)
class _Tabular(ABC):
    """What both have in common: states, rewards, and the epsilon-greedy choice.

    `exploration * exploration_decay ** round`, and not under `exploration_floor`, is the share of choices made at random;
    the others are the devices for which selecting is worth the most beside leaving them idle.
    """

    remembers: ClassVar[bool] = True

    a: float = 1.0
    b: float = 1.0
    learning_rate: float = 0.1
    discount: float = 0.5
    exploration: float = 0.5
    exploration_decay: float = 0.98
    exploration_floor: float = 0.1

    def __post_init__(self) -> None:
        check_range(self, "a", 0.0)
        check_range(self, "b", 0.0)
        for name in ("learning_rate", "discount", "exploration", "exploration_decay", "exploration_floor"):
            check_range(self, name, 0.0, 1.0)
        if self.discount == 1.0:
            raise ConfigError(f"{type(self).__name__}: discount is 1; choose less, or values grow without end")
        if not self.a + self.b > 0:
            raise ConfigError(f"{type(self).__name__}: a and b are both 0; give one of them a weight")

    def select(self, devices: Devices, count: int, context: Context) -> Rows:
        rng, memory = context.rng, context.memory
        table = np.array(memory.get("table", [[0.0, 0.0]] * STATES))
        pace = own_log_seconds(devices)
        state = device_states(devices, pace, track_quartiles(memory, pace))
        share = max(self.exploration_floor, self.exploration * self.exploration_decay ** max(context.round, 0))
        random = rng.choice(len(devices), portion(count, share, rng), replace=False)
        others = all_but(random, len(devices))
        worth = table[state, SELECT] - table[state, SKIP]
        chosen = np.concatenate([others[best(count - len(random), rng, -worth[others])], random])

        self._settle(table, memory, set(devices.row[chosen].tolist()))
        shown = np.bincount(state, minlength=STATES)
        selected = np.bincount(state[chosen], minlength=STATES) / np.maximum(shown, 1)
        # What idling brings is known and need not be sampled: nothing, and the device is met again as it is. So it is
        # backed up in full, for every state shown (Sutton and Barto 2018, section 8.5, expected updates).
        table[shown > 0, SKIP] = self.discount * self._value(table, selected)[shown > 0]
        memory["table"] = table.tolist()

        out = memory.setdefault("out", {})
        for position in chosen:
            states = out.setdefault(str(int(devices.row[position])), [])
            states.append(int(state[position]))
            del states[: -int(devices.slots[position])]  # of tasks that were called off and never ended
        return chosen

    def observe(self, outcome: Outcome, context: Context) -> None:
        memory = context.memory
        states = memory.get("out", {}).get(str(outcome.row))
        if not states:
            return
        state = states.pop(0)
        if not states:
            del memory["out"][str(outcome.row)]
        device = Devices(context.fleet, np.array([outcome.row], dtype=np.intp))
        next_state = int(device_states(device, own_log_seconds(device), memory.get("quartiles"))[0])
        self._learn(memory, state, reward(outcome, memory, self.a, self.b), next_state, outcome.row)

    def _update(self, entry: Any, target: float) -> None:
        """Moves the value of selecting towards a target, by the learning rate."""
        entry[SELECT] += self.learning_rate * (target - entry[SELECT])

    @abstractmethod
    def _learn(self, memory: dict[str, Any], state: int, paid: float, next_state: int, row: int) -> None:
        """Takes in one finished task."""

    @abstractmethod
    def _settle(self, table: Floats, memory: dict[str, Any], chosen: set[int]) -> None:
        """Takes in what had to wait until the rows chosen next are known."""

    @abstractmethod
    def _value(self, table: Floats, selected: Floats) -> Floats:
        """Value of each state, shape (states,), where the shares `selected` of its devices were selected."""


@dataclass(frozen=True, slots=True)
class QLearning(_Tabular):
    """Q-learning: Q(s, a) += rate * (r + discount * max Q(s', .) - Q(s, a)) (Watkins and Dayan 1992, equation 1)."""

    def _learn(self, memory: dict[str, Any], state: int, paid: float, next_state: int, row: int) -> None:
        table = memory["table"]
        self._update(table[state], paid + self.discount * max(table[next_state]))

    def _settle(self, table: Floats, memory: dict[str, Any], chosen: set[int]) -> None:
        return

    def _value(self, table: Floats, selected: Floats) -> Floats:
        result: Floats = table.max(axis=1)
        return result


@dataclass(frozen=True, slots=True)
class Sarsa(_Tabular):
    """SARSA: Q(s, a) += rate * (r + discount * Q(s', a') - Q(s, a)), with a' the action taken next (Rummery and Niranjan
    1994; Sutton and Barto 2018, section 6.4). So a finished task is learned from at the next choice, which selects its
    device again or does not. For devices left idle, a' is the share of those in their state that the choice selected.
    """

    def _learn(self, memory: dict[str, Any], state: int, paid: float, next_state: int, row: int) -> None:
        memory.setdefault("ended", []).append([state, paid, next_state, row])

    def _settle(self, table: Floats, memory: dict[str, Any], chosen: set[int]) -> None:
        for state, paid, next_state, row in memory.get("ended", []):
            action = SELECT if row in chosen else SKIP
            self._update(table[state], paid + self.discount * float(table[next_state, action]))
        memory["ended"] = []

    def _value(self, table: Floats, selected: Floats) -> Floats:
        result: Floats = selected * table[:, SELECT] + (1.0 - selected) * table[:, SKIP]
        return result


def own_log_seconds(devices: Devices) -> Floats:
    """ln(seconds) of each device's task as it was observed itself; NaN for one that was not."""
    with np.errstate(all="ignore"):
        steps = np.where(np.isfinite(devices.steps) & (devices.steps > 0), devices.steps, 1.0)
        result: Floats = np.logaddexp(devices.step_mean + np.log(steps), devices.link_mean)
    return result


def device_states(devices: Devices, pace: Floats, quartiles: list[float] | None) -> Rows:
    """Number of each device's state, from 0 to `STATES` - 1; `pace` is its own ln(seconds), or NaN."""
    with np.errstate(all="ignore"):
        free = devices.free_memory_bytes / devices.memory_bytes
    levels = (
        _level(pace, quartiles) if quartiles else np.zeros(len(devices), dtype=np.intp),
        _level(devices.load, LOAD_EDGES),
        _level(free, FREE_MEMORY_EDGES),
        np.clip(devices.failures_in_a_row, 0, SHAPE[3] - 1),
    )
    result: Rows = np.ravel_multi_index(levels, SHAPE)
    return result


def _level(values: Floats, edges: list[float] | tuple[float, ...]) -> Rows:
    """0 where a value is not finite, else 1 and one more for every edge that it reaches."""
    result: Rows = np.where(np.isfinite(values), 1 + np.searchsorted(edges, values, side="right"), 0)
    return result


def track_quartiles(memory: dict[str, Any], values: Floats) -> list[float] | None:
    """The running quartiles, moved towards those of the finite values; None while there never were any.

    By stochastic approximation (Robbins and Monro 1951): a quantile rises by the rate times the share of values that is
    too much above it. One value at a time, as when devices become free one by one, moves it as many at once do on average.
    """
    finite = values[np.isfinite(values)]
    quartiles: list[float] | None = memory.get("quartiles")
    if len(finite):
        levels = np.array([0.25, 0.5, 0.75])
        if quartiles is None:
            moved = np.quantile(finite, levels)
        else:
            below = np.array([np.count_nonzero(finite < quartile) for quartile in quartiles]) / len(finite)
            moved = np.sort(np.array(quartiles) + 0.05 * (levels - below))
        memory["quartiles"] = quartiles = moved.tolist()
    return quartiles


def reward(outcome: Outcome, memory: dict[str, Any], a: float, b: float) -> float:
    """a * T0 / T + b * C0 / C of a finished task, 0 of a failed one. Finite and >= 0; updates the running medians.

    A cost that nobody reports is as the median.
    """
    if outcome.reason or not 0 < outcome.seconds < math.inf:
        return 0.0
    time = _relative(memory, "seconds", outcome.seconds)
    costs = [
        _relative(memory, name, value)
        for name, value in (("bytes", outcome.bytes_moved), ("compute", outcome.compute_seconds))
        if 0 < value < math.inf
    ]
    cost = sum(costs) / len(costs) if costs else 1.0
    return a * min(1.0 / time, HIGHEST_RATIO) + b * min(1.0 / cost, HIGHEST_RATIO)


def _relative(memory: dict[str, Any], name: str, value: float) -> float:
    """A positive value in units of its running median, which follows it: fast at first, by 2 % a task later on."""
    log = math.log(value)
    medians = memory.setdefault("medians", {})
    median, count = medians.get(name, (log, 0))
    median += max(0.02, 1.0 / (count + 1)) * float(np.sign(log - median))
    medians[name] = [median, count + 1]
    return math.exp(min(max(log - median, -700.0), 700.0))
