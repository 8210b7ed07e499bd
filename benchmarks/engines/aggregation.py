"""One side of the benchmark of aggregation: adds the same updates up once, in a process of its own.

It says when it is ready, waits for a line, makes what it needs before updates come, says so, waits for another, says
when it is done, and then prints a line of JSON: the seconds from the first update to the aggregate, and a mean of the
aggregate's numbers, by which one sees that all sides made the same.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from fedpace.protocol import fleet_pb2 as pb
from fedpace.server.updates import StoredUpdate
from fedpace.strategies.events import Fold
from fedpace.strategies.ledger import Ledger
from fedpace.strategies.presets import FedAvg

NUMBERS = 10_000_000
LAYERS = 10
"""Arrays of the other model that Flower is given: the same numbers. Smaller arrays are easier for it."""
NAME = "weights"
MODEL_BYTES = 4 * NUMBERS
THREADS = min(2, len(os.sched_getaffinity(0)))
SAMPLES = "num-examples"
HEAD = "payload.bin"


class Stored(StoredUpdate):
    """An update as the coordinator keeps it; its files stay for the next side."""

    def release(self) -> None:
        """Nothing is removed."""


def stored(folder: Path) -> list[Stored]:
    """The updates of a folder in their order, none of them read yet."""
    folders = sorted(folder.iterdir())
    return [Stored(path, pb.Payload.FromString((path / HEAD).read_bytes())) for path in folders]


def samples(count: int) -> list[int]:
    """How many samples each of so many devices has: none as many as another."""
    return [100 + number for number in range(count)]


def weights_of(count: int) -> list[float]:
    return [number / sum(samples(count)) for number in samples(count)]


# ---------------------------------------------------------------- sides: prepared before the clock starts, then run

Run = Callable[[], Mapping[str, Array] | None]
"""The aggregate; None of a side that only reads."""


def ours(updates: list[Stored]) -> Run:
    """The ledger of a strategy as it begins: the model, to which the updates are folded."""
    model = ArrayRecord({NAME: Array(np.zeros(NUMBERS, np.float32))})
    ledger = Ledger(FedAvg().composition, model, "arrays")
    count = len(updates)
    tasks = list(range(count))

    def run() -> ArrayRecord:
        for task, update in enumerate(updates):
            ledger.receive(task, 0, update, checked=True)
        ledger.fold(Fold("all", tasks, weights_of(count), tasks, [0] * count, [1.0] * count, count))
        ledger.step(1)
        return ledger.current.record

    return run


def flowers(updates: list[Stored], layers: int = 1) -> Run:
    """Flower's FedAvg, its replies in memory, as its grids hand them out; the model in so many arrays."""
    replies = []
    for update, number in zip(updates, samples(len(updates)), strict=True):
        parts = np.split(update.arrays("arrays")[NAME], layers)
        arrays = ArrayRecord({f"{NAME} {place}": Array(part) for place, part in enumerate(parts)})
        replies.append(RecordDict({"arrays": arrays, "metrics": MetricRecord({SAMPLES: number})}))
    return lambda: aggregate_arrayrecords(replies, SAMPLES)


def loop(updates: list[Stored]) -> Run:
    """What one writes with numpy, on one thread."""

    def run() -> ArrayRecord:
        sums: dict[str, Any] = {}
        for update, weight in zip(updates, weights_of(len(updates)), strict=True):
            arrays: Mapping[str, Any] = update.arrays("arrays")
            for name, array in arrays.items():
                if name in sums:
                    sums[name] += array * np.float32(weight)
                else:
                    sums[name] = array * np.float32(weight)
        return ArrayRecord({name: Array(array) for name, array in sums.items()})

    return run


def reading(updates: list[Stored]) -> Run:
    """Reads every byte once, as fast as numpy does, from files that are mapped, on as many threads as ours uses."""
    arrays: list[Any] = [array.reshape(-1) for update in updates for array in update.arrays("arrays").values()]

    def part(first: int) -> float:
        return sum(float(array.sum()) for array in arrays[first::THREADS])

    def run() -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            assert np.isfinite(sum(pool.map(part, range(THREADS))))

    return run


SIDES: dict[str, Callable[[list[Stored]], Run]] = {
    "fedpace": ours,
    "flower": flowers,
    "flower, 10 arrays": partial(flowers, layers=LAYERS),
    "numpy": loop,
    "read": reading,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("updates", type=Path)
    arguments = parser.parse_args()
    updates = stored(arguments.updates)
    input("ready\n")
    run = SIDES[arguments.side](updates)
    input("prepared\n")
    start = time.perf_counter()
    aggregate = run()
    seconds = time.perf_counter() - start
    input("done\n")
    found = 0.0 if aggregate is None else float(np.mean([array.numpy()[::100].mean() for array in aggregate.values()]))
    print(json.dumps({"seconds": seconds, "found": found}), flush=True)


if __name__ == "__main__":
    main()
