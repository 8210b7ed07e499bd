"""Strategies of Flower's legacy API are seen through their methods and the History they fill."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import Parameters, ndarrays_to_parameters
from flwr.server import LegacyContext, ServerConfig
from flwr.server.history import History
from flwr.server.strategy import FedAvg as LegacyFedAvg
from flwr.server.strategy import Strategy as LegacyStrategy
from flwr.server.workflow import DefaultWorkflow

from fedpace.errors import ConfigError
from tests.hosting.conftest import Arrays, See
from tests.inline_grid import RUN_ID, InlineGrid

ROUNDS = 3


class Client(NumPyClient):
    """Adds one to every weight."""

    def get_parameters(self, config: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
        return [np.full(3, 9, np.float32)]

    def fit(self, parameters: list[np.ndarray[Any, Any]], config: dict[str, Any]) -> Any:
        return [array + np.float32(1) for array in parameters], 2, {"loss": 0.25}

    def evaluate(self, parameters: list[np.ndarray[Any, Any]], config: dict[str, Any]) -> Any:
        return float(parameters[0].mean()), 2, {"accuracy": 0.75}


legacy_app = ClientApp(client_fn=lambda context: Client().to_client())


def run_legacy(strategy: LegacyStrategy, nodes: int = 2, rounds: int = ROUNDS) -> History:
    context = LegacyContext(
        Context(run_id=RUN_ID, node_id=1, node_config={}, state=RecordDict(), run_config={}),
        config=ServerConfig(num_rounds=rounds),
        strategy=strategy,
    )
    DefaultWorkflow()(InlineGrid(legacy_app, nodes), context)
    return context.history


def legacy(**kwargs: Any) -> LegacyFedAvg:
    mean: Any = lambda metrics: {key: float(np.mean([m[key] for _, m in metrics])) for key in metrics[0][1]}
    kwargs = {"initial_parameters": ndarrays_to_parameters([np.zeros(3, np.float32)]), **kwargs}
    return LegacyFedAvg(fit_metrics_aggregation_fn=mean, evaluate_metrics_aggregation_fn=mean, **kwargs)


def test_a_legacy_strategy_is_seen(see: See) -> None:
    seen = see()
    central: Any = lambda number, arrays, config: (float(number), {"score": np.float32(0.5)})
    history = run_legacy(legacy(evaluate_fn=central))
    assert (seen.watch.versions, seen.watch.folded, seen.watch.seen) == (ROUNDS, 2 * ROUNDS, True)
    assert [float(version["0"][0]) for version in seen.versions()] == [0.0, 1.0, 2.0, 3.0]
    assert seen.watch.final == {"loss": 3.0, "score": 0.5}
    found = seen.metrics()
    last = {(source, number): metrics for source, number, metrics in found}
    assert last["train", 1] == {"loss": 0.25}
    assert last["evaluate", 2] == {"loss": 2.0, "accuracy": 0.75}
    assert [number for (source, number) in last if source == "server"] == [0, 1, 2, 3]
    assert history.losses_distributed == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert history.metrics_centralized == {"score": [(number, 0.5) for number in range(4)]}


def test_a_legacy_model_is_replaced_and_held_against_the_apps(see: See) -> None:
    seen = see({"0": np.full(3, 5, np.float32)})
    run_legacy(legacy(), rounds=1)
    assert [float(version["0"][0]) for version in seen.versions()] == [5.0, 6.0]
    assert seen.watch.initial_used


@pytest.mark.parametrize("wrong", [{"0": np.zeros(4, np.float32)}, {"1": np.zeros(3, np.float32)}])
def test_a_legacy_model_that_does_not_fit_is_refused(wrong: Arrays, see: See) -> None:
    see(wrong)
    with pytest.raises(ConfigError, match="does not fit the app's model"):
        run_legacy(legacy(), rounds=1)


def test_a_model_from_a_random_device_is_seen_once_it_is_trained(see: See) -> None:
    seen = see()
    run_legacy(legacy(initial_parameters=None), rounds=2)
    assert [float(version["0"][0]) for version in seen.versions()] == [10.0, 11.0]
    assert (seen.watch.versions, seen.watch.training_seconds > 0) == (2, True)


def test_a_file_for_a_strategy_without_a_model_is_refused_before_anything_runs(see: See) -> None:
    seen = see({"0": np.zeros(3, np.float32)})
    with pytest.raises(ConfigError, match="--initial-model cannot be used: the strategy has no initial_parameters"):
        run_legacy(legacy(initial_parameters=None))
    assert seen.watch.versions == 0


def test_legacy_parameters_that_are_no_arrays_pass_through(see: See, caplog: pytest.LogCaptureFixture) -> None:
    """Trees travel as bytes: there is no model file then, and the run goes on."""
    seen = see()
    trees = Parameters(tensors=[b"not .npy"], tensor_type="")

    class Trees(LegacyFedAvg):
        def initialize_parameters(self, client_manager: Any) -> Parameters | None:
            return trees

        def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
            return Parameters(tensors=[b"more"], tensor_type=""), {}

    strategy = Trees()
    manager: Any = None
    assert strategy.initialize_parameters(manager) is trees
    assert strategy.aggregate_fit(1, [1, 2], [])[0].tensors == [b"more"]
    assert (seen.watch.versions, seen.watch.folded, seen.versions()) == (1, 2, [])
    assert "cannot be kept as safetensors" in caplog.text


def test_odd_legacy_metrics_are_kept_as_far_as_they_go(see: See) -> None:
    torch = pytest.importorskip("torch")
    seen = see()
    history = History()
    odd: dict[Any, Any] = {
        "numpy": np.int64(3),
        "torch": torch.tensor(0.5),
        "array": np.arange(2),
        "mixed": [1, "x"],
        "none": None,
        "bytes": b"x",
        7: True,
    }
    history.add_loss_centralized(1, torch.tensor(2.0))
    history.add_metrics_centralized(server_round=1, metrics=odd)
    history.add_metrics_distributed_fit(1, {})
    assert history.losses_centralized == [(1, torch.tensor(2.0))]
    assert seen.watch.final == {
        "loss": 2.0,
        "numpy": 3,
        "torch": 0.5,
        "array": "[0 1]",
        "mixed": "[1, 'x']",
        "none": "None",
        "bytes": b"x",
        "7": True,
    }
    assert len(seen.metrics()) == 2
