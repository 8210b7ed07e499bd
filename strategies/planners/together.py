"""Devices of any speed in groups that arrive together: planner and gate of FedCompass.

Li et al. 2024, "FedCompass: efficient cross-silo federated learning on heterogeneous client devices using a computing
power-aware scheduler", ICLR, arXiv:2309.14675, section 3: the scheduler Compass (AssignGroup, JoinGroup, CreateGroup).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fedpace.errors import ConfigError
from fedpace.strategies.parts import Context, Devices, Standing, Verdict, Work


@dataclass(frozen=True, slots=True)
class Together:
    """From `q_min` to `q_max` local steps, such that the devices of a group arrive at one time. Is planner and gate.

    A device joins the group in which it does most steps within these bounds; where it fits none it opens one, with as
    many steps as let the fastest of another group join it later. A device gets `q_min` and no group until its pace was
    observed once. Where the paper has seconds a step, this has those and the overhead of a task.

    A group is folded once all who are out for it arrived, or at its latest time: `slack` (lambda) times as long as its
    first device was expected to need. An update of no group, or one that comes after its group, is folded at once. (The
    paper keeps late ones for the next group. Its folds add up, so only their staleness differs.)

    In memory: "groups", by number as text, with "expected" and "latest" (seconds on the grid's clock) and "again"
    (seconds that the fastest of its devices needs for `q_max` steps); and the number of the "next".
    """

    q_min: int = 20
    q_max: int = 100
    slack: float = 1.2

    rounds: ClassVar[bool] = False
    late: ClassVar[str] = "fold"
    holds: ClassVar[bool] = True
    shares: ClassVar[str] = "compass"
    needs_groups: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 1 <= self.q_min <= self.q_max:
            raise ConfigError(f"arriving together: q_min {self.q_min}, q_max {self.q_max}; choose 1 <= q_min <= q_max")
        if not 1.0 <= self.slack < math.inf:
            raise ConfigError(f"arriving together: slack is {self.slack}; choose a finite number from 1 on")

    def refuse(self, strategy: Any) -> str | None:
        for part in (strategy.planner, strategy.gate):
            if getattr(part, "shares", None) != self.shares:
                return "it closes the groups that it forms: make it planner and gate"
        return None

    # ------------------------------------------------------------ the gate

    def sends(self, target: int) -> int:
        return target

    def decide(self, standing: Standing, context: Context) -> Verdict:
        """O(groups open + updates waiting)."""
        groups: dict[str, Any] = context.memory.get("groups", {})
        out, arrived = set(standing.out_groups), set(standing.waiting_groups)
        why = []
        for name, group in list(groups.items()):
            if int(name) in arrived - out:
                why.append(f"all of group {name} arrived")
            elif standing.now >= group["latest"]:
                why.append(f"the latest time of group {name} passed")
            else:
                continue
            del groups[name]
        pairs = zip(standing.waiting, standing.waiting_groups, strict=True)
        fold = tuple(task for task, number in pairs if str(number) not in groups)
        if fold and not why:
            why = ["it came after its group" if arrived - {None} else "it is of no group"]
        until = min((float(group["latest"]) for group in groups.values()), default=math.inf)
        return Verdict(fold, until, "; ".join(why))

    # ------------------------------------------------------------ the planner

    def plan(self, devices: Devices, context: Context) -> Sequence[Work]:
        """Assigns the fastest first. O(groups open) a device."""
        groups: dict[str, Any] = context.memory.setdefault("groups", {})
        pace, overhead = devices.seconds_per_step, np.nan_to_num(devices.overhead_seconds, nan=0.0)
        known = (devices.step_count > 0) & np.isfinite(pace) & (pace > 0.0) & np.isfinite(overhead)
        works = [Work(steps=self.q_min)] * len(devices)
        order = np.argsort(np.where(known, pace, np.inf), kind="stable")
        for i in order[: int(known.sum())].tolist():
            a_step, rest = float(pace[i]), float(overhead[i])
            steps, name = self._join(groups, a_step, rest, context.now)
            if name is None:
                steps = self._new_steps(groups, a_step, rest, context.now)
                name = str(context.memory.setdefault("next", 0))
                context.memory["next"] += 1
                duration = rest + steps * a_step
                groups[name] = {
                    "expected": context.now + duration,
                    "latest": context.now + self.slack * duration,
                    "again": rest + self.q_max * a_step,
                }
            groups[name]["again"] = min(groups[name]["again"], rest + self.q_max * a_step)
            works[i] = Work(steps=steps, group=int(name))
        return works

    def _join(self, groups: dict[str, Any], a_step: float, rest: float, now: float) -> tuple[int, str | None]:
        """JoinGroup: the group with the most steps that end at its expected time, and are within the bounds."""
        best, chosen = 0, None
        for name, group in groups.items():
            steps = _steps_until(group["expected"], a_step, rest, now)
            if max(self.q_min, best + 1) <= steps <= self.q_max:
                best, chosen = int(steps), name
        return best, chosen

    def _new_steps(self, groups: dict[str, Any], a_step: float, rest: float, now: float) -> int:
        """CreateGroup: as many steps as end when the fastest device of another group, sent off at the latest time of
        that group, will have done the most it may; the most of these that is not too many."""
        ends = [group["latest"] + group["again"] for group in groups.values() if now < group["latest"]]
        steps = [_steps_until(end, a_step, rest, now) for end in ends]
        return max(self.q_min, int(max((count for count in steps if 0 <= count <= self.q_max), default=self.q_max)))


def _steps_until(end: float, a_step: float, rest: float, now: float) -> float:
    """Whole steps that a device can do and send back by `end`; a millionth of a step is rounding."""
    steps = (end - now - rest) / a_step
    return math.floor(steps + 1e-6) if math.isfinite(steps) else steps
