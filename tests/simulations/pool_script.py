"""A process with a pool at work: says who its workers are, and waits for a task that does not end."""

from __future__ import annotations

import signal
import sys

from fedpace.simulations.executors.pool import PoolExecutor
from tests.simulations.batches import CONDUCT, DEVICES, RUN_ID, computation, content

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    pool = PoolExecutor(CONDUCT, RUN_ID, DEVICES, workers=2)
    print(*pool.pids, flush=True)
    pool.run([computation(content(), "sleep", device=device, seconds=600.0, mark=sys.argv[1]) for device in range(3)])
