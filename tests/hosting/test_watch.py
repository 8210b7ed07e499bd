"""What strategies do is seen, once, whatever kind they are; and being seen changes nothing for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    Result,
    Strategy,
)

from fedpace.errors import ConfigError
from tests.hosting.conftest import Arrays, See
from tests.inline_grid import InlineGrid

ROUNDS = 3


# ---------------------------------------------------------------- an app, and a watch


app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Adds one to every weight, more on later devices."""
    step = 1.0 + float(context.node_config["partition-id"])
    held = message.content.array_records["arrays"]
    arrays = {name: Array(array.numpy() + np.float32(step)) for name, array in held.items()}
    metrics = MetricRecord({"num-examples": 1, "step": step})
    return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    loss = float(next(iter(message.content.array_records["arrays"].values())).numpy().mean())
    return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1, "eval-loss": loss})}), reply_to=message)


def initial() -> ArrayRecord:
    return ArrayRecord({"w": Array(np.zeros((2, 2), np.float32)), "b": Array(np.zeros(1, np.float32))})


def same(one: Arrays, other: ArrayRecord) -> bool:
    return list(one) == sorted(other) and all(np.array_equal(one[name], other[name].numpy()) for name in one)


# ---------------------------------------------------------------- Flower's own strategies


def adam(**kwargs: Any) -> Strategy:
    return FedAdam(eta=0.1, **kwargs)


def private(**kwargs: Any) -> Strategy:
    return DifferentialPrivacyServerSideFixedClipping(FedAvg(**kwargs), 0.1, 5.0, 2)


@pytest.mark.parametrize("make", [FedAvg, adam, private])
def test_every_version_of_a_stock_strategy_is_seen_once(make: Callable[..., Strategy], see: See) -> None:
    seen = see()
    result = make().start(InlineGrid(app), initial(), num_rounds=ROUNDS)
    watch = seen.watch
    assert (watch.versions, watch.folded, watch.seen) == (ROUNDS, 2 * ROUNDS, True)
    assert watch.training_seconds > 0
    versions = seen.versions()
    assert len(versions) == ROUNDS + 1
    assert same(versions[0], initial()) and same(versions[-1], result.arrays)
    found = seen.metrics()
    assert [(source, number) for source, number, _ in found] == [
        (source, number) for number in (1, 2, 3) for source in ("train", "evaluate")
    ]
    assert [dict(metrics) for source, _, metrics in found if source == "evaluate"] == [
        dict(metrics) for metrics in result.evaluate_metrics_clientapp.values()
    ]
    assert watch.final == result.evaluate_metrics_clientapp[ROUNDS]


@pytest.mark.parametrize("make", [FedAvg, adam])
def test_a_strategy_gives_the_same_whether_it_is_watched_or_not(make: Callable[..., Strategy], see: See) -> None:
    alone = make().start(InlineGrid(app), initial(), num_rounds=ROUNDS)
    see()
    watched = make().start(InlineGrid(app), initial(), num_rounds=ROUNDS)
    assert watched == alone


