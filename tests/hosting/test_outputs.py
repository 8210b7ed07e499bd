"""What a run writes down: lines of JSON that any reader takes, every version, the last model, how it ended."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from fedpace.errors import ConfigError
from fedpace.hosting.outputs import Outputs, load_model, safetensors_bytes, to_json, write_result
from tests.generators import law


def strict(text: str) -> Any:
    """Parses JSON, and nothing that only Python takes for it."""

    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def lines(path: Path) -> list[Any]:
    return [strict(line) for line in path.read_text().splitlines()]


def model(value: float) -> ArrayRecord:
    return ArrayRecord({"w": Array(np.full((2, 3), value, np.float32)), "b": Array(np.array(value))})


def versions(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "versions").iterdir())


def test_metrics_and_decisions_are_lines(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path / "out")
    outputs.decision(0.1234567, {"what": "send", "task": 1})
    outputs.metrics(1, 2, 3.0000004, "evaluate", {"loss": 0.5, "counts": [1, 2]})
    outputs.decision(0.5, {"what": "replied", "task": 1})
    assert lines(tmp_path / "out" / "metrics.jsonl") == [
        {"round": 1, "version": 2, "seconds": 3.0, "source": "evaluate", "metrics": {"loss": 0.5, "counts": [1, 2]}}
    ], "a line is there as soon as it is said"
    outputs.close()
    assert lines(tmp_path / "out" / "decisions.jsonl") == [
        {"n": 1, "what": "send", "task": 1, "seconds": 0.123457},
        {"n": 2, "what": "replied", "task": 1, "seconds": 0.5},
    ]
    first, *_, last = (tmp_path / "out" / "decisions.jsonl").read_text().splitlines()[0].split(",")
    assert first == '{"n": 1' and last.startswith(' "seconds": '), "times are in a column of their own, the last"


def test_what_is_no_json_number_is_null_and_what_is_no_plain_value_is_text(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path)
    nan, inf = float("nan"), float("inf")
    outputs.metrics(1, 1, 0.0, "train", {"loss": nan, "losses": [1.0, inf, -inf], "raw": b"x", "f": np.float32(0.5)})
    outputs.decision(0.0, {"node": np.int64(3), "why": {"slow": nan}, "path": tmp_path})
    outputs.close()
    [metrics] = lines(tmp_path / "metrics.jsonl")
    assert metrics["metrics"] == {"loss": None, "losses": [1.0, None, None], "raw": "b'x'", "f": 0.5}
    [decision] = lines(tmp_path / "decisions.jsonl")
    assert (decision["node"], decision["why"], decision["path"]) == (3, {"slow": None}, str(tmp_path))


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@law
@given(plain)
def test_json_is_what_any_reader_takes(value: Any) -> None:
    try:
        expected = json.loads(json.dumps(value, allow_nan=False))
    except ValueError:
        strict(to_json(value))
        strict(to_json(value, indent=2))
    else:
        assert strict(to_json(value)) == expected


def test_every_version_and_the_last_model_are_kept(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path)
    for version in range(5):
        outputs.version(version, model(version))
    outputs.close()
    assert versions(tmp_path) == [f"{version:06d}.safetensors" for version in range(5)]
    for version in range(5):
        arrays = load_file(tmp_path / "versions" / f"{version:06d}.safetensors")
        assert np.array_equal(arrays["w"], np.full((2, 3), version, np.float32)) and arrays["b"] == version
    data = (tmp_path / "model.safetensors").read_bytes()
    assert data == (tmp_path / "versions" / "000004.safetensors").read_bytes() == safetensors_bytes(model(4))
    assert outputs.model_sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("keep", [1, 2])
def test_only_the_last_versions_stay_if_asked_for(tmp_path: Path, keep: int) -> None:
    outputs = Outputs(tmp_path, keep_versions=keep)
    for version in range(6):
        outputs.version(version, model(version))
    outputs.close()
    assert versions(tmp_path) == [f"{version:06d}.safetensors" for version in range(6 - keep, 6)]


def test_a_version_is_the_model_as_it_was_when_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The app goes on with its record while a thread writes."""
    write = threading.Event()
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (write.wait(10), fsync(descriptor)))
    outputs = Outputs(tmp_path)
    arrays = model(1)
    outputs.version(1, model(0))
    outputs.version(2, arrays)
    del arrays["w"]
    arrays["new"] = Array(np.zeros(1))
    write.set()
    outputs.close()
    assert set(load_file(tmp_path / "versions" / "000002.safetensors")) == {"w", "b"}


def test_order_and_byte_order_do_not_matter(tmp_path: Path) -> None:
    weights = np.arange(6, dtype=np.float32).reshape(2, 3)
    record = {"f": np.asfortranarray(weights), "big": weights.astype(">f4"), "half": weights.astype(np.float16)}
    (tmp_path / "model.safetensors").write_bytes(
        safetensors_bytes(ArrayRecord({name: Array(array) for name, array in record.items()}))
    )
    for array in load_model(tmp_path / "model.safetensors").values():
        assert np.array_equal(array, weights)


@pytest.mark.parametrize(
    "odd",
    [
        Array("trees", (3,), "bytes", b"abc"),
        Array("float32", (3,), "numpy.ndarray", b"abc"),
        Array(np.zeros(3, "U4")),
        Array(np.zeros(3, "M8[s]")),
        Array(np.zeros(3, [("a", "f4")])),
        Array(np.zeros(3, np.longdouble)),
    ],
)
def test_what_safetensors_cannot_hold_is_said_once_and_the_run_goes_on(
    tmp_path: Path, odd: Array, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("fedpace").propagate = True
    outputs = Outputs(tmp_path)
    for version in range(4):
        outputs.version(version, ArrayRecord({"odd": odd}))
    outputs.close()
    [warning] = [record for record in caplog.records if record.name == "fedpace.outputs"]
    assert "model version 0 cannot be kept as safetensors" in warning.getMessage()
    assert versions(tmp_path) == [] and outputs.model_sha256 is None
    assert not (tmp_path / "model.safetensors").exists()


def test_closing_twice_and_what_comes_after_do_no_harm(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path)
    outputs.version(1, model(1))
    outputs.close()
    outputs.close()
    outputs.metrics(1, 1, 0.0, "train", {"loss": 1.0})
    outputs.decision(0.0, {"what": "late"})
    assert lines(tmp_path / "metrics.jsonl") == lines(tmp_path / "decisions.jsonl") == []


def test_a_result_is_written_as_a_whole(tmp_path: Path) -> None:
    write_result(tmp_path / "new" / "out", {"status": "finished", "final": {"loss": float("nan")}, "run_id": 1 << 62})
    found = strict((tmp_path / "new" / "out" / "result.json").read_text())
    assert found == {"status": "finished", "final": {"loss": None}, "run_id": 1 << 62}


def test_a_model_file_is_read_or_refused(tmp_path: Path) -> None:
    save_file({"w": np.ones(2, np.float32)}, tmp_path / "good.safetensors")
    assert np.array_equal(load_model(tmp_path / "good.safetensors")["w"], np.ones(2, np.float32))
    with pytest.raises(ConfigError, match=r"--initial-model: there is no file .*missing"):
        load_model(tmp_path / "missing")
    (tmp_path / "bad").write_bytes(b"not safetensors at all")
    for path in (tmp_path / "bad", tmp_path):
        with pytest.raises(ConfigError, match=r"--initial-model: .* is not a safetensors file"):
            load_model(path)
