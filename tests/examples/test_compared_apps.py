"""The apps that are compared: each learns under `inline` and `fused` alike, knows who is slow, and says what its data are."""

from __future__ import annotations

import gzip
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.common.config import get_project_config, validate_config
from numpy.typing import NDArray

from fedpace.clients.training import FederatedData, by_key, iid
from fedpace.errors import ConfigError
from fedpace.examples.compared import fashion_mnist
from fedpace.examples.compared.server import held_by, slowest_third
from fedpace.simulations.comparison.reading import read_scenario
from fedpace.simulations.fleets import load_fleet

ROOT = Path(__file__).resolve().parents[2]
COMPARED = ROOT / "examples" / "compared"
SCENARIOS = ROOT / "fedpace" / "simulations" / "scenarios"
MODULES = {
    "digits": "digits_compared",
    "fashion": "fashion_compared",
    "slow-devices": "slow_devices",
    "watch": "watch_compared",
}


def write_idx(path: Path, array: NDArray[np.uint8]) -> None:
    header = (0x800 + array.ndim).to_bytes(4) + b"".join(length.to_bytes(4) for length in array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes(), compresslevel=1))


@pytest.fixture(scope="module")
def clothes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like that of Fashion-MNIST, with fewer images: of label n, rows 2n and 2n + 1 are bright."""
    folder = tmp_path_factory.mktemp("clothes")
    rng = np.random.default_rng(0)
    for name, count in (("train", 2000), ("t10k", 200)):
        labels = rng.permutation(np.arange(count) % 10).astype(np.uint8)
        images = rng.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        images[np.arange(count)[:, np.newaxis], 2 * labels[:, np.newaxis] + np.arange(2)] += 190
        write_idx(folder / f"{name}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{name}-labels-idx1-ubyte.gz", labels)
    return folder


def simulate(app: str, out: Path, clothes: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedpace", "simulate", "--app", str(COMPARED / app), "--out", str(out), *options]
    environment = os.environ | {"FASHION_MNIST": str(clothes), "COLUMNS": "400", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)


def outcomes(out: Path) -> list[dict[str, Any]]:
    """What the server's tests of its versions gave."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["metrics"] for line in lines if line["source"] == "server"]


@pytest.mark.parametrize("app", MODULES)
def test_flower_accepts_the_app(app: str) -> None:
    config = get_project_config(COMPARED / app)
    assert validate_config(config, check_module=True, project_dir=COMPARED / app) == (True, [], [])
    assert build_fab_from_disk(COMPARED / app)


@pytest.mark.slow
@pytest.mark.parametrize("app", MODULES)
def test_it_learns_the_same_with_both_executors(app: str, tmp_path: Path, clothes: Path) -> None:
    fleet = str(COMPARED / "slow-devices" / "fleet.toml")
    devices = "700" if app == "watch" else "30"  # of which the first few know one exercise only
    options = ("--devices", devices, "--fleet", fleet, "--seed", "1")
    config = """num-rounds=8 train-nodes=12 settings='{"config": {"local-steps": 8}}'"""
    found = []
    for executor in ("inline", "fused"):
        out = tmp_path / executor
        done = simulate(app, out, clothes, *options, "--executor", executor, "--run-config", config)
        assert done.returncode == 0, done.stderr
        found.append(outcomes(out))
    inline, fused = found
    assert len(inline) == len(fused) == 9
    for one, other in zip(inline, fused, strict=True):
        assert one.keys() == other.keys() == {"loss", "accuracy", "slow_accuracy"}
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
    assert inline[-1]["loss"] < 0.9 * inline[0]["loss"], "it learns"
    assert 0 < inline[-1]["slow_accuracy"] < 1


def test_versions_are_tested_as_often_as_is_asked(tmp_path: Path, clothes: Path) -> None:
    """Every fifth of a second of the grid's time, and the last one."""
    config = 'strategy="FedAsync" num-rounds=60 train-nodes=10 evaluate-seconds=0.2'
    done = simulate("digits", tmp_path / "out", clothes, "--devices", "20", "--run-config", config)
    assert done.returncode == 0, done.stderr
    seconds = json.loads((tmp_path / "out" / "result.json").read_text())["virtual_seconds"]
    found = outcomes(tmp_path / "out")
    assert seconds / 0.4 < len(found) <= seconds / 0.2 + 2 < 60
    assert all(each.keys() == {"loss", "accuracy"} for each in found), "where all are as fast, nobody is slow"


