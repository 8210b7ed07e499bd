"""What the page on simulation shows, run as it stands there: on the large-fleet example."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.clientapp import ClientApp

from fedpace.clients.training.declaration import declared_training

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "simulation.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_example_and_the_trace_are_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [shown_command] = re.findall(r"^    fedpace (simulate .*)$", PAGE, re.MULTILINE)
    out = tmp_path / "runs" / "large-fleet"
    app = ROOT / "examples" / "large-fleet"
    arguments = shown_command.replace("examples/large-fleet", str(app)).split()
    command = [sys.executable, "-m", "fedpace", *arguments, "--run-config", "num-rounds=60", "--out", str(out)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    result = json.loads((out / "result.json").read_text())
    assert result["status"] == "finished" and result["versions"] == 60
    assert result["final"]["loss"] < 2.2, "it learns"

    declared, trace = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    shown: dict[str, Any] = {}
    exec(trace, shown)  # noqa: S102
    assert np.all(shown["times"] > 0) and len(shown["times"]) == result["updates"]["received"]
    exec(declared, shown)  # noqa: S102
    assert isinstance(shown["app"], ClientApp) and declared_training(shown["app"]) is shown["training"]
