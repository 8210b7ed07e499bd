"""`paced(grid)` and the `measure` mod under `flwr run`, on Flower's own SuperLink and SuperNodes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from benchmarks.flower_engine import check, engine, launch, tail

APP = Path(__file__).parents[1] / "flower" / "measured"
SECONDS = 110.0


@pytest.mark.slow
@pytest.mark.xdist_group("ray")  # another of Flower's engines at the same time would slow both
def test_events_and_measurements_come_from_a_superlink(tmp_path: Path) -> None:
    deadline, output = time.monotonic() + SECONDS, tmp_path / "seen.json"
    with engine(tmp_path, 2, deadline) as processes:
        run = launch(tmp_path, "flwr", "run", str(APP), "bench", "--run-config", f'output="{output}"', "--stream")
        while run.poll() is None:
            check(tmp_path, processes, deadline)
            time.sleep(0.1)
    assert output.exists(), tail(tmp_path, "flwr", 50)
    seen = json.loads(output.read_text())
    assert seen["sequence"] == list(range(1, 8))
    for reply in (seen["first"], seen["second"]):
        assert reply["kind"] == "Replied" and reply["right"]
        assert set(reply["metrics"]) == {"num-examples", "compute-seconds", "bytes-in", "bytes-out"}
        assert all(8000 < reply["metrics"][name] < 8300 for name in ("bytes-in", "bytes-out"))
        assert 0 < reply["compute_seconds"] == reply["metrics"]["compute-seconds"] < reply["seconds"]
    assert (seen["nobody"]["code"], seen["nobody"]["reason"]) == (5, "the grid did not take the message")
    assert seen["wrong"]["code"] == 2 and "as asked" in seen["wrong"]["reason"]
    assert seen["late"]["kind"] == "Expired"
    assert seen["profile"]["seconds_per_task"] == seen["first"]["compute_seconds"]
    assert seen["saved"] == {"round": 1}
    kinds = [json.loads(line)["what"] for line in (tmp_path / "memory" / "decisions.jsonl").read_text().splitlines()]
    assert sorted(kinds) == ["expired", "failed", "failed", "replied", "replied", *["send"] * 5]