def test_a_strategy_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path, clothes: Path) -> None:
    done = simulate("digits", tmp_path, clothes, "--devices", "4", "--run-config", 'strategy="FedNothing"')
    assert done.returncode == 1
    assert "FedNothing" in done.stderr and "CA2FL, Compass" in done.stderr and "Traceback" not in done.stderr


# ------------------------------------------------------------ who is slow


class Grid:
    """Nothing but a fleet."""

    def __init__(self, fleet: object) -> None:
        self.fleet = fleet


@pytest.fixture(scope="module")
def slow_devices() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(COMPARED / "slow-devices")
        return importlib.import_module("slow_devices")


@pytest.mark.parametrize("devices", [150, 500])
def test_the_fleet_and_the_data_agree_on_who_is_slow(slow_devices: ModuleType, clothes: Path, devices: int) -> None:
    fleet = load_fleet(str(COMPARED / "slow-devices" / "fleet.toml"), devices, seed=7)
    slow: Any = slowest_third(Grid(fleet))  # type: ignore[arg-type]
    assert set(slow.tolist()) == set(np.flatnonzero(slow_devices.SLOW[:devices]).tolist())
    seconds = fleet.devices.step_seconds
    assert seconds[slow].min() > 10 * np.delete(seconds, slow).max()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASHION_MNIST", str(clothes))
        data = slow_devices.data()
    for device in range(devices):
        tops = np.isin(data.targets[data.partitions[device]], slow_devices.TOPS)
        assert tops.all() if device in slow else not tops.any()
    weights = held_by(data, slow)
    assert set(data.test_targets[weights > 0].tolist()) == set(slow_devices.TOPS)
    assert weights.sum() == pytest.approx(1)


def test_nobody_is_slow_where_all_are_alike_or_nothing_is_known() -> None:
    assert slowest_third(Grid(load_fleet("uniform", 30, 0))) is None  # type: ignore[arg-type]
    assert slowest_third(object()) is None  # type: ignore[arg-type]
    phones = load_fleet("flash", 30, 0)
    slow: Any = slowest_third(Grid(phones))  # type: ignore[arg-type]
    assert len(set(slow.tolist())) == 10
    assert phones.devices.step_seconds[slow].min() >= np.delete(phones.devices.step_seconds, slow).max()


def test_what_devices_hold_is_their_own_test_samples_or_their_mix_of_labels() -> None:
    targets, tested_on = np.array([0, 0, 1, 1, 2, 2]), np.array([0, 0, 1, 2])
    inputs, test_inputs = np.zeros((6, 1), np.float32), np.zeros((4, 1), np.float32)
    mixed = FederatedData(inputs, targets, by_key(np.array([0, 1, 0, 1, 0, 1])), test_inputs, tested_on)
    assert held_by(mixed, np.array([0])).tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 3, 1 / 3])
    own = FederatedData(
        inputs, targets, iid(6, 2, seed=0), test_inputs, tested_on, test_partitions=by_key(np.array([0, 1, 0, 1]))
    )
    assert held_by(own, np.array([1])).tolist() == [0, 0.5, 0, 0.5]


# ------------------------------------------------------------ data


@pytest.mark.parametrize("executor", ["inline", "fused"])
def test_a_path_without_the_data_says_what_to_do(executor: str, tmp_path: Path) -> None:
    options = ("--devices", "4", "--executor", executor)
    done = simulate("fashion", tmp_path / "out", tmp_path / "nothing", *options)
    assert done.returncode in (1, 2)
    assert str(tmp_path / "nothing") in done.stderr
    assert "apt-get download dataset-fashion-mnist" in done.stderr and "FASHION_MNIST" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_path_the_places_looked_at_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FASHION_MNIST", raising=False)
    monkeypatch.setattr(fashion_mnist, "PLACES", (tmp_path / "one", tmp_path / "two"))
    with pytest.raises(ConfigError, match=rf"{tmp_path}/one nor in {tmp_path}/two.*apt-get"):
        fashion_mnist.load()
    (tmp_path / "two").mkdir()
    with pytest.raises(ConfigError, match=rf"{tmp_path}/two/train-images.* cannot be read: No such file"):
        fashion_mnist.load()


@pytest.mark.parametrize("damage", ["cut", "garbage", "other", "long"])
def test_files_that_are_damaged_are_named(
    damage: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clothes: Path
) -> None:
    for path in clothes.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "t10k-labels-idx1-ubyte.gz"
    whole = path.read_bytes()
    found = {
        "cut": whole[:-20],
        "garbage": b"nothing",
        "other": (tmp_path / "t10k-images-idx3-ubyte.gz").read_bytes(),
        "long": gzip.compress(gzip.decompress(whole) + b"more"),
    }
    path.write_bytes(found[damage])
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))
    with pytest.raises(ConfigError, match=r"t10k-labels-idx1-ubyte\.gz .*apt-get"):
        fashion_mnist.load()


