"""Watches what a ServerApp's strategies do, since a grid never sees it: model versions, metrics, updates folded.

Both generations of Flower's strategies are watched by wrapping the methods of every strategy class; of nested calls
(a strategy that calls its base class, a wrapper strategy) only the outermost counts.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord
from flwr.common import Parameters, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server.history import History
from flwr.server.strategy import Strategy as LegacyStrategy
from flwr.serverapp.strategy import Result, Strategy

from fedpace.errors import ConfigError, PayloadError
from fedpace.hosting.outputs import Outputs
from fedpace.protocol.check import NUMPY
from fedpace.protocol.values import encode_values

Metrics = dict[str, Any]
_SOURCES = ("train", "evaluate", "server")


class Watch:
    """What was seen of one run. `seconds()` is the run's clock. `instead`, if given, is called in the place of the first
    `Strategy.start`, with the same arguments by name; legacy strategies are then refused."""

    def __init__(
        self,
        outputs: Outputs,
        seconds: Callable[[], float],
        initial: Mapping[str, np.ndarray[Any, Any]] | None = None,
        instead: Callable[..., Result] | None = None,
    ) -> None:
        self._outputs = outputs
        self._seconds = seconds
        self._initial = initial
        self._instead = instead
        self._last: dict[str, Metrics] = {}
        self._legacy: dict[tuple[str, int], Metrics] = {}
        self.current: ArrayRecord | None = None
        self.started: float | None = None
        self.ended: float | None = None
        self.initial_used = False
        self.versions = 0
        self.folded = 0

    @property
    def seen(self) -> bool:
        """Whether any strategy was at work."""
        return self.started is not None

    @property
    def final(self) -> Metrics | None:
        """The last metrics: the server's own where there are any, else the devices' evaluation, else training."""
        for source in reversed(_SOURCES):
            if source in self._last:
                return self._last[source]
        return {} if self.seen else None

    @property
    def training_seconds(self) -> float:
        return 0.0 if self.started is None else (self.ended or time.monotonic()) - self.started

    def begin(self) -> None:
        if self.started is None:
            self.started = time.monotonic()

    def metrics(self, server_round: int, source: str, metrics: Mapping[str, Any] | None) -> None:
        if metrics:
            self._last[source] = _plain(metrics)
            self._outputs.metrics(server_round, self.versions, self._seconds(), source, self._last[source])

    def legacy_metric(self, server_round: int, source: str, metrics: Mapping[str, Any]) -> None:
        """History gets losses and metrics one by one; what belongs to one round becomes one set."""
        merged = self._legacy.setdefault((source, server_round), {})
        merged |= _plain(metrics)
        self.begin()
        self.metrics(server_round, source, merged)

    def instead(self) -> Callable[..., Result] | None:
        """What is to run in the place of the strategy that is started now. Asked once."""
        instead, self._instead = self._instead, None
        return instead

    def refuse_legacy(self) -> None:
        """Raises ConfigError where the strategy was to be replaced."""
        if self._instead is not None:
            raise ConfigError("the app starts a legacy strategy, which no other can replace; use one of flwr.serverapp")

    def version(self, arrays: ArrayRecord, *, folded: int) -> None:
        self.begin()
        self.ended = time.monotonic()
        self.folded += folded
        self.versions += 1
        self._outputs.version(self.versions, arrays)

    def initial(self, arrays: ArrayRecord) -> ArrayRecord:
        """The model a strategy starts from: the app's, or, for the first one, that of --initial-model if given."""
        if self._initial is not None and not self.initial_used:
            arrays = _replace(arrays, self._initial)
            self.initial_used = True
        self.begin()
        if self.versions == 0:
            self._outputs.version(0, arrays)
        self.current = arrays
        return arrays

    def refuse_initial(self, reason: str) -> None:
        """Raises ConfigError where --initial-model was given and is not yet in use."""
        if self._initial is not None and not self.initial_used:
            raise ConfigError(f"--initial-model cannot be used: {reason}")

    def result(self, result: Result) -> None:
        """What a strategy's `start` returned, as far as it was not seen before: it may run rounds of its own."""
        if result.arrays and result.arrays is not self.current:
            self.version(result.arrays, folded=0)
        seen = (result.train_metrics_clientapp, result.evaluate_metrics_clientapp, result.evaluate_metrics_serverapp)
        for source, rounds in zip(_SOURCES, seen, strict=True):
            if rounds and source not in self._last:
                self.metrics(max(rounds), source, rounds[max(rounds)])


