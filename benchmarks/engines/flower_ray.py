"""Flower's simulation engine: its FedAvg with the message API, devices as actors of Ray, one CPU each.

Tuned: its default of two CPUs an actor would halve the speed.
"""

from __future__ import annotations

import os
import tempfile

import ray
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks.engines.arrays import DEVICES_A_ROUND, Floats, Work, load
from benchmarks.engines.flower_device import app as client_app
from benchmarks.engines.meter import Meter, RoundMeter, arguments


def server_app(work: Work, path: str, rounds: RoundMeter, last: dict[str, Floats]) -> ServerApp:
    app = ServerApp()

    def after_round(done: int, arrays: ArrayRecord) -> None:
        rounds.after(done)
        if done == rounds.warm_up + rounds.rounds:
            last.update({name: array.numpy() for name, array in arrays.items()})

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = FedAvg(
            fraction_train=DEVICES_A_ROUND / work.devices,
            fraction_evaluate=0.0,
            min_train_nodes=DEVICES_A_ROUND,
            min_available_nodes=work.devices,
        )
        strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord({name: torch.from_numpy(array) for name, array in work.weights.items()}),
            num_rounds=rounds.warm_up + rounds.rounds,
            train_config=ConfigRecord({"work": path}),
            evaluate_fn=after_round,
        )

    return app


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="actors (%(default)s)")
    options = parser.parse_args()
    work = load(options.work)
    rounds = RoundMeter(meter := Meter(), options.warm_up, options.rounds)
    last: dict[str, Floats] = {}
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        ray_init = {"num_cpus": options.processes, "include_dashboard": False, "_temp_dir": folder}
        run_simulation(
            server_app=server_app(work, str(options.work.resolve()), rounds, last),
            client_app=client_app,
            num_supernodes=work.devices,
            backend_config={"client_resources": {"num_cpus": 1}, "init_args": ray_init},
        )
        ray.shutdown()
    updates = options.rounds * DEVICES_A_ROUND
    meter.report(updates, last, options.model, ray=ray.__version__, processes=options.processes)


if __name__ == "__main__":
    main()
