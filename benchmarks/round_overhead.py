"""What a round costs when the work is nothing: ours, Flower's own engine, and a bare gRPC echo of the same bytes.

Eight devices over mTLS, stock FedAvg.start, train and evaluate of a 100 kB model that comes back as it went (the app
in apps/echo). The echo sends the same bytes to as many processes and back, twice.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.fleet import NODES, measure_fedpace
from benchmarks.flower_engine import measure_flower
from benchmarks.grpc_floor import echo_ms, make_certificates
from benchmarks.report import options, publish
from fedpace.errors import RunError

APP = Path(__file__).resolve().parent / "apps" / "echo"
MODEL_BYTES = 102_400
WARM_UP = 1  # rounds left out: the first one also waits for the devices


def main() -> None:
    arguments = options(__doc__.splitlines()[0])
    blocks, rounds, flower_rounds = (1, 100, 3) if arguments.quick else (3, 200, 12)
    echo, ours = [], []
    with tempfile.TemporaryDirectory() as folder:
        certs = Path(folder) / "certs"
        make_certificates(certs, NODES)
        for _ in range(blocks):
            echo += echo_ms(certs, rounds, NODES, MODEL_BYTES)
            milliseconds, result = measure_fedpace(APP, rounds + WARM_UP)
            ours += milliseconds[WARM_UP:]
            moved = {way: result[f"bytes_{way}"] / (rounds + WARM_UP) for way in ("up", "down")}
        echo += echo_ms(certs, rounds, NODES, MODEL_BYTES)
    flower = flower_or_none(flower_rounds)

    sides = {"gRPC echo": echo, "fedpace": ours, "Flower": flower}
    echo_p50, our_p50 = float(np.median(echo)), float(np.median(ours))
    figures = {
        "round_ms_p50": our_p50,
        "round_ms_p95": float(np.percentile(ours, 95)),
        "echo_ms_p50": echo_p50,
        "echo_ratio": our_p50 / echo_p50,
    }
    if flower:
        flower_p50 = float(np.median(flower))
        figures |= {"flower_round_ms_p50": flower_p50, "flower_ratio": flower_p50 / our_p50}
    rows = [("side", "rounds", "p50, ms", "p95, ms", "p50 to ours"), *(row(*side, our_p50) for side in sides.items())]
    settings = {
        "nodes": NODES,
        "model_bytes": MODEL_BYTES,
        "rounds": len(ours),
        "flower_rounds": len(flower),
        "bytes_down_a_round": round(moved["down"]),
        "bytes_up_a_round": round(moved["up"]),
        "echo_bytes_each_way_a_round": 2 * NODES * MODEL_BYTES,
    }
    publish("A round of nothing", rows, figures, settings, arguments.json)


def flower_or_none(rounds: int) -> list[float]:
    """Milliseconds of each round of Flower's engine; none, with the reason on standard error, where it fails."""
    try:
        return measure_flower(APP, rounds + WARM_UP, NODES, timeout=90 + 60 * rounds)[WARM_UP:]
    except RunError as error:
        print(f"Flower's engine could not be measured: {error}", file=sys.stderr)
        return []


def row(name: str, milliseconds: list[float], our_p50: float) -> tuple[str, ...]:
    if not milliseconds:
        return name, "0", "missing", "missing", "missing"
    p50, p95 = np.percentile(milliseconds, [50, 95])
    return name, str(len(milliseconds)), f"{p50:,.2f}", f"{p95:,.2f}", f"{p50 / our_p50:,.3g}"


if __name__ == "__main__":
    main()
