"""Drives a machine through a fleet in which anything happens, and keeps its own books beside those of the machine."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from flwr.app import RecordDict

from fedpace.protocol.paced import DeviceProfile, Expired, Failed, Joined, Left, Replied, Tick, UpdateHandle
from fedpace.strategies.composition import Composition
from fedpace.strategies.events import (
    Cancel,
    Discard,
    Effect,
    Finish,
    Fold,
    Folded,
    Profiled,
    Restored,
    Score,
    Scored,
    Send,
    Sent,
    Started,
    Step,
    StrategyEvent,
)
from fedpace.strategies.machine import Machine
from fedpace.strategies.state import validate


class NoArrays(UpdateHandle):
    nbytes = 400

    def arrays(self, record: str | None = None) -> dict[str, Any]:
        return {}

    def content(self) -> RecordDict:
        return RecordDict()

    def release(self) -> None:
        pass


class Driver:
    """Node ids are 100, 101, ..., of `slots` tasks at a time. Every step is followed by `validate` and by the books' own
    checks."""

    def __init__(
        self,
        composition: Composition,
        nodes: int,
        rounds: int,
        *,
        seed: int = 0,
        patience: float = 100.0,
        slots: int = 1,
        saved: dict[str, Any] | None = None,
    ):
        self.machine = Machine(composition, rounds, patience)
        self.state = self.machine.start(seed)
        self.slots = slots
        self.now = 0.0
        self.sequence = 0
        self.alive = set(range(100, 100 + nodes))
        self.known = set(self.alive)
        self.out: dict[int, tuple[int, str]] = {}  # task -> node, kind
        self.arrived: set[int] = set()
        self.fates: dict[int, str] = {}
        self.sent: list[Send] = []
        self.folds: list[Fold] = []
        self.finish: Finish | None = None
        self.effects: list[Effect] = []
        if saved is not None:
            self.step(Restored(0.0, saved))
        for node in sorted(self.alive):
            self.step(Profiled(0.0, self._profile(node)))
        self.step(Started(0.0, sorted(self.alive)))

    # ------------------------------------------------------------ what may happen

    def reply(self, task: int, **metrics: Any) -> None:
        node, kind = self.out.pop(task)
        if kind == "train":
            self.arrived.add(task)
        given = {"num-examples": 10, "loss": 1.0, **metrics}
        self.step(Replied(self._next(), self.now, node, str(task), given, NoArrays(), 0.5))

    def fail(self, task: int, *, expired: bool = False) -> None:
        node, kind = self.out.pop(task)
        if kind == "train":
            self._end(task, "lost")
        if expired:
            self.step(Expired(self._next(), self.now, node, str(task), "took too long"))
        else:
            self.step(Failed(self._next(), self.now, node, str(task), 2, "raised"))

    def join(self, node: int) -> None:
        self.alive.add(node)
        self.known.add(node)
        self.step(Profiled(self.now, self._profile(node)))
        self.step(Joined(self._next(), self.now, node, f"device-{node}"))

    def leave(self, node: int) -> None:
        self.alive.discard(node)
        self.step(Left(self._next(), self.now, node, "gone"))

    def wait(self, seconds: float) -> None:
        """Time passes; the machine is woken when it asked to be."""
        self.now = max(self.now, min(self.now + seconds, self.state.wake))
        self.step(Tick(self.now))

    # ------------------------------------------------------------ books

    def step(self, event: StrategyEvent) -> None:
        pending = [event]
        while pending:
            effects = self.machine.step(self.state, pending.pop(0))
            self.effects += effects
            for effect in effects:
                pending += self._perform(effect)
            validate(self.state)

    def _perform(self, effect: Effect) -> list[StrategyEvent]:
        if isinstance(effect, Send):
            self.sent.append(effect)
            busy = Counter(node for node, _ in self.out.values())
            for order in effect.orders:
                assert order.node_id in self.alive, "sent to a device that is not there"
                assert busy[order.node_id] < self.slots, "leased a device beyond its slots"
                assert order.task not in self.out and order.task not in self.fates
                busy[order.node_id] += 1
                self.out[order.task] = (order.node_id, effect.kind)
            tasks = [order.task for order in effect.orders]
            self.machine.sent(self.state, Sent(self.now, tasks, [str(task) for task in tasks], 400))
            return []
        if isinstance(effect, Cancel):
            for task in effect.tasks:
                if self.out.pop(task)[1] == "train":
                    self._end(task, "given up")
        elif isinstance(effect, Discard):
            for task in effect.tasks:
                self.arrived.remove(task)
                self._end(task, "discarded")
        elif isinstance(effect, Fold):
            self.folds.append(effect)
            weights = np.array(effect.weights)
            assert np.isfinite(weights).all() and (weights > 0).all()
            for task in effect.tasks:
                self.arrived.remove(task)
                self._end(task, "folded")
        elif isinstance(effect, Score):
            count = len(effect.tasks)
            return [Scored(self.now, effect.tasks, [0.9] * count, [1.0] * count, [float("nan")] * count)]
        elif isinstance(effect, Step):
            return [Folded(self.now, effect.version, 1.0)]
        elif isinstance(effect, Finish):
            self.finish = effect
            assert not self.out and not self.arrived, "the run ended and left tasks without a fate"
        return []

    def _end(self, task: int, fate: str) -> None:
        assert task not in self.fates, f"task {task} has two fates: {self.fates[task]} and {fate}"
        self.fates[task] = fate

    def _profile(self, node: int) -> DeviceProfile:
        return DeviceProfile(node, f"device-{node}", self.slots, 0, "", 0, (), ())

    def _next(self) -> int:
        self.sequence += 1
        return self.sequence
