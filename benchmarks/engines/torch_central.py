"""Centralised training on the same images: what is left when nothing is federated, as the roof over simulators.

A step on one batch of 16 is half a device's local run, so an update is as many images as a device has.
"""

from __future__ import annotations

import torch

from benchmarks.engines.arrays import BATCH_SIZE, DEVICES_A_ROUND, SAMPLES, SEED, load
from benchmarks.engines.meter import Meter, RoundMeter, arguments
from benchmarks.engines.models import first_model, train_epoch, weights_of


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE, help="images a step (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    work = load(options.work)
    model = first_model(work)
    images, labels = torch.from_numpy(work.train_x), torch.from_numpy(work.train_y)
    images_a_round = max(DEVICES_A_ROUND * SAMPLES, options.batch_size)
    rounds = RoundMeter(meter := Meter(), options.warm_up, options.rounds)
    for done in range(1, options.warm_up + options.rounds + 1):
        rows = torch.randint(len(labels), (images_a_round,))
        train_epoch(model, images[rows], labels[rows], options.batch_size)
        rounds.after(done)
    updates = options.rounds * images_a_round // SAMPLES
    meter.report(updates, weights_of(model), options.model, torch=torch.__version__, batch_size=options.batch_size)


if __name__ == "__main__":
    main()
