"""`FleetGrid` as a `PacedGrid`: events, handles, cancels and profiles, from real devices to a real ServerApp."""

from __future__ import annotations

import json
from pathlib import Path

from fedpace.localfleet import LocalFleet

APP = Path(__file__).parents[1] / "flower" / "paced"


def test_a_serverapp_sees_every_kind_of_event(tmp_path: Path) -> None:
    output = tmp_path / "seen.json"
    with LocalFleet(tmp_path / "fleet", APP) as fleet:
        fleet.start_server("--min-nodes", "2", "--run-config", f'output="{output}"', "--seed", "0")
        for name in ("one", "two"):
            fleet.start_device(name)
        assert fleet.wait(60.0) == 0, fleet.log("server")
        decisions = [json.loads(line) for line in (fleet.out / "decisions.jsonl").read_text().splitlines()]
        result = json.loads((fleet.out / "result.json").read_text())
    seen = json.loads(output.read_text())
    good = {"right": True, "read only": True, "sum": True, "bytes": True, "readable after release": True}
    assert seen == {
        "restored": None,
        "nodes": ["one", "two"],
        "load": True,
        "free memory": True,
        "tick": True,
        "reply of 3": {**good, "pulled again": 0},
        "reply of 200000": {**good, "pulled again": 0},
        "works after a cancel": True,
        "cancelled was not heard of": True,
        "failed": [2, "ValueError: as asked"],
        "expired": "two: no reply within its time to live of 0.5 s",
        "nobody": 5,
        "profile": ["one", True, True, 1],
        "observed": True,
        "ordered": True,
        "saved": {"round": 1, "nodes": ["one", "two"]},
    }
    assert [entry["n"] for entry in decisions] == list(range(1, len(decisions) + 1))
    assert decisions[-1]["what"] == "decided"
    kinds = [entry["what"] for entry in decisions]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "send": 7,
        "replied": 3,
        "failed": 2,
        "expired": 1,
        "cancel": 1,
        "decided": 1,
    }
    assert all(list(entry)[-1] == "seconds" for entry in decisions)
    assert result["final"] is None and result["updates"]["folded"] is None and result["updates"]["received"] == 3
    assert result["model_sha256"] is None and not (tmp_path / "fleet" / "out" / "model.safetensors").exists()
