"""`PacedStrategy`: a Flower `Strategy` that lets the machine decide and performs its effects, on any Flower grid."""

from __future__ import annotations

import logging
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, cast

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedpace.errors import ConfigError, PayloadError, RunError
from fedpace.protocol.codecs import Codec
from fedpace.protocol.downlink import VERSION
from fedpace.protocol.encoded import FATES
from fedpace.protocol.failures import Code
from fedpace.protocol.mapped import size_of
from fedpace.protocol.paced import Expired, Failed, Joined, PacedGrid, Replied, Reported
from fedpace.protocol.polled import paced
from fedpace.strategies.composition import Composition, name_of
from fedpace.strategies.downlink import downlink_codec
from fedpace.strategies.events import (
    Cancel,
    Discard,
    Effect,
    Evaluate,
    Evaluated,
    Finish,
    Fold,
    Folded,
    Note,
    Profiled,
    Release,
    Report,
    Restored,
    Save,
    Score,
    Send,
    Sent,
    Started,
    Step,
    StrategyEvent,
    TaskOrder,
)
from fedpace.strategies.ledger import Ledger
from fedpace.strategies.machine import Machine
from fedpace.strategies.state import State

log = logging.getLogger("flwr.fedpace")
"""Below Flower's own logger, so that it is seen wherever a Flower strategy's is: here, and under `flwr run`."""

LOOK_SECONDS = 3600.0
"""The longest a grid is asked to wait at once."""

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class StrategyEnded(RunError):
    """A run that ended before its versions were made. `result` is what there was by then, `status` the state's name."""

    def __init__(self, status: str, reason: str, result: Result) -> None:
        super().__init__(f"the run ended early ({status}): {reason}")
        self.status = status
        self.result = result


class PacedStrategy(Strategy):
    """Runs a `Composition`.

    `config` is laid over the config of every training message. `validation_fn` gives the loss of a model on data of the
    server's own; weighers may look at it. Everything random is drawn from `seed`, or, where that is None, from a seed
    drawn from Python's `random`, which the runtime seeds with the run's. `directory` is where the decision log and what
    was learned of devices are kept on grids that keep neither (Flower's); without it they are in memory. `downlink` is the
    codec, or its text, of the server's steps, which devices with the `replica` mod follow: see docs/compression.md.
    """

    def __init__(
        self,
        composition: Composition,
        *,
        config: Mapping[str, Any] | None = None,
        validation_fn: Callable[[ArrayRecord], float] | None = None,
        arrayrecord_key: str = "arrays",
        configrecord_key: str = "config",
        seed: int | None = None,
        directory: Path | None = None,
        downlink: Codec | str | None = None,
    ) -> None:
        self.composition = composition
        self.config = dict(config or {})
        self.validation_fn = validation_fn
        self.arrayrecord_key = arrayrecord_key
        self.configrecord_key = configrecord_key
        self.seed = seed
        self.directory = directory
        self.downlink = downlink_codec(downlink)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Trains for `num_rounds` rounds; where the gate knows no rounds, until so many versions were made.

        `timeout` is in seconds: what a task may take, and how long the run waits for devices. `evaluate_fn` is called
        with 0 before anything else. The arguments are Flower's. Raises ConfigError for arrays that are no numbers, and
        StrategyEnded where the run cannot go on.
        """
        if num_rounds < 0:
            raise ConfigError(f"num_rounds is {num_rounds}: choose 0 or more")
        if not timeout > 0:
            raise ConfigError(f"timeout is {timeout}: choose more than 0 seconds")
        configs = {"train": {**(train_config or {}), **self.config}, "evaluate": dict(evaluate_config or {})}
        run = _Run(self, paced(grid, self.directory), initial_arrays, num_rounds, timeout, configs, evaluate_fn)
        return run.to_its_end()

    def summary(self) -> None:
        """Logs what the strategy is composed of."""
        log.info("%s:", type(self).__name__)
        for role, part in self.composition.parts():
            log.info("  %s: %s", role, part if hasattr(part, "__dataclass_fields__") else name_of(part))

    # ------------------------------------------------------------ told to whoever watches; to be overridden

    def report_version(self, server_round: int, arrays: ArrayRecord, folded: int, metrics: MetricRecord) -> None:
        """A version was made of `folded` updates; `metrics` are the devices' own from training, combined."""

    def report_evaluation(self, server_round: int, metrics: MetricRecord) -> None:
        """Devices have evaluated a version."""

    # ------------------------------------------------------------ Flower's rounds, which this strategy has none of

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._refuse()

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        self._refuse()

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._refuse()

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ConfigError(
            f"{type(self).__name__} runs its own loop in start(), not Flower's rounds: "
            "it cannot be wrapped by a strategy that calls configure_train or aggregate_train"
        )


