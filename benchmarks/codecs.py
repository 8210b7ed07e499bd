"""What codecs cost and lose: bytes, encode and decode throughput, relative error, beside memcpy, zlib and safetensors.

The vector is a real step: what ten local steps on the digits change in an MLP 64-3072-3072-10, 9.7 M float32. Encoding
goes from the vector to bytes; decoding from bytes, checked, into an accumulator. Times are CPU time on one core, medians
of interleaved repetitions; megabytes are those of float32 before encoding.
"""

from __future__ import annotations

import os
import sys
import time
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

for library in ("OMP", "OPENBLAS", "MKL"):
    os.environ[f"{library}_NUM_THREADS"] = "1"  # before numpy is there: one core is what is measured
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import numpy.typing as npt
import safetensors.numpy
import torch
from sklearn.datasets import load_digits

from benchmarks.report import options, publish
from fedpace.protocol.codecs import Codec, encode, open_frame, parse_codec

WIDTHS = (64, 3072, 3072, 10)
LOCAL_STEPS = 10
BATCH_SIZE = 16
MB = 1e6

ELEMENTWISE = (
    "raw",
    "half(float16)",
    "half(bfloat16)",
    "quantise(8)",
    "quantise(8, rounding=stochastic)",
    "quantise(4)",
    "quantise(4, rounding=stochastic)",
    "quantise(1)",
    "quantise(1, rounding=stochastic)",
    "qsgd(1)",
    "qsgd(16)",
    "sign",
)
TOP_K = ("topk(0.01)", "topk(0.001)", "topk(0.01) >> quantise(4)")
OTHERS = ("randomk(0.01)", "lowrank(4)", "lowrank(4) >> half(float16)")

Floats = npt.NDArray[np.float32]


class Side(NamedTuple):
    """One way to make the vector into bytes, and to add what they say to a total."""

    name: str
    encode: Callable[[], Any]
    decode: Callable[[Any, Floats], object]


class Result(NamedTuple):
    name: str
    ratio: float
    encode_mb_s: float
    decode_mb_s: float
    error: float
    """|x - decoded| / |x|."""

    @property
    def slower_mb_s(self) -> float:
        return min(self.encode_mb_s, self.decode_mb_s)


def local_step() -> tuple[Floats, list[tuple[int, ...]]]:
    """The step, flat, and the shapes of its arrays."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    inputs, targets = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    layers = [torch.nn.Linear(*pair) for pair in pairwise(WIDTHS)]
    model = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in torch.randperm(len(inputs))[: LOCAL_STEPS * BATCH_SIZE].reshape(LOCAL_STEPS, BATCH_SIZE):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs[batch]), targets[batch]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    steps = [(after.detach() - start).numpy() for start, after in zip(before, model.parameters(), strict=True)]
    return np.concatenate([step.ravel() for step in steps]), [step.shape for step in steps]


def ours(codec: Codec, vector: Floats, shapes: list[tuple[int, ...]]) -> Side:
    memory: dict[str, Floats] = {}
    return Side(
        str(codec),
        lambda: encode(codec, vector, seed=1, shapes=shapes, memory=memory),
        lambda data, total: open_frame(data, size=total.size).add_to(total),
    )


def others(vector: Floats) -> list[Side]:
    copy = np.empty_like(vector)

    def copied() -> memoryview:
        np.copyto(copy, vector)
        return copy.data

    def added(data: Any, total: Floats) -> None:
        total += np.frombuffer(data, np.float32)

    return [
        Side("numpy memcpy", copied, lambda data, total: np.copyto(total, np.frombuffer(data, np.float32))),
        Side("zlib, level 1", lambda: zlib.compress(vector.data, 1), lambda data, t: added(zlib.decompress(data), t)),
        Side("zlib, level 6", lambda: zlib.compress(vector.data, 6), lambda data, t: added(zlib.decompress(data), t)),
        Side(
            "safetensors",
            lambda: safetensors.numpy.save({"step": vector}),
            lambda data, total: added(safetensors.numpy.load(data)["step"], total),
        ),
    ]


def measure(sides: list[Side], vector: Floats, repetitions: int) -> list[Result]:
    """Every side once to warm up and to see its error, then all of them in turn."""
    total = np.zeros_like(vector)
    errors, seconds = [], np.empty((len(sides), repetitions, 2))
    norm = float(np.linalg.norm(vector))
    sizes = []
    for side in sides:
        total[:] = 0
        data = side.encode()
        side.decode(data, total)
        sizes.append(memoryview(data).nbytes)
        errors.append(float(np.linalg.norm(vector - total)) / norm)
    for repetition in range(repetitions):
        for place, side in enumerate(sides):
            start = time.process_time()
            data = side.encode()
            middle = time.process_time()
            side.decode(data, total)
            seconds[place, repetition] = middle - start, time.process_time() - middle
    rates = vector.nbytes / MB / np.median(seconds, axis=1)
    return [
        Result(side.name, vector.nbytes / size, float(rate[0]), float(rate[1]), error)
        for side, size, rate, error in zip(sides, sizes, rates, errors, strict=True)
    ]


def main() -> None:
    arguments = options(__doc__.splitlines()[0])
    repetitions = 5 if arguments.quick else 15
    vector, shapes = local_step()
    names = (*ELEMENTWISE, *TOP_K, *OTHERS)
    sides = [*others(vector), *(ours(parse_codec(name), vector, shapes) for name in names)]
    results = {result.name: result for result in measure(sides, vector, repetitions)}
    memcpy, deflate = results["numpy memcpy"], results["zlib, level 1"]
    elementwise = min(results[name].slower_mb_s for name in ELEMENTWISE)
    figures = {
        "elementwise_mb_s": elementwise,
        "topk_mb_s": min(results[name].slower_mb_s for name in TOP_K),
        "elementwise_to_memcpy": elementwise / memcpy.encode_mb_s,
        "quantise8_encode_to_zlib": results["quantise(8)"].encode_mb_s / deflate.encode_mb_s,
        "quantise8_ratio_to_zlib": results["quantise(8)"].ratio / results["zlib, level 6"].ratio,
        "topk_quantise4_ratio": results["topk(0.01) >> quantise(4)"].ratio,
    }
    columns = ("codec", "smaller by", "encode, MB/s", "decode, MB/s", "relative error")
    rows = [
        (
            result.name,
            f"{result.ratio:.1f}",
            f"{result.encode_mb_s:,.0f}",
            f"{result.decode_mb_s:,.0f}",
            f"{result.error:.2g}",
        )
        for result in results.values()
    ]
    settings = {"numbers": vector.size, "repetitions": repetitions, "threads": 1, "numpy": np.__version__}
    publish("A step of 9.7 M float32 as bytes and back", [columns, *rows], figures, settings, arguments.json)


if __name__ == "__main__":
    main()
