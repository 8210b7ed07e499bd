"""`fedpace simulate`, end to end: virtual clock and grid, a strategy, decision log and trace on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.engines.arrays import DEVICES_A_ROUND, load
from benchmarks.engines.fedpace_app import WORK
from benchmarks.engines.meter import Meter, arguments

APPS = Path(__file__).resolve().parents[1] / "apps"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--executor", choices=("inline", "pool", "fused"), default="fused", help="(%(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="worker processes (%(default)s)")
    parser.add_argument("--strategy", default="FedAvg", help="FedAvg, FedBuff or flwr:FedAvg (%(default)s)")
    parser.add_argument("--fleet", default="uniform", help="a preset, or a file of apps/simulated (%(default)s)")
    parser.add_argument("--in-flight", type=int, default=1000, help="devices at work at a time (%(default)s)")
    options = parser.parse_args()
    work = load(options.work)
    app = APPS / ("simulated" if options.executor == "fused" else "simulated_plain")
    fleet = APPS / "simulated" / options.fleet if options.fleet.endswith(".toml") else options.fleet
    with tempfile.TemporaryDirectory() as folder:
        times, out = Path(folder) / "times.json", Path(folder) / "out"
        config = {
            "strategy": options.strategy,
            "model": str(options.model.resolve()),
            "times": str(times),
            "root": os.getpid(),
            "rounds": options.rounds,
            "warm-up": options.warm_up,
            "in-flight": options.in_flight,
        }
        command = [sys.executable, "-m", "fedpace", "simulate", "--app", app, "--devices", work.devices]
        command += ["--fleet", fleet, "--executor", options.executor, "--workers", options.workers, "--seed", 1]
        command += ["--run-config", " ".join(f"{name}={json.dumps(value)}" for name, value in config.items())]
        environment = {**os.environ, WORK: str(options.work.resolve())}
        command += ["--out", out]
        code = subprocess.run([*map(str, command)], check=False, env=environment, stdout=sys.stderr).returncode
        if code != 0:
            sys.exit(f"fedpace simulate ended with exit code {code}")
        meter = Meter()
        meter.times = json.loads(times.read_text())
        result = json.loads((out / "result.json").read_text())
        settings = {
            "executor": options.executor,
            "workers": options.workers,
            "strategy": options.strategy,
            "events": events(out),
            "versions": options.warm_up + options.rounds,
            "virtual_seconds": result["virtual_seconds"],
            "trace_sha256": result["trace_sha256"],
            "model_sha256": result["model_sha256"],
        }
    with np.load(options.model, allow_pickle=False) as file:
        weights = {name: file[name] for name in file.files}
    meter.report(options.rounds * DEVICES_A_ROUND, weights, options.model, **settings)


def events(out: Path) -> int:
    """Events of a run's trace, but for devices that joined: all of them do before anything begins."""
    (trace,) = out.glob("trace*.npz")
    with np.load(trace, allow_pickle=False) as file:
        return int((file["kinds"][file["kind"]] != "joined").sum())


if __name__ == "__main__":
    main()
