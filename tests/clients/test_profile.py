"""What a device says it is: this machine as psutil knows it, GPUs as NVML and CUDA's environment show them."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import psutil
import pytest

import fedpace
from fedpace.clients.profile import accelerator, read_battery, read_heartbeat, read_profile
from fedpace.protocol import fleet_pb2 as pb

UseNvml = Callable[..., None]


class NVMLError(Exception):
    """As pynvml's."""


@pytest.fixture
def use_nvml(monkeypatch: pytest.MonkeyPatch) -> UseNvml:
    """Puts a library in pynvml's place that knows some GPUs, or has no driver."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def use(gpus: list[str], *, driver: bool = True, tells_memory: bool = True, visible: str | None = None) -> None:
        def init() -> None:
            if not driver:
                raise NVMLError("driver not loaded")

        def by_index(index: int) -> str:
            if index >= len(gpus):
                raise NVMLError("invalid argument")
            return gpus[index]

        def by_uuid(uuid: str) -> str:
            if uuid.removeprefix("GPU-") not in gpus:
                raise NVMLError("not found")
            return uuid.removeprefix("GPU-")

        def memory(handle: str) -> SimpleNamespace:
            if not tells_memory:
                raise NVMLError("not supported")
            return SimpleNamespace(total=1000 + gpus.index(handle))

        module = ModuleType("pynvml")
        module.__dict__.update(
            NVMLError=NVMLError,
            nvmlInit=init,
            nvmlDeviceGetCount=lambda: len(gpus),
            nvmlDeviceGetHandleByIndex=by_index,
            nvmlDeviceGetHandleByUUID=by_uuid,
            nvmlDeviceGetName=lambda handle: handle.encode() if handle == "old" else handle,
            nvmlDeviceGetMemoryInfo=memory,
        )
        monkeypatch.setitem(sys.modules, "pynvml", module)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return use


def gpus() -> list[tuple[str, int]]:
    return [(gpu.name, gpu.memory_bytes) for gpu in read_profile().gpus]


def test_this_machine_is_described() -> None:
    profile = read_profile()
    assert (profile.cpu_count, profile.memory_bytes) == (psutil.cpu_count(), psutil.virtual_memory().total)
    assert (profile.python, profile.fedpace) == (platform.python_version(), fedpace.__version__)
    assert profile.cpu_model and profile.platform


def test_a_heartbeat_says_how_busy_it_is() -> None:
    beat = read_heartbeat()
    assert 0.0 <= beat.load <= 1.0
    assert 0 < beat.free_memory_bytes <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (SimpleNamespace(percent=41.5, power_plugged=True), pb.Battery(percent=41.5, plugged=True)),
        (SimpleNamespace(percent=9.0, power_plugged=None), pb.Battery(percent=9.0, plugged=False)),
        (None, None),
        (OSError(5, "Input/output error"), None),
        (AttributeError("this platform has none"), None),
    ],
)
def test_a_battery_is_told_where_there_is_one(
    found: object, expected: pb.Battery | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sensors_battery() -> object:
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(psutil, "sensors_battery", sensors_battery, raising=False)
    assert read_battery() == expected
    assert read_heartbeat().HasField("battery") == (expected is not None)


def test_gpus_are_those_of_nvml(use_nvml: UseNvml) -> None:
    use_nvml(["big", "old"])
    assert gpus() == [("big", 1000), ("old", 1001)]


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("1", ["b"]),
        ("2,0", ["c", "a"]),
        (" 1 , GPU-a", ["b", "a"]),
        ("0,7,1", ["a"]),
        ("0,-1,1", ["a"]),
        ("-1", []),
        ("", []),
    ],
)
def test_only_gpus_that_cuda_shows_count_in_its_order(use_nvml: UseNvml, visible: str, names: list[str]) -> None:
    """A task told to use cuda:1 must find it."""
    use_nvml(["a", "b", "c"], visible=visible)
    assert [name for name, _ in gpus()] == names


def test_a_gpu_that_does_not_tell_its_memory_is_one_all_the_same(use_nvml: UseNvml) -> None:
    use_nvml(["board"], tells_memory=False)
    assert gpus() == [("board", 0)]


def test_without_driver_or_library_there_are_no_gpus(use_nvml: UseNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    use_nvml(["unreachable"], driver=False)
    assert gpus() == []
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpus() == []


def test_an_apple_chip_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert gpus() == [("mps", psutil.virtual_memory().total)]
    assert accelerator(read_profile(), 3) == "mps"


def test_slots_take_turns_on_the_gpus() -> None:
    profile = pb.Profile(gpus=[pb.Gpu(name="a"), pb.Gpu(name="b")])
    assert [accelerator(profile, slot) for slot in range(4)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert accelerator(pb.Profile(), 1) == "cpu"


def test_the_agent_does_not_import_torch() -> None:
    code = "import sys, fedpace.clients.agent, fedpace.clients.main; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(Path(fedpace.__path__[0]).parent)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, check=False).returncode == 0
