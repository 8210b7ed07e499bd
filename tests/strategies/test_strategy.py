"""`PacedStrategy` on a grid: the same weights as Flower's strategies, and every preset learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import flwr.serverapp.strategy as flower
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedpace.errors import ConfigError, FedpaceError
from fedpace.protocol.polled import paced
from fedpace.strategies.presets import PRESETS, FedAdam, FedAvg, FedBuff, FedProx, Paced
from fedpace.strategies.strategy import PacedStrategy, StrategyEnded, story
from tests.inline_grid import InlineGrid

NODES = 5
ROUNDS = 4


def least_squares() -> ClientApp:
    """Every device has a linear problem of its own, steps down its gradient, and honours what it is asked."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        config: Any = message.content.config_records["config"]
        inputs, targets = problem(int(context.node_config["partition-id"]))
        received = {name: array.numpy() for name, array in message.content.array_records["arrays"].items()}
        weight, bias = received["weight"].copy(), received["bias"].copy()
        for _ in range(int(config.get("local-steps", 3))):
            error = inputs @ weight + bias - targets
            pull = float(config.get("proximal-mu", 0.0)) * (weight - received["weight"])
            weight -= np.float32(0.1) * (inputs.T @ error / len(targets) + pull)
            bias -= np.float32(0.1) * error.mean(axis=0)
        arrays = {"weight": weight.astype(np.float32), "bias": bias.astype(np.float32), "seen": received["seen"] + 1}
        loss = float(((inputs @ weight + bias - targets) ** 2).mean())
        metrics = MetricRecord({"loss": loss, "num-examples": len(targets)})
        records: Any = {
            "arrays": ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()}),
            "m": metrics,
        }
        if "control" in message.content.array_records:
            control = message.content.array_records["control"]
            records["control"] = ArrayRecord(
                {name: Array(np.zeros_like(array.numpy())) for name, array in control.items()}
            )
        return Message(RecordDict(records), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        metrics: Any = {"loss": loss_of(message.content.array_records["arrays"]), "num-examples": 2}
        return Message(RecordDict({"m": MetricRecord(metrics)}), reply_to=message)

    return app


def problem(partition: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(partition)
    inputs = rng.normal(size=(10 + 4 * partition, 3)).astype(np.float32)
    return inputs, inputs @ np.array([[1.0], [-2.0], [0.5]], np.float32) + 0.3


def initial() -> ArrayRecord:
    return ArrayRecord(
        {
            "weight": Array(np.zeros((3, 1), np.float32)),
            "bias": Array(np.zeros(1, np.float32)),
            "seen": Array(np.array(0, np.int64)),
        }
    )


def loss_of(arrays: ArrayRecord) -> float:
    inputs, targets = problem(99)
    return float(((inputs @ arrays["weight"].numpy() + arrays["bias"].numpy() - targets) ** 2).mean())


def evaluate_fn(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    return MetricRecord({"loss": loss_of(arrays)})


def run(strategy: Any, rounds: int = ROUNDS, grid: Any = None, **options: Any) -> Any:
    grid = grid or InlineGrid(least_squares(), NODES)
    return strategy.start(grid, initial(), num_rounds=rounds, evaluate_fn=evaluate_fn, **options)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (FedAvg(), flower.FedAvg()),
        (FedAdam(), flower.FedAdam()),
        (FedProx(proximal_mu=0.1), flower.FedProx(proximal_mu=0.1)),
    ],
)
def test_the_same_weights_and_metrics_as_flowers(ours: Any, theirs: Any) -> None:
    found, expected = run(ours), run(theirs)
    for name in ("weight", "bias"):
        np.testing.assert_allclose(found.arrays[name].numpy(), expected.arrays[name].numpy(), rtol=2e-5, atol=1e-6)
    assert found.arrays["weight"].numpy().dtype == np.float32
    for attribute in ("train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp"):
        ours_by_round, theirs_by_round = getattr(found, attribute), getattr(expected, attribute)
        assert list(ours_by_round) == list(theirs_by_round)
        for number, metrics in theirs_by_round.items():
            assert dict(ours_by_round[number]) == pytest.approx(dict(metrics), rel=1e-4)


REDUCES_TO_FEDAVG: dict[str, dict[str, Any]] = {
    "FedAvg": {},
    "FedProx": {"proximal_mu": 0.0},
    "FedNova": {},
    "SCAFFOLD": {},
    "TiFL": {"tiers": 1},
    "Oort": {"over_selection": 1.0},
    "REFL": {"over_selection": 1.0},
    "QScheduler": {"fraction": 1.0},
}


@pytest.mark.parametrize("name", REDUCES_TO_FEDAVG)
def test_presets_reduce_to_fedavg_with_one_speed_and_everybody(name: str) -> None:
    """Those without rounds fold the same updates in another order of versions, except with a buffer of everybody."""
    found, expected = run(PRESETS[name](**REDUCES_TO_FEDAVG[name])), run(FedAvg())
    np.testing.assert_allclose(found.arrays["weight"].numpy(), expected.arrays["weight"].numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_learns(name: str) -> None:
    options: dict[str, Any] = {"q_min": 1, "q_max": 6} if name == "Compass" else {}
    result = run(PRESETS[name](**options, seed=3), rounds=30 if not PRESETS[name]().composition.gate.rounds else 12)
    losses = [metrics["loss"] for metrics in result.evaluate_metrics_serverapp.values()]
    assert losses[-1] < 0.35 * losses[0]
    assert result.arrays["seen"].numpy().dtype == np.int64 and result.arrays["seen"].numpy() > 0


def test_the_decision_log_tells_the_story_of_a_task(tmp_path: Path) -> None:
    grid = paced(InlineGrid(least_squares(), 2), tmp_path)
    run(FedAvg(fraction_evaluate=0.0), 1, grid)
    entries = [json.loads(line) for line in (tmp_path / "decisions.jsonl").read_text().splitlines()]
    told = story(entries, 1)
    assert [line.split(": ", 1)[1].split()[0] for line in told] == ["select", "fold"]
    assert "version 0" in told[0] and "weights 0." in told[1]
    assert all(entry["cause"] for entry in entries if entry["what"] in ("select", "fold", "step", "finish"))


def test_replies_that_do_not_fit_are_rejected_and_the_run_goes_on() -> None:
    app = least_squares()

    class Spoiling(InlineGrid):
        """One device sends NaN, one another shape, one no arrays at all."""

        def _answer(self, message: Message) -> Message:
            reply = super()._answer(message)
            node = message.metadata.dst_node_id - 100
            arrays = reply.content.array_records.get("arrays")
            if arrays is not None and node == 0:
                arrays["weight"] = Array(np.full((3, 1), np.nan, np.float32))
            elif arrays is not None and node == 1:
                arrays["bias"] = Array(np.zeros(2, np.float32))
            elif arrays is not None and node == 2:
                del reply.content["arrays"]
            return reply

    grid = paced(Spoiling(app, NODES))
    result = run(FedAvg(), 3, grid)
    assert np.isfinite(result.arrays["weight"].numpy()).all()
    assert len(result.train_metrics_clientapp) == 3


def test_a_model_that_diverges_ends_the_run_by_that_name() -> None:
    from fedpace.strategies.optimisers import SGD

    with pytest.raises(StrategyEnded, match="diverged") as caught:
        run(FedAvg(optimiser=SGD(lr=3e38), fraction_evaluate=0.0), 10)
    assert caught.value.status == "diverged"
    assert np.isfinite(caught.value.result.arrays["weight"].numpy()).all()


def test_devices_that_all_fail_end_the_run_with_the_reason() -> None:
    grid = InlineGrid(least_squares(), 2, broken=[0, 1])
    with pytest.raises(StrategyEnded, match="broken on purpose"):
        run(FedBuff(k=1), 100, grid)


def test_a_selector_and_a_weigher_of_ones_own() -> None:
    def the_last_one(devices: Any, count: int, context: Any) -> Any:
        return np.argsort(devices.node_id)[-1:]

    def by_half(updates: Any, context: Any) -> Any:
        return 0.5 + 0 * updates.samples

    grid = InlineGrid(least_squares(), NODES)
    run(FedAvg(selector=the_last_one, weighers=[by_half], fraction_evaluate=0.0), 2, grid)
    assert {message.metadata.dst_node_id for message in grid.sent} == {100 + NODES - 1}


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"selector": lambda devices, count, context: [0, 0]}, "must return at most"),
        ({"selector": lambda devices, count, context: [99]}, "must return at most"),
        ({"weighers": [lambda updates, context: [-1.0] * len(updates)]}, "one finite factor of 0 or more"),
        ({"weighers": [lambda updates, context: [float("nan")] * len(updates)]}, "one finite factor of 0 or more"),
        ({"weighers": [lambda updates, context: [1.0]]}, "one finite factor of 0 or more"),
    ],
)
def test_parts_that_answer_nonsense_are_named(part: dict[str, Any], reason: str) -> None:
    with pytest.raises(FedpaceError, match=reason):
        run(FedAvg(**part))


