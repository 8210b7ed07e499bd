"""The same seed gives the same model, the same trace and the same decisions, for any number of workers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.simulations.simulated import DECLARED, UNEVEN, Left, finished

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.xdist_group("compile")]

STRATEGIES = ("FedAvg", "FedBuff", "flwr")
Simulate = Callable[..., Left]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Simulate:
    """Runs each simulation once, but those of a number of their own."""
    folder = tmp_path_factory.mktemp("repeats")
    (folder / "uneven.toml").write_text(UNEVEN)
    runs: dict[tuple[object, ...], Left] = {}

    def simulate(strategy: str, executor: str, workers: int = 1, seed: int = 7, number: int = 0) -> Left:
        key = (strategy, executor, workers, seed, number)
        if key not in runs:
            options = ("--devices", "50", "--fleet", folder / "uneven.toml", "--executor", executor)
            config = ("--run-config", f'strategy="{strategy}" rounds=5', "--workers", str(workers), "--seed", str(seed))
            runs[key] = finished(DECLARED, folder / str(len(runs)), *options, *config)
        return runs[key]

    return simulate


def model_of(left: Left) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.concatenate([array.ravel() for _, array in sorted(load_file(left.out / "model.safetensors").items())])


@pytest.mark.parametrize("executor", ["pool", "fused"])
@pytest.mark.parametrize("strategy", ["FedAvg", "FedBuff"])
def test_the_number_of_workers_changes_nothing(simulated: Simulate, strategy: str, executor: str) -> None:
    one, two = (simulated(strategy, executor, workers) for workers in (1, 2))
    assert one.bits == two.bits
    assert one.result["updates"] == two.result["updates"] and one.result["tasks"] == two.result["tasks"]


@pytest.mark.parametrize("executor", ["inline", "fused"])
def test_the_same_run_again_changes_nothing(simulated: Simulate, executor: str) -> None:
    assert simulated("FedBuff", executor).bits == simulated("FedBuff", executor, number=1).bits


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_inline_and_pool_agree_to_the_bit(simulated: Simulate, strategy: str) -> None:
    assert simulated(strategy, "inline").bits == simulated(strategy, "pool").bits


@pytest.mark.parametrize("executor", ["inline", "fused"])
def test_another_seed_is_another_run(simulated: Simulate, executor: str) -> None:
    one, other = simulated("FedAvg", executor), simulated("FedAvg", executor, seed=8)
    assert one.result["trace_sha256"] != other.result["trace_sha256"]
    assert one.result["model_sha256"] != other.result["model_sha256"]
    assert np.abs(model_of(one) - model_of(other)).max() > 1e-3
