"""Flower's own strategies and workflows give on our runtime the weights they give in Flower's own simulation."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedpace.localfleet import LocalFleet

APPS = Path(__file__).parent / "flower"
NODES = 6
SECONDS = 100.0


def run_on_flower(app: Path, output: Path) -> None:
    """The app in Flower's simulation, in a process of its own. On a busy machine Ray does not always start."""
    command = [sys.executable, str(APPS / "reference.py"), str(app), str(NODES), f'output="{output}"']
    for _ in range(3):
        done = subprocess.run(command, check=False, timeout=SECONDS, capture_output=True, text=True)
        if done.returncode == 0:
            return
    raise AssertionError(f"Flower's simulation failed three times:\n{done.stderr[-4000:]}")


def run_on_fedpace(app: Path, output: Path, directory: Path, config: str = "") -> None:
    """The app on our runtime: a server and as many device processes as nodes, over mTLS."""
    with LocalFleet(directory, app) as fleet:
        fleet.start_server("--min-nodes", str(NODES), "--run-config", f'output="{output}" {config}', "--seed", "0")
        for index in range(NODES):
            fleet.start_device(f"node-{index}", node_config=f"partition-id={index} num-partitions={NODES}")
        code = fleet.wait(SECONDS)
        assert code == 0, fleet.log("server")
        result = json.loads((fleet.out / "result.json").read_text())
        assert result["status"] == "finished" and not result["lost"] and result["updates"]["rejected"] == 0


@pytest.mark.slow
@pytest.mark.timeout(420)
@pytest.mark.xdist_group("ray")  # two of Flower's simulations at a time get in each other's way
@pytest.mark.parametrize(
    ("app", "tolerance"),
    [
        ("strategies", 1e-5),  # the order of a sum differs
        ("legacy", 1e-5),
        ("server_fn", 1e-5),
        ("secagg", 2e-4),  # SecAgg+ rounds each weight stochastically to a multiple of 8 / 4194303, every round
    ],
)
def test_same_weights_as_in_flowers_simulation(app: str, tolerance: float, tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs.npz", tmp_path / "ours.npz"
    run_on_flower(APPS / app, theirs)
    run_on_fedpace(APPS / app, ours, tmp_path / "fleet")
    with np.load(theirs) as expected, np.load(ours) as found:
        assert sorted(expected) == sorted(found)
        assert any(np.ptp(expected[name]) > 0.01 for name in expected), "nothing was learned"
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], rtol=tolerance, atol=tolerance, err_msg=name)


def test_our_presets_give_the_weights_of_flowers_strategies_on_our_runtime(tmp_path: Path) -> None:
    names = ["FedAvg", "FedAdam", "FedProx"]
    strategies = ",".join([*names, *(f"fedpace:{name}" for name in names)])
    run_on_fedpace(APPS / "strategies", tmp_path / "ends.npz", tmp_path / "fleet", f'strategies="{strategies}"')
    with np.load(tmp_path / "ends.npz") as ends:
        theirs = [name for name in ends if not name.startswith("fedpace:")]
        assert len(theirs) == len(ends) / 2 == 4 * len(names)
        for name in theirs:
            np.testing.assert_allclose(ends[f"fedpace:{name}"], ends[name], rtol=2e-5, atol=1e-6, err_msg=name)
        assert np.ptp(ends["FedAvg/weight"] - ends["FedProx/weight"]) > 1e-3, "the proximal term changes nothing"
