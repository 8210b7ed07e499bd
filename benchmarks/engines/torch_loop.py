"""FedAvg as a plain loop in PyTorch: no engine, one process, a device after the other."""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.engines.arrays import DEVICES_A_ROUND, SEED, load
from benchmarks.engines.meter import Meter, RoundMeter, arguments
from benchmarks.engines.models import first_model, make_model, train_epoch, weights_of


def main() -> None:
    options = arguments(__doc__).parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    work = load(options.work)
    images, labels = torch.from_numpy(work.train_x), torch.from_numpy(work.train_y)
    data = [(images[rows], labels[rows]) for rows in torch.from_numpy(work.partition)]
    rng = np.random.default_rng(SEED)
    server, device = first_model(work), make_model(work.name)
    rounds = RoundMeter(meter := Meter(), options.warm_up, options.rounds)
    for done in range(1, options.warm_up + options.rounds + 1):
        sums = [torch.zeros_like(parameter) for parameter in server.parameters()]
        for index in rng.choice(work.devices, DEVICES_A_ROUND, replace=False):
            device.load_state_dict(server.state_dict())
            train_epoch(device, *data[index])
            with torch.no_grad():
                for total, parameter in zip(sums, device.parameters(), strict=True):
                    total += parameter
        with torch.no_grad():
            for total, parameter in zip(sums, server.parameters(), strict=True):
                parameter.copy_(total / DEVICES_A_ROUND)
        rounds.after(done)
    meter.report(
        options.rounds * DEVICES_A_ROUND, weights_of(server), options.model, torch=torch.__version__, processes=1
    )


if __name__ == "__main__":
    main()
