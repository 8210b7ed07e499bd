"""What a device is: processors, memory, accelerators, battery; and how busy it is. Torch is not needed to say so."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path

import psutil

from fedpace import __version__
from fedpace.protocol import fleet_pb2 as pb


def read_profile() -> pb.Profile:
    """The device this process runs on."""
    return pb.Profile(
        cpu_count=psutil.cpu_count() or 1,
        cpu_model=_cpu_model(),
        memory_bytes=psutil.virtual_memory().total,
        gpus=_gpus(),
        battery=read_battery(),
        platform=platform.platform(terse=True),
        python=platform.python_version(),
        fedpace=__version__,
    )


def read_heartbeat() -> pb.Heartbeat:
    """How busy the device is since the last heartbeat."""
    return pb.Heartbeat(
        load=psutil.cpu_percent() / 100.0,
        free_memory_bytes=psutil.virtual_memory().available,
        battery=read_battery(),
    )


def read_battery() -> pb.Battery | None:
    """Charge of the battery, or None where there is none."""
    with suppress(AttributeError, OSError, RuntimeError):
        if (battery := psutil.sensors_battery()) is not None:
            return pb.Battery(percent=battery.percent, plugged=bool(battery.power_plugged))
    return None


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Hardware", "Model"):
                return value.strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[pb.Gpu]:
    """NVIDIA's GPUs, where their library (the `gpu` extra) and driver are there; the one of an Apple chip."""
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return [pb.Gpu(name="mps", memory_bytes=psutil.virtual_memory().total)]
    try:
        import pynvml
    except ImportError:
        return []
    gpus = []
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        for name in _visible(pynvml.nvmlDeviceGetCount()):
            if name.isdecimal():
                handle = pynvml.nvmlDeviceGetHandleByIndex(int(name))
            else:
                handle = pynvml.nvmlDeviceGetHandleByUUID(name)
            gpu = pb.Gpu(name=_text(pynvml.nvmlDeviceGetName(handle)))
            with suppress(pynvml.NVMLError):  # boards that share their memory with the processor do not tell
                gpu.memory_bytes = pynvml.nvmlDeviceGetMemoryInfo(handle).total
            gpus.append(gpu)
    return gpus


def _visible(count: int) -> list[str]:
    """The GPUs that CUDA shows this process, in its order: numbers or UUIDs; the first that is not there ends them."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count))))
    return [name.strip() for name in names.split(",") if name.strip()]


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name


def accelerator(profile: pb.Profile, slot: int) -> str:
    """The accelerator of one slot, as torch names it: `cuda:0`, `mps`, `cpu`."""
    if not profile.gpus:
        return "cpu"
    if profile.gpus[0].name == "mps":
        return "mps"
    return f"cuda:{slot % len(profile.gpus)}"
