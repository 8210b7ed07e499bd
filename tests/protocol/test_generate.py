"""The committed protobuf code is what the `.proto` gives."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import fedpace.protocol
from fedpace.protocol.generate import generate


def test_the_generated_code_is_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("grpc_tools", reason="a development dependency")
    monkeypatch.setenv(
        "PATH", str(Path(sys.executable).parent), prepend=os.pathsep
    )  # where protoc finds mypy's plugins
    generate(tmp_path)
    fresh = {path.name: path.read_text() for path in (tmp_path / "fedpace" / "protocol").iterdir()}
    room = Path(fedpace.protocol.__path__[0])
    committed = {path.name: path.read_text() for path in room.glob("fleet_pb2*")}
    assert set(fresh) == set(committed)
    for name, text in fresh.items():
        assert text == committed[name], f"{name} is out of date: run `python -m fedpace.protocol.generate`"
