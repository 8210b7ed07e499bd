"""The `compress` mod in Flower's own simulation, under Flower's own FedAvg."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

APP = Path(__file__).parents[1] / "flower" / "compressed"
ROUNDS, NODES = 20, 3

RUN = """
import json, sys
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

sys.path.insert(0, {app!r})
from compressed_app import client, distance
from flwr.app import Array, ArrayRecord
import numpy as np
from fedpace.protocol.decoding import decoded

server = ServerApp()


@server.main()
def main(grid, context):
    model = ArrayRecord({{"w": Array(np.zeros((20, 5), np.float32)), "count": Array(np.zeros((), np.int64))}})
    strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes={nodes})
    result = strategy.start(grid=decoded(grid), initial_arrays=model, num_rounds={rounds})
    nodes = sorted(grid.get_node_ids())
    found = {{"distance": distance(result.arrays["w"].numpy(), nodes), "count": float(result.arrays["count"].numpy())}}
    open({out!r}, "w").write(json.dumps(found))


backend = {{"client_resources": {{"num_cpus": 1, "num_gpus": 0.0}}}}
run_simulation(server_app=server, client_app=client, num_supernodes={nodes}, backend_config=backend)
"""


@pytest.mark.slow
def test_flowers_simulation_and_strategy(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    script = tmp_path / "run.py"
    script.write_text(RUN.format(app=str(APP), out=str(out), nodes=NODES, rounds=ROUNDS))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=150, check=False)
    assert out.exists(), done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found["distance"] < 0.7
    assert found["count"] == pytest.approx(ROUNDS)