def test_weights_that_are_all_zero_make_no_step() -> None:
    result = run(FedAvg(weighers=[lambda updates, context: 0 * updates.samples]), 2)
    assert not result.train_metrics_clientapp and not result.arrays["weight"].numpy().any()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: FedAvg(fraction_train=0.0), "more than 0.0"),
        (lambda: FedAvg(train_nodes=0), "1 or more"),
        (lambda: FedAvg(train_nodes=2, fraction_train=0.5), "not both"),
        (lambda: FedAvg(fraction_evaluate=1.5), "from 0.0 to 1.0"),
        (lambda: FedAvg(evaluate_every=0), "1 or more"),
        (lambda: FedAvg(max_staleness=-1), "0 or more"),
        (lambda: FedAvg(speed=3), "no setting speed"),  # type: ignore[call-arg]
        (lambda: FedBuff(k=0), "1 or more"),
        (lambda: FedProx(proximal_mu=-1.0), "0 or more"),
        (lambda: FedAvg(gate=object()), "has no 'sends'"),  # type: ignore[arg-type]
        (lambda: FedAvg(weighers=[3]), "neither 'weigh' nor 'scale'"),
        (lambda: PRESETS["FedAsync"](compensators=Paced().composition.compensators), "takes no compensators"),
        (lambda: FedAvg(planner=PRESETS["Compass"]().composition.planner), "cannot go with"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_built(make: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        make()


def test_it_cannot_be_wrapped_by_a_strategy_of_rounds() -> None:
    wrapped = flower.DifferentialPrivacyServerSideFixedClipping(FedAvg(), 1.0, 1.0, 2)
    with pytest.raises(ConfigError, match="runs its own loop"):
        run(wrapped)
    assert isinstance(FedAvg(), PacedStrategy)
