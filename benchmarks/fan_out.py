"""A 100 MB model to eight devices and back: throughput beside plain gRPC streaming, and the coordinator's memory.

Ours is a Flower app (apps/fan_out) from `send_and_receive` to its return, so it holds what a user waits for: records
made into bytes, hashes, files on disk. Plain streaming moves as many bytes from memory to memory and keeps nothing.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.fleet import NODES, measure_fan_out
from benchmarks.grpc_floor import fan_out_seconds, make_certificates
from benchmarks.report import options, publish

APP = Path(__file__).resolve().parent / "apps" / "fan_out"
MODEL_BYTES = 100_000_000
MB = 1e6
MOVED_MB = 2 * NODES * MODEL_BYTES / MB  # both ways, all nodes


def main() -> None:
    arguments = options(__doc__.splitlines()[0])
    repetitions = 4 if arguments.quick else 10
    with tempfile.TemporaryDirectory() as folder:
        certs = Path(folder) / "certs"
        make_certificates(certs, NODES)
        plain = fan_out_seconds(certs, repetitions, NODES, MODEL_BYTES)
        ours, peak_bytes = measure_fan_out(APP, 2 * repetitions + 1)  # as many as plain streaming before and after
        plain += fan_out_seconds(certs, repetitions, NODES, MODEL_BYTES)
    ours = ours[1:]  # like the floor's, the first one is not counted

    ours_median, plain_median = float(np.median(ours)), float(np.median(plain))
    figures = {
        "throughput_ratio": plain_median / ours_median,
        "throughput_mb_s": MOVED_MB / ours_median,
        "plain_mb_s": MOVED_MB / plain_median,
        "server_peak_mb": peak_bytes / MB,
    }
    columns = ("side", "repetitions", "seconds, median", "MB/s, both ways", "to plain", "coordinator, peak MB")
    rows = [
        row("plain gRPC", plain, plain_median, "-"),
        row("fedpace", ours, plain_median, f"{peak_bytes / MB:,.0f}"),
    ]
    settings = {"nodes": NODES, "model_bytes": MODEL_BYTES, "repetitions": repetitions}
    publish("A 100 MB model to all and back", [columns, *rows], figures, settings, arguments.json)


def row(name: str, seconds: list[float], plain_median: float, memory: str) -> tuple[str, ...]:
    median = float(np.median(seconds))
    return name, str(len(seconds)), f"{median:.2f}", f"{MOVED_MB / median:,.0f}", f"{plain_median / median:.2f}", memory


if __name__ == "__main__":
    main()