def test_the_servers_own_metrics_come_first_then_evaluation_then_training(see: See) -> None:
    seen = see()
    assert (seen.watch.seen, seen.watch.final, seen.watch.training_seconds) == (False, None, 0.0)
    FedAvg(fraction_evaluate=0.0).start(InlineGrid(app), initial(), num_rounds=1)
    assert seen.watch.final == {"step": 1.5}
    FedAvg().start(InlineGrid(app), initial(), num_rounds=1)
    assert seen.watch.final == {"eval-loss": 1.5}

    def central(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        return MetricRecord({"accuracy": 0.1 * server_round}) if server_round < 2 else None

    result = FedAvg().start(InlineGrid(app), initial(), 2, evaluate_fn=central)
    assert seen.watch.final == {"accuracy": 0.1}
    assert list(result.evaluate_metrics_serverapp) == [0, 1]
    assert [number for source, number, _ in seen.metrics() if source == "server"] == [0, 1]


def test_arguments_by_position_are_seen_too(see: See) -> None:
    seen = see({"w": np.ones((2, 2), np.float32), "b": np.ones(1, np.float32)})
    central = lambda server_round, arrays: MetricRecord({"sum": float(arrays["w"].numpy().sum())})
    FedAvg().start(InlineGrid(app), initial(), 1, 3600, None, None, central)
    assert [metrics for source, _, metrics in seen.metrics() if source == "server"] == [{"sum": 4.0}, {"sum": 10.0}]


def test_only_updates_that_came_are_folded(see: See) -> None:
    seen = see()
    FedAvg().start(InlineGrid(app, nodes=4, broken=[1, 2]), initial(), num_rounds=2)
    assert (seen.watch.versions, seen.watch.folded) == (2, 4)


def test_a_round_of_which_nothing_came_makes_no_version(see: See) -> None:
    seen = see()
    FedAvg().start(InlineGrid(app, broken=[0, 1]), initial(), num_rounds=2)
    assert (seen.watch.versions, seen.watch.folded, seen.watch.final) == (0, 0, {})
    assert len(seen.versions()) == 1 and seen.metrics() == []


def test_metrics_of_a_failed_evaluation_pass_through(see: See) -> None:
    see()

    def central(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        raise ZeroDivisionError("in the app")

    with pytest.raises(ZeroDivisionError, match="in the app"):
        FedAvg().start(InlineGrid(app), initial(), evaluate_fn=central)
    FedAvg().start(InlineGrid(app), initial(), num_rounds=1)


# ---------------------------------------------------------------- strategies of an app


def test_a_strategy_defined_later_that_calls_its_base_is_seen_once(see: See) -> None:
    seen = see()

    class Late(FedAvg):
        calls = 0

        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            self.calls += 1
            arrays, metrics = super().aggregate_train(server_round, replies)
            assert arrays is not None
            return ArrayRecord({name: Array(array.numpy() * 2) for name, array in arrays.items()}), metrics

        def start(self, *args: Any, **kwargs: Any) -> Result:
            return super().start(*args, **kwargs)

    class Later(Late):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            return super().aggregate_train(server_round, replies)

    strategy = Later()
    result = strategy.start(grid=InlineGrid(app), initial_arrays=initial(), num_rounds=ROUNDS)
    assert strategy.calls == seen.watch.versions == ROUNDS
    assert seen.watch.folded == 2 * ROUNDS
    versions = seen.versions()
    assert same(versions[0], initial()) and same(versions[-1], result.arrays)


@pytest.mark.parametrize("later", [True, False])
def test_a_start_that_hands_on_what_it_likes_is_seen(later: bool, see: See) -> None:
    """It takes no initial_arrays by name, and adds an evaluation of its own."""
    calls: list[int] = []

    def define() -> type[FedAvg]:
        class Own(FedAvg):
            def start(self, *everything: Any, **named: Any) -> Result:
                return super().start(*everything, **{**named, "evaluate_fn": self.central})

            def central(self, server_round: int, arrays: ArrayRecord) -> MetricRecord:
                calls.append(server_round)
                return MetricRecord({"sum": float(arrays["w"].numpy().sum())})

        return Own

    early = None if later else define()
    seen = see({"w": np.ones((2, 2), np.float32), "b": np.ones(1, np.float32)})
    (early or define())().start(InlineGrid(app), initial_arrays=initial(), num_rounds=1)
    assert calls == [0, 1] and seen.watch.initial_used
    assert seen.watch.final == {"sum": 10.0}
    assert len([source for source, _, _ in seen.metrics() if source == "server"]) == 2


def test_an_evaluation_inside_an_evaluation_counts_once(see: See) -> None:
    seen = see()

    class Scaled(FedAvg):
        def start(self, grid: Grid, initial_arrays: ArrayRecord, *args: Any, **kwargs: Any) -> Result:
            inner = kwargs["evaluate_fn"]
            kwargs["evaluate_fn"] = lambda n, arrays: MetricRecord({"percent": 100 * inner(n, arrays)["share"]})
            return super().start(grid, initial_arrays, *args, **kwargs)

    Scaled().start(InlineGrid(app), initial(), num_rounds=1, evaluate_fn=lambda n, _: MetricRecord({"share": n / 4}))
    assert [metrics for source, _, metrics in seen.metrics() if source == "server"] == [
        {"percent": 0.0},
        {"percent": 25.0},
    ]


def test_a_strategy_with_rounds_of_its_own_is_seen_by_its_result(see: See) -> None:
    seen = see()

    class Own(FedAvg):
        def start(self, grid: Grid, initial_arrays: ArrayRecord, *args: Any, **kwargs: Any) -> Result:
            result = Result(arrays=ArrayRecord({"w": Array(np.full(3, 7.0))}))
            result.train_metrics_clientapp = {1: MetricRecord({"loss": 2.0}), 2: MetricRecord({"loss": 1.0})}
            result.evaluate_metrics_serverapp = {2: MetricRecord({"accuracy": 0.5})}
            return result

    Own().start(InlineGrid(app), initial())
    assert (seen.watch.versions, seen.watch.final) == (1, {"accuracy": 0.5})
    assert np.array_equal(seen.versions()[-1]["w"], np.full(3, 7.0))
    assert seen.metrics() == [("train", 2, {"loss": 1.0}), ("server", 2, {"accuracy": 0.5})]


# ---------------------------------------------------------------- --initial-model


def test_a_given_model_replaces_the_apps_in_the_apps_order_once(see: See) -> None:
    model = {"b": np.full(1, 5, np.float32), "w": np.full((2, 2), 5, np.float32)}
    seen = see(model)
    grid = InlineGrid(app)
    result = FedAvg().start(grid, initial(), num_rounds=1)
    first = grid.sent[0].content.array_records["arrays"]
    assert list(first) == ["w", "b"] and all((array.numpy() == 5).all() for array in first.values())
    assert seen.watch.initial_used
    grid = InlineGrid(app)
    FedAvg().start(grid, result.arrays, num_rounds=1)
    assert all((array.numpy() == 6.5).all() for array in grid.sent[0].content.array_records["arrays"].values()), (
        "a second phase goes on"
    )
    versions = seen.versions()
    assert same(versions[0], ArrayRecord({name: Array(array) for name, array in model.items()}))
    assert (seen.watch.versions, len(versions)) == (2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": np.zeros((4,), np.float32)}, r"array 'w' is float32\[4\] in the file and float32\[2, 2\] in the app"),
        ({"w": np.zeros((2, 2))}, r"array 'w' is float64\[2, 2\] in the file and float32\[2, 2\] in the app"),
        ({"b": None}, r"array 'b' is missing in the file and float32\[1\] in the app"),
        ({"c": np.zeros(1)}, r"array 'c' is float64\[1\] in the file and missing in the app"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(change: dict[str, Any], message: str, see: See) -> None:
    model = {"w": np.zeros((2, 2), np.float32), "b": np.zeros(1, np.float32), **change}
    see({name: array for name, array in model.items() if array is not None})
    with pytest.raises(ConfigError, match=f"--initial-model does not fit the app's model: {message}"):
        FedAvg().start(InlineGrid(app), initial())


def test_a_model_nobody_used_is_refused(see: See) -> None:
    see().watch.refuse_initial("reason")
    seen = see({"w": np.zeros(1)})
    with pytest.raises(ConfigError, match="--initial-model cannot be used: reason"):
        seen.watch.refuse_initial("reason")
