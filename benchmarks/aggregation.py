"""A hundred updates of 10 M float32 added up: ours, Flower's FedAvg aggregation, a numpy loop, and the memory's own pace.

Ours folds updates as the coordinator stores them, files of which the pages are in memory: dense, the largest hundredth of
the numbers, and 8 bits a number. The clock runs from the first update to the aggregate as Flower's record. Flower has its
replies in memory, as its grids hand them out, of a model that is one array, and of one with the same numbers in ten. Every
side is a process of its own; sides take turns, and a ratio is the median over those of the turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.engines.aggregation import HEAD, MODEL_BYTES, NAME, NUMBERS, SAMPLES, THREADS
from benchmarks.launch import QUIET, ROOT, all_ended
from benchmarks.memory import AnonymousMemory, anonymous_bytes
from benchmarks.report import options, publish
from fedpace.errors import RunError
from fedpace.protocol.blobs import BlobStore
from fedpace.protocol.codecs import Quantise, TopK, encode
from fedpace.protocol.encoded import STEP, StepLayout, pack_step
from fedpace.protocol.records import encode as to_payload

UPDATES = 100
DIFFERENT = 5
"""Updates whose numbers differ; every one has bytes and files of its own."""
GB = 1e9
CODECS = {"topk": TopK(0.01), "8bit": Quantise(bits=8)}
RUNS = [(side, "dense") for side in ("fedpace", "read", "flower", "flower, 10 arrays", "numpy")]
RUNS += [("fedpace", kind) for kind in CODECS]


@dataclass(frozen=True)
class Run:
    """`peak_models` is the most anonymous memory a side had, less what it had before the first model was made."""

    seconds: float
    peak_models: float
    found: float


def main() -> None:
    arguments = options(__doc__.splitlines()[0])
    turns = 3 if arguments.quick else 7
    with tempfile.TemporaryDirectory(prefix="aggregation-") as folder:
        sizes = write_updates(Path(folder))
        runs: dict[tuple[str, str], list[Run]] = {which: [] for which in RUNS}
        for turn in range(turns):
            for side, kind in RUNS:
                print(f"turn {turn + 1} of {turns}: {side}, {kind} ...", file=sys.stderr, flush=True)
                runs[side, kind].append(measure(side, Path(folder) / kind))
    agree(runs)

    def ratio(side: tuple[str, str], to: tuple[str, str]) -> float:
        return float(np.median([a.seconds / b.seconds for a, b in zip(runs[side], runs[to], strict=True)]))

    dense = RUNS[0]
    figures = {
        "dense_vs_flower": ratio(("flower", "dense"), dense),
        "dense_vs_flower_10_arrays": ratio(("flower, 10 arrays", "dense"), dense),
        "dense_vs_numpy": ratio(("numpy", "dense"), dense),
        "dense_vs_bandwidth": ratio(("read", "dense"), dense),
        "topk_vs_dense": ratio(dense, ("fedpace", "topk")),
        "8bit_vs_dense": ratio(dense, ("fedpace", "8bit")),
        "peak_models": max(run.peak_models for kind in ("dense", *CODECS) for run in runs["fedpace", kind]),
    }
    rows = [("side", "updates", "GB", "seconds, median", "GB/s", "ours is faster by", "peak memory, models")]
    for side, kind in RUNS:
        seconds = float(np.median([run.seconds for run in runs[side, kind]]))
        peak = max(run.peak_models for run in runs[side, kind])
        faster = f"{ratio((side, kind), dense):.2f}"
        size = sizes[kind] / GB
        rows.append((side, kind, f"{size:.2f}", f"{seconds:.3f}", f"{size / seconds:.1f}", faster, f"{peak:.2f}"))
    settings = {"updates": UPDATES, "numbers": NUMBERS, "threads": THREADS, "turns": turns}
    publish("100 updates added up", rows, figures, settings, arguments.json)


def write_updates(folder: Path) -> dict[str, int]:
    """The updates of every kind as the coordinator stores them; and how many bytes they are, by kind."""
    random = np.random.default_rng(0)
    layout = StepLayout({NAME: (NUMBERS,)})
    sizes = dict.fromkeys(("dense", *CODECS), 0)
    for first in range(DIFFERENT):
        vector = random.standard_normal(NUMBERS, dtype=np.float32)
        contents = {"dense": {NAME: Array(vector)}}
        for kind, codec in CODECS.items():
            contents[kind] = {STEP: pack_step(encode(codec, vector, seed=first), layout, stream=first + 1)}
        for kind, arrays in contents.items():
            records = RecordDict({"arrays": ArrayRecord(arrays), "metrics": MetricRecord({SAMPLES: 1})})
            for number in range(first, UPDATES, DIFFERENT):
                sizes[kind] += write(folder / kind / f"{number:03}", records)
    return sizes


def write(folder: Path, records: RecordDict) -> int:
    """Returns how many bytes the file of arrays has. It is on disk when done, so that nothing is left to be written."""
    payload = to_payload(records, BlobStore(folder).put)
    (folder / HEAD).write_bytes(payload.SerializeToString())
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return payload.blobs[0].size


def measure(side: str, updates: Path) -> Run:
    """Runs a side once on the updates of a folder. Raises RunError when it fails."""
    with started(side, updates) as process:
        assert process.stdin is not None and process.stdout is not None

        def expect(word: str) -> None:
            line = process.stdout.readline() if process.stdout else ""
            if line.strip() != word:
                raise RunError(f"{side} ended before it was {word}: {line.strip()}")

        def go_on() -> None:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()

        expect("ready")
        before = anonymous_bytes(process.pid)
        go_on()
        expect("prepared")
        with AnonymousMemory(process.pid, interval=0.005) as memory:
            go_on()
            expect("done")
        go_on()
        line = json.loads(process.stdout.readline())
    return Run(line["seconds"], (memory.peak_bytes - before) / MODEL_BYTES, line["found"])


@contextmanager
def started(side: str, updates: Path) -> Iterator[subprocess.Popen[str]]:
    """The process of a side, which is ended with the block."""
    command = [sys.executable, "-m", "benchmarks.engines.aggregation", side, str(updates)]
    environment = {**os.environ, **QUIET, "PYTHONPATH": str(ROOT)}
    pipes = subprocess.PIPE
    with (
        subprocess.Popen(command, env=environment, cwd=ROOT, stdin=pipes, stdout=pipes, text=True) as process,
        all_ended(process),
    ):
        yield process


def agree(runs: dict[tuple[str, str], list[Run]]) -> None:
    """Raises RunError where a side that adds up dense updates made something else of them."""
    means = {side: run.found for (side, kind), (run, *_) in runs.items() if kind == "dense" and side != "read"}
    if not np.allclose(list(means.values()), means["flower"], rtol=1e-3, atol=1e-7):
        raise RunError(f"the sides do not agree: means of their aggregates are {means}")


if __name__ == "__main__":
    main()