def test_images_are_halved_and_labels_kept(monkeypatch: pytest.MonkeyPatch, clothes: Path) -> None:
    monkeypatch.setenv("FASHION_MNIST", str(clothes))
    images, labels, test_images, test_labels = fashion_mnist.load()
    assert images.shape == (2000, 196) and test_images.shape == (200, 196) and images.dtype == np.float32
    assert labels.shape == (2000,) and labels.dtype == test_labels.dtype == np.int64
    assert images.min() >= 0 and images.max() <= 1
    whole = gzip.decompress((clothes / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    first = np.frombuffer(whole, np.uint8)[: 28 * 28].reshape(28, 28)
    assert test_images[0].reshape(14, 14)[3, 5] == pytest.approx(first[6:8, 10:12].mean() / 255, rel=1e-6)


@pytest.fixture(scope="module")
def watch() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(COMPARED / "watch")
        return importlib.import_module("watch_compared")


def test_every_watch_knows_one_exercise_and_is_tested_on_the_same_one(watch: ModuleType) -> None:
    data = watch.data()
    assert data.inputs.shape[1] == data.test_inputs.shape[1] == 30
    assert np.isfinite(data.inputs).all() and abs(data.inputs.mean(axis=0)).max() < 1e-3
    assert len(data.partitions) == len(data.test_partitions) == 700
    assert data.partitions.sizes.min() >= 6 and data.test_partitions.sizes.min() >= 2
    exercises = set()
    for own, tested_on in zip(data.partitions, data.test_partitions, strict=True):
        [exercise] = {*data.targets[own].tolist(), *data.test_targets[tested_on].tolist()}
        exercises.add(exercise)
    assert exercises == set(range(7))
    assert np.array_equal(np.sort(data.partitions.indices), np.arange(len(data.targets)))
    assert np.bincount(data.test_partitions.indices).tolist() == [5] * len(data.test_targets), "for five devices each"
    assert np.array_equal(data.test_partitions[0], data.test_partitions[4])
    assert not set(data.test_partitions[4].tolist()) & set(data.test_partitions[5].tolist())


def test_windows_overlap_and_are_described_by_axis(watch: ModuleType) -> None:
    recording = np.arange(260, dtype=np.float32)[:, np.newaxis] * np.arange(1, 7, dtype=np.float32)
    found = watch.windows(recording, 50)
    assert found.shape == (4, 100, 6)
    assert found[:, 0, 0].tolist() == [0, 50, 100, 150] and found[1, -1, 5] == 149 * 6
    described = watch.features(found)[0].reshape(5, 6)
    assert described[0, 1] == pytest.approx(2 * 49.5) and described[2:4, 1].tolist() == [0, 198]
    assert described[1, 0] == pytest.approx(np.arange(100).std()) and described[4].tolist() == [1, 2, 3, 4, 5, 6]


def test_without_the_package_it_is_named(watch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install seglearn==1\.2\.5"):
        watch.data()


def test_another_file_of_recordings_is_not_opened(
    watch: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Spec:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(watch, "find_spec", lambda name: Spec)
    with pytest.raises(ConfigError, match=r"watch_dataset\.npy cannot be read: No such file"):
        watch.data()
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "watch_dataset.npy", {"X": [], "y": []}, allow_pickle=True)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"watch_dataset\.npy is not the file of that name in seglearn 1\.2\.5"):
        watch.data()


# ------------------------------------------------------------ scenarios


@pytest.mark.parametrize("app", MODULES)
def test_its_scenario_can_be_read_and_fits_it(app: str, clothes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = read_scenario(SCENARIOS / f"{app}.toml")
    assert scenario.description and len(scenario.seeds) >= 5 and scenario.shortened().seeds
    [compared] = scenario.apps
    assert compared.name == app and Path(compared.folder).resolve() == COMPARED / app
    monkeypatch.setenv("FASHION_MNIST", str(clothes))
    monkeypatch.syspath_prepend(compared.folder)
    assert len(importlib.import_module(MODULES[app]).data().partitions) >= compared.devices
    fleets = {fleet.name for fleet in scenario.fleets}
    assert fleets == ({"slow-third"} if app == "slow-devices" else {"uniform", "flash", "edge-extreme", "liars"})
    assert {"FedAvg", "FedBuff", "FedAsync", "CA2FL", "Compass", "Oort", "REFL", "Paced"} <= {
        strategy.name for strategy in scenario.strategies
    }
