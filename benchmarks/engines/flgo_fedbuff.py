"""FLGo's FedBuff in virtual time: asynchronous, in one process.

Tuned: devices are chosen from the idle ones (by default it also draws busy ones, and sends them nothing), nothing is
evaluated or logged. Time goes in ticks, each of which looks at every device; a task takes 10 of them in the median,
log-normal, which leaves few enough. All that arrive in a tick are folded together, so a version may be of more than
`DEVICES_A_ROUND` updates; what is counted is what was folded.
"""

from __future__ import annotations

import math
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flgo
import numpy as np
import torch
from flgo.algorithm import fedbuff
from flgo.simulator.base import BasicSimulator
from flgo.utils.fmodule import FModule

from benchmarks.engines.arrays import BATCH_SIZE, DEVICES_A_ROUND, LEARNING_RATE, SEED, Work, load
from benchmarks.engines.flgo_task.core import WORK
from benchmarks.engines.meter import Meter, RoundMeter, arguments
from benchmarks.engines.models import first_model, make_model, weights_of

TICKS = 10.0
SIGMA = 1.0


def algorithm(rounds: RoundMeter, folded: list[int]) -> type:
    """FedBuff as it comes, with a stop-watch. `folded` gets the number of updates of each version."""

    class Server(fedbuff.Server):
        def package_handler(self, received_packages: dict[str, list[Any]]) -> bool:
            waiting = len(self.buffer) + len(received_packages["model"])
            stepped: bool = super().package_handler(received_packages)
            if stepped:
                folded.append(waiting)
                rounds.after(len(folded))
            return stepped

    class FedBuff:
        Client = fedbuff.Client

    FedBuff.Server = Server
    return FedBuff


def model_of(work: Work) -> type:
    class Network(FModule):
        def __init__(self) -> None:
            super().__init__()
            for name, layer in make_model(work.name).named_children():
                self.add_module(name, layer)  # flat: FLGo copies the model twice a task, a module at a time

        def forward(self, images: torch.Tensor) -> Any:
            for layer in self.children():
                images = layer(images)
            return images

    class Model:
        @staticmethod
        def init_global_module(party: Any) -> None:
            if "Server" in party.get_classname():
                party.model = Network()
                party.model.load_state_dict(first_model(work).state_dict())

    return Model


class LogNormal(BasicSimulator):
    """Every task takes a time of its own."""

    def initialize(self, *_: Any) -> None:
        self.draws = np.random.default_rng(SEED)

    def update_client_responsiveness(self, client_ids: list[int], *_: Any) -> None:
        times = self.draws.lognormal(math.log(TICKS), SIGMA, len(client_ids))
        self.set_variable(client_ids, "latency", times.tolist())


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--in-flight", type=int, default=1000, help="devices at work at a time (%(default)s)")
    options = parser.parse_args()
    sys.argv = sys.argv[:1]  # FLGo reads it too
    torch.set_num_threads(1)
    work = load(options.work)
    rounds = RoundMeter(meter := Meter(), options.warm_up, options.rounds)
    folded: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder)
        (task / "info").write_text('{"benchmark": "benchmarks.engines.flgo_task"}')
        (task / "record").mkdir()
        (task / WORK).symlink_to(options.work.resolve())
        settings = {
            "num_rounds": rounds.last,
            "proportion": (options.in_flight + 0.5) / work.devices,  # FLGo rounds both down
            "algo_para": [(DEVICES_A_ROUND + 0.5) / work.devices, 1.0],
            "sample": "uniform_available",
            "num_epochs": 1,
            "batch_size": BATCH_SIZE,
            "learning_rate": LEARNING_RATE,
            "learning_rate_decay": 1.0,
            "train_holdout": 0.0,
            "eval_interval": -1,
            "no_log_console": True,
            "no_tqdm": True,
            "seed": SEED,
        }
        server = flgo.init(
            folder, algorithm(rounds, folded), settings, model_of(work), Simulator=LogNormal, scene="horizontal"
        )
        server.run()
    updates = sum(folded[options.warm_up : rounds.last])
    told = {"flgo": version("flgo"), "processes": 1, "in_flight": options.in_flight}
    meter.report(updates, weights_of(server.model), options.model, **told)


if __name__ == "__main__":
    main()
