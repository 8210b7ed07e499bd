"""The fused executor alone: rounds of computations handed over and answered, with no grid, fleet or strategy around.

Every round starts from the first model, which costs the same as any; the last round's answers are averaged afterwards.
"""

from __future__ import annotations

import os

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, MessageType, RecordDict

from benchmarks.engines.arrays import DEVICES_A_ROUND, SEED, Floats
from benchmarks.engines.fedpace_app import WORK, training, work
from benchmarks.engines.meter import Meter, RoundMeter, arguments
from fedpace.errors import RunError
from fedpace.protocol.paced import UpdateHandle
from fedpace.simulations.executors.fused import FusedExecutor
from fedpace.simulations.work import Answer, Computation, Content


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--workers", type=int, default=1, help="worker processes (%(default)s)")
    options = parser.parse_args()
    os.environ[WORK] = str(options.work.resolve())
    its = work()
    first = ArrayRecord({name: torch.from_numpy(array) for name, array in its.weights.items()})
    content = Content(RecordDict({"arrays": first, "config": ConfigRecord({"server-round": 1})}))
    rng = np.random.default_rng(SEED)
    executor = FusedExecutor(training, workers=options.workers)
    try:
        rounds = RoundMeter(meter := Meter(), options.warm_up, options.rounds)
        for done in range(1, rounds.last + 1):
            devices = rng.choice(its.devices, DEVICES_A_ROUND, replace=False)
            seeds = rng.integers(2**63, size=DEVICES_A_ROUND)
            tasks = zip(range(DEVICES_A_ROUND), devices.tolist(), seeds.tolist(), strict=True)
            answers = executor.run([computation(content, *task) for task in tasks])
            rounds.after(done)
            if done < rounds.last:
                for answer in answers:
                    update_of(answer).release()
        updates = [update_of(answer).arrays("arrays") for answer in answers]
        mean: dict[str, Floats] = {
            name: np.mean([update[name] for update in updates], axis=0, dtype=np.float32) for name in its.weights
        }
    finally:
        executor.close()
    meter.report(options.rounds * DEVICES_A_ROUND, mean, options.model, workers=options.workers)


def computation(content: Content, task: int, device: int, seed: int) -> Computation:
    return Computation(
        task=task,
        device=device,
        node_id=device + 2,
        message_type=MessageType.TRAIN,
        content=content,
        config_name="config",
        config={},
        group_id="1",
        created_at=0.0,
        ttl=3600.0,
        seed=seed,
    )


def update_of(answer: Answer) -> UpdateHandle:
    if answer.update is None:
        raise RunError(f"a computation failed: {answer.reason}")
    return answer.update


if __name__ == "__main__":
    main()