class _Run:
    """One call of `start`: events in, effects out."""

    def __init__(
        self,
        strategy: PacedStrategy,
        grid: PacedGrid,
        initial: ArrayRecord,
        rounds: int,
        timeout: float,
        configs: Mapping[str, dict[str, Any]],
        evaluate_fn: EvaluateFn | None,
    ) -> None:
        composition = strategy.composition
        self._strategy = strategy
        self._grid = grid
        self._timeout = timeout
        self._configs = configs
        self._evaluate_fn = evaluate_fn
        self._checked = grid.checks_arrays
        self._machine = Machine(composition, rounds, timeout, follows=grid.keeps_state)
        seed = random.getrandbits(63) if strategy.seed is None else strategy.seed
        self._state: State = self._machine.start(seed)
        self._ledger = Ledger(
            composition,
            initial,
            strategy.arrayrecord_key,
            strategy.validation_fn,
            downlink=strategy.downlink,
            seed=seed,
        )
        self._result = Result(arrays=initial)
        self._events: deque[StrategyEvent] = deque()
        self._contents: dict[tuple[int, str, int], dict[int | None, tuple[RecordDict, int]]] = {}
        self._perform: dict[type, Callable[[Any], StrategyEvent | None]] = {
            Cancel: self._cancel,
            Score: self._score,
            Discard: self._discard,
            Fold: self._fold,
            Step: self._step,
            Evaluate: self._evaluate,
            Report: self._report,
            Release: self._release,
            Save: self._save,
            Note: self._note,
            Finish: self._finish,
        }

    def to_its_end(self) -> Result:
        self._strategy.summary()
        if self._evaluate_fn is not None:
            self._evaluate(Evaluate("start", 0, 0))
        self._begin()
        state, record = self._state, self._grid.record
        while state.phase != "finished":
            event = self._events.popleft() if self._events else self._next()
            for effect in self._machine.step(state, event):
                self._do(effect, record)
        return self._result

    def _do(self, effect: Effect, record: Callable[[Mapping[str, Any]], None]) -> None:
        kind = type(effect)
        if kind is Send:  # which the grid records, with what it sends
            for held, part in self._parts(cast(Send, effect)):
                self._send(part, held)
            return
        if (entry := effect.entry()) is not None:
            record(entry)
        answer = self._perform[kind](effect)
        if answer is not None:
            self._events.append(answer)

    def _begin(self) -> None:
        now, node_ids = self._grid.now(), list(self._grid.get_node_ids())
        self._configs["train"][FATES] = now
        if (saved := self._grid.restore()) is not None:
            self._events.append(Restored(now, saved))
        self._events.append(Started(now, node_ids, self._grid.census(node_ids)))

    def _next(self) -> StrategyEvent:
        """The grid's next event, once the ledger has taken what it brings."""
        grid, state = self._grid, self._state
        event = grid.next_event(min(state.wake, grid.now() + LOOK_SECONDS))
        if isinstance(event, Replied):
            return self._receive(event)
        if self._ledger.downlink is not None and isinstance(event, Failed | Expired):
            self._ledger.downlink.forget(event.node_id)
        if isinstance(event, Reported):
            return Profiled(event.at, grid.profile(event.node_id))
        if isinstance(event, Joined):
            self._events.append(event)
            return Profiled(event.at, grid.profile(event.node_id))
        return event

    def _receive(self, event: Replied) -> StrategyEvent:
        task = self._state.tasks.get(self._state.messages.get(event.message_id, -1))
        if task is not None and self._ledger.downlink is not None:
            self._ledger.downlink.hear(event.node_id, task.version, event.metrics)
        if task is None or task.kind == "evaluate":
            event.update.release()
            return event
        try:
            stream = self._ledger.receive(task.id, task.version, event.update, checked=self._checked)
        except PayloadError as error:
            if event.update.encoded(self._strategy.arrayrecord_key) is not None:
                self._machine.compressed(self._state, task, 0)
            event.update.release()
            reason = f"rejected: {error}"
            log.warning("task %d of node %d: %s", task.id, event.node_id, reason)
            return Failed(
                event.sequence, event.at, event.node_id, event.message_id, Code.REPLY_MESSAGE_UNAVAILABLE, reason
            )
        if stream is not None:
            self._machine.compressed(self._state, task, stream)
        return event

    # ------------------------------------------------------------ effects

    def _parts(self, effect: Send) -> Iterable[tuple[int | None, Send]]:
        """What is sent to devices that hold different versions of the model, each with the version that it is held against."""
        if self._ledger.downlink is None:
            return [(None, effect)]
        orders: dict[int | None, list[TaskOrder]] = {}
        for order in effect.orders:
            orders.setdefault(self._ledger.held(order.node_id, effect.version), []).append(order)
        return [(held, replace(effect, orders=some)) for held, some in orders.items()]

    def _send(self, effect: Send, held: int | None) -> None:
        content, nbytes = self._content(effect, held)
        kind = MessageType.TRAIN if effect.kind == "train" else MessageType.EVALUATE
        message_ids = self._grid.send(
            content,
            kind,
            effect.orders,
            config_name=self._strategy.configrecord_key,
            group_id=str(effect.round),
            ttl=self._timeout,
            decision=effect.entry(),
        )
        tasks = [order.task for order in effect.orders]
        if message_ids != [str(task) for task in tasks]:
            self._grid.record({"what": "sent", "tasks": tasks, "messages": message_ids, "cause": "select"})
        self._machine.sent(self._state, Sent(self._grid.now(), tasks, message_ids, nbytes))

    def _content(self, effect: Send, held: int | None) -> tuple[RecordDict, int]:
        """What all devices of a version and round get that hold the same version, and how many bytes its arrays are; made
        once."""
        key = (effect.version, effect.kind, effect.round)
        if key not in self._contents:
            self._contents = {k: v for k, v in self._contents.items() if k[1] != effect.kind}
            self._contents[key] = {}
        if held not in self._contents[key]:
            records: dict[str, Any] = {}
            if effect.kind == "train":
                records |= self._ledger.outgoing(effect.version, held)
            else:
                name = self._strategy.arrayrecord_key
                records[name] = self._ledger.outgoing(effect.version, held)[name]
            config = {**self._configs[effect.kind], "server-round": effect.round}
            if self._ledger.downlink is not None:
                config[VERSION] = effect.version
            records[self._strategy.configrecord_key] = ConfigRecord(config)
            arrays = [record for record in records.values() if isinstance(record, ArrayRecord)]
            nbytes = sum(size_of(array) for record in arrays for array in record.values())
            self._contents[key][held] = RecordDict(records), nbytes
        return self._contents[key][held]

    def _cancel(self, effect: Cancel) -> None:
        self._grid.cancel(effect.message_ids)

    def _score(self, effect: Score) -> StrategyEvent:
        return self._ledger.score(effect.tasks, effect.samples, self._grid.now())

    def _discard(self, effect: Discard) -> None:
        self._ledger.discard(effect.tasks)
        log.info("discarded task %s: %s", ", ".join(map(str, effect.tasks)), effect.reason)

    def _fold(self, effect: Fold) -> None:
        self._ledger.fold(effect)

    def _step(self, effect: Step) -> StrategyEvent:
        norm = self._ledger.step(effect.version)
        if math.isfinite(norm):
            metrics = MetricRecord(dict(effect.metrics))
            arrays = self._ledger.current.record
            self._result.arrays = arrays
            self._result.train_metrics_clientapp[effect.round] = metrics
            self._strategy.report_version(effect.round, arrays, effect.folded, metrics)
            log.info("version %d, of %d updates: %s", effect.version, effect.folded, _told(effect.metrics))
        return Folded(self._grid.now(), effect.version, norm)

    def _evaluate(self, effect: Evaluate) -> StrategyEvent | None:
        if self._evaluate_fn is None:
            return None
        metrics = self._evaluate_fn(effect.round, self._ledger.current.record)
        if metrics is None:
            return None
        self._result.evaluate_metrics_serverapp[effect.round] = metrics
        log.info("round %d, evaluated by the server: %s", effect.round, _told(metrics))
        return Evaluated(self._grid.now(), effect.version, metrics)

    def _report(self, effect: Report) -> None:
        if effect.metrics:
            metrics = MetricRecord(dict(effect.metrics))
            self._result.evaluate_metrics_clientapp[effect.round] = metrics
            self._strategy.report_evaluation(effect.round, metrics)
            log.info("round %d, evaluated by %d devices: %s", effect.round, effect.replies, _told(effect.metrics))

    def _release(self, effect: Release) -> None:
        self._ledger.release(effect.versions)

    def _save(self, effect: Save) -> None:
        if self._grid.keeps_state:
            self._grid.save(self._state.to_plain())

    def _note(self, effect: Note) -> None:
        log.info("%s %s", effect.text, dict(effect.values))

    def _finish(self, effect: Finish) -> None:
        log.info("%s: %s", effect.status, effect.reason)
        if effect.status != "completed":
            raise StrategyEnded(effect.status, effect.reason, self._result)


def _told(metrics: Mapping[str, Any]) -> str:
    """Metrics as a line of a log."""
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in metrics.items()
    )


def story(entries: Sequence[Mapping[str, Any]], task: int) -> list[str]:
    """All that a decision log says of one task, a line an entry, oldest first."""
    lines = []
    for entry in entries:
        if "cause" not in entry or task not in entry.get("tasks", ()):
            continue
        at = f"{entry['seconds']:.3f} s: " if "seconds" in entry else ""
        place = list(entry["tasks"]).index(task)
        told = {
            name: value[place] if isinstance(value, list) and len(value) == len(entry["tasks"]) else value
            for name, value in entry.items()
            if name not in ("n", "what", "tasks", "seconds")
        }
        lines.append(f"{at}{entry['what']} " + ", ".join(f"{name} {value}" for name, value in told.items()))
    return lines