def _plain(metrics: Mapping[str, Any]) -> Metrics:
    """Metrics as plain values. Legacy strategies take anything: scalars of numpy and torch are unpacked, others text."""
    plain: Metrics = {}
    for key, value in metrics.items():
        if callable(item := getattr(value, "item", None)):
            with contextlib.suppress(TypeError, ValueError, RuntimeError):
                value = item()
        try:
            encode_values({"": value})
        except PayloadError:
            value = str(value)
        plain[str(key)] = value
    return plain


def _replace(arrays: ArrayRecord, given: Mapping[str, np.ndarray[Any, Any]]) -> ArrayRecord:
    """The file's arrays in the app's order. Raises ConfigError where they do not fit the app's model."""
    expected = {name: (array.dtype, tuple(array.shape)) for name, array in arrays.items()}
    found = {name: (str(array.dtype), array.shape) for name, array in given.items()}
    for name in dict.fromkeys([*expected, *found]):
        if expected.get(name) != found.get(name):
            raise ConfigError(
                f"--initial-model does not fit the app's model: array {name!r} is "
                f"{_say(found.get(name))} in the file and {_say(expected.get(name))} in the app"
            )
    return ArrayRecord({name: Array(given[name]) for name in expected})


def _say(layout: tuple[str, tuple[int, ...]] | None) -> str:
    return "missing" if layout is None else f"{layout[0]}{list(layout[1])}"


# ---------------------------------------------------------------- wrapping


_inside = threading.local()


@contextlib.contextmanager
def _first(name: str) -> Iterator[bool]:
    """Whether nothing of that name is under way in this thread; from here to the end of the block something is."""
    first = not getattr(_inside, name, False)
    setattr(_inside, name, True)
    try:
        yield first
    finally:
        setattr(_inside, name, not first)


