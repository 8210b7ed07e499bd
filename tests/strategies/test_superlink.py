"""A preset under `flwr run`, on Flower's own SuperLink and SuperNodes: the example app as it is."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from benchmarks.flower_engine import check, engine, launch, tail

APP = Path(__file__).parents[2] / "examples" / "digits"
SECONDS = 220.0


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 20.0)
@pytest.mark.xdist_group("ray")  # another of Flower's engines at the same time would slow both
def test_a_buffered_strategy_trains_the_example_on_a_superlink(tmp_path: Path) -> None:
    deadline = time.monotonic() + SECONDS
    config = f'strategy="Paced" num-rounds=2 fraction-evaluate=0.0 log-directory={json.dumps(str(tmp_path / "log"))}'
    with engine(tmp_path, 3, deadline) as processes:
        run = launch(tmp_path, "flwr", "run", str(APP), "bench", "--run-config", config, "--stream")
        while run.poll() is None:
            check(tmp_path, processes, deadline)
            time.sleep(0.1)
    told = tail(tmp_path, "flwr", 80)
    accuracy = [float(found) for found in re.findall(r"evaluated by the server: .*accuracy ([0-9.]+)", told)]
    assert len(accuracy) == 3 and accuracy[-1] > 0.3 > accuracy[0], told
    entries = [json.loads(line) for line in (tmp_path / "log" / "decisions.jsonl").read_text().splitlines()]
    folds = [entry for entry in entries if entry["what"] == "fold"]
    assert len(folds) == 2 and all(sum(fold["weights"]) <= 1.0 + 1e-9 for fold in folds)
