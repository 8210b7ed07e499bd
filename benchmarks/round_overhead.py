"""What a round costs when the work is nothing: ours, Flower's own engine, and a bare gRPC echo of the same bytes.

Eight devices over mTLS, stock FedAvg.start, train and evaluate of a 100 kB model that comes back as it went (the app
in apps/echo). The echo sends the same bytes to as many processes and back, twice.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

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
    echo, ours, changing = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        certs = Path(folder) / "certs"
        make_certificates(certs, NODES)
        for _ in range(blocks):
            echo += echo_ms(certs, rounds, NODES, MODEL_BYTES)
            milliseconds, result = measure_fedpace(APP, rounds + WARM_UP)
            ours += milliseconds[WARM_UP:]
            moved = bytes_a_round(result, rounds)
            milliseconds, result = measure_fedpace(APP, rounds + WARM_UP, change=True)
            changing += milliseconds[WARM_UP:]
            moved_changing = bytes_a_round(result, rounds)
        echo += echo_ms(certs, rounds, NODES, MODEL_BYTES)
    flower = flower_or_none(flower_rounds)

    sides = {"gRPC echo": echo, "fedpace": ours, "fedpace, another model every round": changing, "Flower": flower}
    echo_p50, our_p50 = float(np.median(echo)), float(np.median(ours))
    figures = {
        "round_ms_p50": our_p50,
        "round_ms_p95": float(np.percentile(ours, 95)),
        "echo_ms_p50": echo_p50,
        "echo_ratio": our_p50 / echo_p50,
        "changing_round_ms_p50": float(np.median(changing)),
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
        "kB_down_a_round": moved["down"],
        "kB_up_a_round": moved["up"],
        "kB_down_a_changing_round": moved_changing["down"],
        "kB_each_way_an_echo_round": 2 * NODES * MODEL_BYTES // 1000,
    }
    publish("A round of nothing", rows, figures, settings, arguments.json)


def bytes_a_round(result: dict[str, Any], rounds: int) -> dict[str, int]:
    """Kilobytes that crossed the wire each way. A model that a device holds already is not sent to it again."""
    return {way: round(result[f"bytes_{way}"] / (rounds + WARM_UP) / 1000) for way in ("up", "down")}


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