def _outermost(watched: Callable[..., Any]) -> Callable[..., Any]:
    """`watched(original, ...)` where it is not under way in this thread already, else `original(...)`."""

    def method(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with _first(watched.__name__) as first:
            return watched(original, *args, **kwargs) if first else original(*args, **kwargs)

    return method


def _watched(original: Callable[..., Any], watched: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        return watched(original, *args, **kwargs)

    method.__fedpace_watched__ = True  # type: ignore[attr-defined]
    return method


def _wrap(cls: type, methods: Mapping[str, Callable[..., Any]]) -> None:
    for name, watched in methods.items():
        original = cls.__dict__.get(name)
        if inspect.isfunction(original) and not hasattr(original, "__fedpace_watched__"):
            setattr(cls, name, _watched(original, watched))


def _wrap_all(base: Any, methods: Mapping[str, Callable[..., Any]]) -> None:
    """Wraps the methods of a class, of all its subclasses, and of those still to be defined."""
    pending: list[type] = [base]
    while pending:
        cls = pending.pop()
        _wrap(cls, methods)
        pending.extend(cls.__subclasses__())

    def subclassed(cls: type, /, **kwargs: Any) -> None:
        super(base, cls).__init_subclass__(**kwargs)
        _wrap(cls, methods)

    base.__init_subclass__ = classmethod(subclassed)


def watch_strategies(watch: Watch) -> None:
    """From here on every strategy of this process tells `watch` what it does."""
    _wrap_all(Strategy, _message_methods(watch))
    _wrap_all(LegacyStrategy, _legacy_methods(watch))
    _watch_history(watch)


def _message_methods(watch: Watch) -> dict[str, Callable[..., Any]]:
    def start(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A strategy's own `start` may hand both to its base class in ways not seen here, so every level is looked at."""
        call = inspect.signature(original).bind(*args, **kwargs)
        given = call.arguments
        if (instead := watch.instead()) is not None:
            return instead(**{name: value for name, value in given.items() if name != "self"})
        if given.get("evaluate_fn") is not None:
            given["evaluate_fn"] = _watched(given["evaluate_fn"], evaluate_fn)
        if "initial_arrays" not in given:
            return original(*call.args, **call.kwargs)
        with _first("start") as first:
            if first:
                given["initial_arrays"] = watch.initial(given["initial_arrays"])
            result = original(*call.args, **call.kwargs)
            if first and isinstance(result, Result):
                watch.result(result)
            return result

    @_outermost
    def evaluate_fn(original: Callable[..., Any], server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        found: MetricRecord | None = original(server_round, arrays)
        watch.metrics(server_round, "server", found)
        return found

    @_outermost
    def aggregate_train(original: Callable[..., Any], self: Any, server_round: int, replies: Any) -> Any:
        replies = list(replies)
        arrays, metrics = original(self, server_round, replies)
        if arrays is not None:
            watch.version(arrays, folded=sum(reply.has_content() for reply in replies))
            watch.current = arrays
        watch.metrics(server_round, "train", metrics)
        return arrays, metrics

    @_outermost
    def aggregate_evaluate(original: Callable[..., Any], self: Any, server_round: int, replies: Any) -> Any:
        metrics = original(self, server_round, replies)
        watch.metrics(server_round, "evaluate", metrics)
        return metrics

    @_outermost
    def report_version(
        original: Callable[..., Any], self: Any, server_round: int, arrays: ArrayRecord, folded: int, metrics: Any
    ) -> None:
        """Strategies that run no rounds of Flower's tell it themselves."""
        watch.version(arrays, folded=folded)
        watch.current = arrays
        watch.metrics(server_round, "train", metrics)
        original(self, server_round, arrays, folded, metrics)

    @_outermost
    def report_evaluation(original: Callable[..., Any], self: Any, server_round: int, metrics: Any) -> None:
        watch.metrics(server_round, "evaluate", metrics)
        original(self, server_round, metrics)

    return {
        "start": start,
        "aggregate_train": aggregate_train,
        "aggregate_evaluate": aggregate_evaluate,
        "report_version": report_version,
        "report_evaluation": report_evaluation,
    }


def _legacy_methods(watch: Watch) -> dict[str, Callable[..., Any]]:
    @_outermost
    def initialize_parameters(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        watch.refuse_legacy()
        parameters: Parameters | None = original(*args, **kwargs)
        if parameters is None:
            watch.begin()
            watch.refuse_initial("the strategy has no initial_parameters to hold it against; give it some")
            return None
        arrays = _record(parameters)
        record = watch.initial(arrays)
        return parameters if record is arrays else ndarrays_to_parameters([array.numpy() for array in record.values()])

    @_outermost
    def aggregate_fit(original: Callable[..., Any], self: Any, server_round: int, results: Any, failures: Any) -> Any:
        parameters, metrics = original(self, server_round, results, failures)
        if parameters is not None:
            watch.version(_record(parameters), folded=len(results))
        return parameters, metrics

    return {"initialize_parameters": initialize_parameters, "aggregate_fit": aggregate_fit}


def _record(parameters: Parameters) -> ArrayRecord:
    """Legacy parameters as arrays; those that are not numpy's (trees) as the bytes they are."""
    if parameters.tensor_type == NUMPY:
        return ArrayRecord(parameters_to_ndarrays(parameters))
    kind = parameters.tensor_type or "bytes"
    return ArrayRecord({str(i): Array("bytes", (len(data),), kind, data) for i, data in enumerate(parameters.tensors)})


def _watch_history(watch: Watch) -> None:
    sources = {
        "add_loss_distributed": ("evaluate", "loss"),
        "add_loss_centralized": ("server", "loss"),
        "add_metrics_distributed_fit": ("train", None),
        "add_metrics_distributed": ("evaluate", None),
        "add_metrics_centralized": ("server", None),
    }
    for name, (source, key) in sources.items():

        def watched(
            original: Callable[..., Any],
            self: History,
            server_round: int,
            value: Any = None,
            _source: str = source,
            _key: str | None = key,
            **named: Any,
        ) -> Any:
            found = named.get("loss", named.get("metrics", value))
            watch.legacy_metric(server_round, _source, {_key: found} if _key else found or {})
            return original(self, server_round, found)

        _wrap(History, {name: _outermost(watched)})
