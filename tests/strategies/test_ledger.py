"""Cohorts of dense and compressed updates: the plain formula, copies as the devices have them, bad ones that leave no trace."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpace.errors import PayloadError
from fedpace.protocol.blobs import BlobStore
from fedpace.protocol.codecs import Codec, Half, Quantise, TopK, encode, open_frame
from fedpace.protocol.encoded import STEP, STEP_TYPE, StepLayout, copy_name, pack_step
from fedpace.protocol.paced import UpdateHandle
from fedpace.protocol.received import RecordsUpdate
from fedpace.protocol.records import encode as to_payload
from fedpace.server.updates import StoredUpdate
from fedpace.strategies.composition import Composition
from fedpace.strategies.events import Fold
from fedpace.strategies.folders import Mean
from fedpace.strategies.ledger import Ledger
from fedpace.strategies.parts import Vector
from fedpace.strategies.presets import CA2FL, FedAvg
from fedpace.strategies.sums import add_dense
from fedpace.strategies.waiting import MAPPED

law = settings(deadline=None, max_examples=40)
CODECS: list[Codec] = [TopK(0.3), TopK(0.3) >> Quantise(bits=4), Quantise(bits=8), Half()]


@dataclass(frozen=True)
class Summing:
    """The mean, as a folder that nobody here knows how to make faster."""

    needs: ClassVar[str] = "sums"
    against: str = "base"

    def fold(self, changes: Iterator[tuple[float, Vector]], like: Vector) -> Vector:
        return sum((weight * change for weight, change in changes), np.zeros_like(like))


@dataclass(frozen=True)
class Median:
    needs: ClassVar[str] = "all"
    against: str = "base"

    def fold(self, changes: Iterator[tuple[float, Vector]], like: Vector) -> Vector:
        return np.median(np.stack([change for _, change in changes]), axis=0).astype(like.dtype)


def composed(folder: Any) -> Composition:
    return dataclasses.replace(FedAvg().composition, folder=folder)


def model(rng: np.random.Generator, dtype: Any, counted: bool) -> dict[str, Any]:
    """Two arrays of numbers, and a counter between them."""
    arrays: dict[str, Any] = {"w": rng.normal(size=(5, 4)).astype(dtype)}
    if counted:
        arrays["seen"] = np.array(rng.integers(100), np.int64)
    return arrays | {"b": rng.normal(size=7).astype(dtype)}


def records(arrays: dict[str, Any]) -> RecordDict:
    found = {name: array if isinstance(array, Array) else Array(array) for name, array in arrays.items()}
    return RecordDict({"arrays": ArrayRecord(found)})


def layout_of(arrays: dict[str, Any]) -> StepLayout:
    return StepLayout.of((name, str(array.dtype), array.shape) for name, array in arrays.items())


def fold_of(tasks: Sequence[int], weights: Sequence[float]) -> Fold:
    count = len(tasks)
    return Fold("test", list(tasks), list(weights), list(tasks), [0] * count, [1.0] * count, count)


def flat(arrays: dict[str, Any], layout: StepLayout) -> Any:
    return np.concatenate([arrays[name].astype(np.float64).reshape(-1) for name in layout.shapes])


def floats_of(ledger: Ledger) -> Any:
    return flat(dict(ledger.current.arrays), ledger.layout.steps)


# ---------------------------------------------------------------- one cohort of all kinds


@law
@given(
    st.lists(st.sampled_from(["dense", "half-precision", *CODECS]), min_size=1, max_size=6),
    st.integers(0, 99),
    st.sampled_from([np.float32, np.float64, np.float16]),
    st.booleans(),
    st.sampled_from([Mean(), Mean("current"), Summing(), Summing("current")]),
)
def test_a_cohort_of_all_kinds_folds_as_the_plain_formula_says(
    kinds: list[Any], seed: int, dtype: Any, counted: bool, folder: Any
) -> None:
    rng = np.random.default_rng(seed)
    versions = [model(rng, dtype, counted), {}]
    ledger = Ledger(composed(folder), records(versions[0])["arrays"], "arrays")  # type: ignore[arg-type]
    layout = layout_of(versions[0])
    ledger.receive(0, 0, RecordsUpdate(records(model(rng, dtype, counted))), checked=False)
    ledger.fold(fold_of([0], [0.3]))
    ledger.step(1)
    versions[1] = dict(ledger.current.arrays)

    weights = rng.dirichlet(np.ones(len(kinds)))
    expected = np.zeros(layout.size)
    for task, (kind, weight) in enumerate(zip(kinds, weights, strict=True)):
        version = int(rng.integers(2))
        theirs, base = model(rng, dtype, counted), flat(versions[version], layout)
        if isinstance(kind, str):
            if kind == "half-precision":
                theirs = {name: a.astype(np.float16) if a.dtype.kind == "f" else a for name, a in theirs.items()}
            ledger.receive(task, version, RecordsUpdate(records(theirs)), checked=False)
            after = flat(theirs, layout)
        else:
            frame = encode(kind, (flat(theirs, layout) - base).astype(np.float32), seed=task)
            kept = {name: array for name, array in theirs.items() if array.dtype.kind != "f"}
            step = pack_step(frame, layout, stream=task + 1)
            ledger.receive(task, version, RecordsUpdate(records({STEP: step, **kept})), checked=False)
            after = base + open_frame(frame, size=layout.size).dense()
        against = base if folder.against == "base" else flat(versions[1], layout)
        expected += weight * (after - against)
    before = floats_of(ledger)
    ledger.fold(fold_of(range(len(kinds)), weights.tolist()))
    assert np.isfinite(ledger.step(2))
    tolerance = {np.float16: 2e-2, np.float32: 2e-5, np.float64: 1e-6}[dtype]
    np.testing.assert_allclose(floats_of(ledger) - before, expected, rtol=tolerance, atol=tolerance)
    assert {name: array.dtype for name, array in ledger.current.arrays.items()} == {
        name: array.dtype for name, array in versions[0].items()
    }


def test_folders_that_need_all_and_compensators_get_changes_whole() -> None:
    rng = np.random.default_rng(2)
    start = model(rng, np.float32, False)
    layout = layout_of(start)
    steps = rng.normal(size=(3, layout.size)).astype(np.float32)
    for composition, expected in (
        (composed(Median()), np.median(steps, axis=0)),
        (CA2FL().composition, steps.mean(axis=0)),
    ):
        ledger = Ledger(composition, records(start)["arrays"], "arrays")  # type: ignore[arg-type]
        for task, step in enumerate(steps):
            packed = pack_step(encode(TopK(1.0), step, seed=0), layout, stream=1)
            ledger.receive(task, 0, RecordsUpdate(records({STEP: packed})), checked=True)
        scored = ledger.score([0, 1, 2], [1.0, 1.0, 1.0], 0.0)
        np.testing.assert_allclose(scored.norm, np.linalg.norm(steps, axis=1), rtol=1e-5)
        ledger.fold(fold_of([0, 1, 2], [1 / 3] * 3))
        ledger.step(1)
        np.testing.assert_allclose(floats_of(ledger) - flat(start, layout), expected, rtol=1e-4, atol=1e-5)


def test_more_updates_than_are_mapped_at_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    start = model(rng, np.float32, True)
    ledger = Ledger(FedAvg().composition, records(start)["arrays"], "arrays")  # type: ignore[arg-type]
    count = 2 * MAPPED + 3
    updates = [model(rng, np.float32, True) for _ in range(count)]
    for task, arrays in enumerate(updates):
        ledger.receive(task, 0, stored(tmp_path / str(task), arrays), checked=True)
    together = []

    def add(layout: Any, total: Any, dense: Any) -> None:
        together.append(len(dense))
        add_dense(layout, total, dense)

    with patch("fedpace.strategies.ledger.add_dense", add):
        ledger.fold(fold_of(range(count), [1 / count] * count))
    assert max(together) <= MAPPED and sum(together) == count
    ledger.step(1)
    assert list(tmp_path.iterdir()) == []
    for name in ("w", "b"):
        mean = np.mean([arrays[name] for arrays in updates], axis=0)
        np.testing.assert_allclose(ledger.current.arrays[name], mean, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- bad ones


def bad(layout: StepLayout, good: bytes) -> dict[str, Array]:
    """Steps that are refused, by what is said of them."""

    def step(data: bytes, shape: tuple[int, ...] = (layout.size,)) -> Array:
        return Array("float32", shape, STEP_TYPE, data)

    other = StepLayout({"w": (4, 5), "b": (7,)})
    short = encode(TopK(0.5), np.ones(layout.size - 1, np.float32), seed=0)
    return {
        "other arrays": pack_step(good[10:], other, stream=1),
        "vector of 26": pack_step(short, layout, stream=1),
        "version": step(b"\x09" + good[1:]),
        "flags": step(good[:1] + b"\xf0" + good[2:]),
        "10": step(good[:9]),
        "ends|needed|take": step(good[:-1]),
        "too many": step(good + b"x"),
        "not allowed": pack_step(encode(Half(), np.ones(layout.size, np.float32), seed=0), layout, stream=1),
        "not the one": pack_step(good[10:], layout, stream=1, base=77),
    }


def test_a_bad_step_is_refused_with_its_reason_and_leaves_no_trace() -> None:
    rng = np.random.default_rng(4)
    start = model(rng, np.float32, True)
    layout = layout_of(start)
    step = rng.normal(size=layout.size).astype(np.float32)
    good = pack_step(encode(TopK(0.5), step, seed=0), layout, stream=1)
    counter = {"seen": np.array(5, np.int64)}
    ends = []
    for meets_bad_ones in (False, True):
        ledger = Ledger(FedAvg().composition, records(start)["arrays"], "arrays", codecs=["topk"])  # type: ignore[arg-type]
        ledger.receive(0, 0, RecordsUpdate(records({STEP: good, **counter})), checked=True)
        if meets_bad_ones:
            for number, (reason, array) in enumerate(bad(layout, good.data).items(), 1):
                with pytest.raises(PayloadError, match=reason):
                    ledger.receive(number, 0, RecordsUpdate(records({STEP: array, **counter})), checked=True)
            for arrays, reason in (({STEP: good}, "'seen' is missing"), (counter, "'w' is missing")):
                with pytest.raises(PayloadError, match=reason):
                    ledger.receive(99, 0, RecordsUpdate(records(arrays)), checked=True)
        ledger.fold(fold_of([0], [1.0]))
        ledger.step(1)
        ends.append({name: array.tobytes() for name, array in ledger.current.arrays.items()})
    assert ends[0] == ends[1]


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_whatever_bytes_come_a_step_is_taken_or_refused(data: st.DataObject) -> None:
    """And what was taken can be folded: the model stays finite."""
    rng = np.random.default_rng(5)
    start = model(rng, np.float32, False)
    layout = layout_of(start)
    codec = data.draw(st.sampled_from(CODECS))
    frame = encode(codec, rng.normal(size=layout.size).astype(np.float32), seed=0)
    bytes_ = bytearray(pack_step(frame, layout, stream=1).data)
    for _ in range(data.draw(st.integers(1, 3))):
        bytes_[data.draw(st.integers(0, len(bytes_) - 1))] = data.draw(st.integers(0, 255))
    ledger = Ledger(FedAvg().composition, records(start)["arrays"], "arrays")  # type: ignore[arg-type]
    array = Array("float32", (layout.size,), STEP_TYPE, bytes(bytes_[: data.draw(st.integers(0, len(bytes_)))]))
    try:
        ledger.receive(0, 0, RecordsUpdate(records({STEP: array})), checked=False)
    except PayloadError:
        return
    ledger.fold(fold_of([0], [0.5]))
    if np.isfinite(ledger.step(1)):  # else no version was made of it
        assert np.isfinite(floats_of(ledger)).all()


# ---------------------------------------------------------------- EF21


@dataclass
class Sent:
    task: int
    base: int
    frame: bytes
    whole: Any
    """What the server is to take it for: the copy it was made for, and itself."""


class Device:
    """The device's half: a copy, its name, and what was sent and has no fate yet."""

    def __init__(self, stream: int, layout: StepLayout) -> None:
        self.stream = stream
        self.layout = layout
        self.copy = np.zeros(layout.size, np.float32)
        self.name = 0
        self.open: list[Sent] = []

    def send(self, task: int, step: Any, *, anew: bool = False) -> Array:
        """The difference to the copy as it will be once all that is open is folded."""
        copy, base = (np.zeros_like(self.copy), 0) if anew else (self.copy.copy(), self.name)
        for sent in [] if anew else self.open:
            if sent.base == base or not sent.base:
                copy = copy if sent.base else np.zeros_like(copy)
                open_frame(sent.frame, size=self.layout.size).add_to(copy)
                base = copy_name(sent.base, sent.frame)
        frame = encode(TopK(0.3), step - copy, seed=task)
        open_frame(frame, size=self.layout.size).add_to(copy)
        self.open.append(Sent(task, base, frame, copy))
        return pack_step(frame, self.layout, stream=self.stream, wants_fate=True, base=base)

    def hear(self, sent: Sent, folded: bool) -> None:
        self.open.remove(sent)
        if folded and sent.base in (0, self.name):
            self.copy = self.copy if sent.base else np.zeros_like(self.copy)
            open_frame(sent.frame, size=self.layout.size).add_to(self.copy)
            self.name = copy_name(sent.base, sent.frame)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(["send", "fold", "fold", "discard", "anew", "restart"]), max_size=16), st.data())
def test_copies_of_server_and_device_are_equal_after_every_fate(moves: list[str], data: st.DataObject) -> None:
    """Whatever waits together, and in whatever order it is folded or discarded."""
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    start = {"w": np.zeros((5, 4), np.float32), "b": np.zeros(7, np.float32)}
    layout = layout_of(start)
    ledger = Ledger(FedAvg().composition, records(start)["arrays"], "arrays")  # type: ignore[arg-type]
    devices = [Device(1, layout), Device(2, layout)]
    version = 0
    for task, move in enumerate(["send", *moves]):
        which = data.draw(st.integers(0, 1))
        device = devices[which]
        if move == "restart":
            ledger.discard([sent.task for sent in device.open])
            devices[which] = Device(task + 10, layout)
        elif move in ("send", "anew"):
            step = rng.normal(size=layout.size).astype(np.float32)
            packed = device.send(task, step, anew=move == "anew")
            try:
                stream = ledger.receive(task, version, RecordsUpdate(records({STEP: packed})), checked=True)
            except PayloadError as error:
                assert "begin with zeros" in str(error)
                assert device.open[-1].base != device.name  # what it counts on was folded out of turn, or discarded
                device.hear(device.open[-1], False)
            else:
                assert stream == device.stream
        elif device.open:
            sent = device.open[data.draw(st.integers(0, len(device.open) - 1))]
            in_turn = sent is device.open[0] and sent.base in (0, device.name)
            if move == "discard":
                ledger.discard([sent.task])
            else:
                before = floats_of(ledger)
                ledger.fold(fold_of([sent.task], [1.0]))
                version += 1
                ledger.step(version)
                if in_turn:
                    np.testing.assert_allclose(floats_of(ledger) - before, sent.whole, rtol=1e-4, atol=1e-4)
            device.hear(sent, move == "fold")
            held = ledger._waiting.copies.of(device.stream)
            np.testing.assert_array_equal(device.copy, np.zeros_like(device.copy) if held is None else held)


def test_updates_of_one_stream_that_are_folded_together_each_count_for_what_they_were() -> None:
    start = {"w": np.zeros(40, np.float32)}
    layout = layout_of(start)
    rng = np.random.default_rng(6)
    ledger = Ledger(FedAvg().composition, records(start)["arrays"], "arrays")  # type: ignore[arg-type]
    device = Device(1, layout)
    for task in range(3):
        packed = device.send(task, rng.normal(size=40).astype(np.float32))
        ledger.receive(task, 0, RecordsUpdate(records({STEP: packed})), checked=True)
    scored = ledger.score([0, 1, 2], [1.0, 1.0, 1.0], 0.0)
    np.testing.assert_allclose(scored.norm, [np.linalg.norm(sent.whole) for sent in device.open], rtol=1e-5)
    ledger.fold(fold_of([0, 1, 2], [0.5, 0.3, 0.2]))
    ledger.step(1)
    expected = sum(weight * sent.whole for weight, sent in zip([0.5, 0.3, 0.2], device.open, strict=True))
    np.testing.assert_allclose(floats_of(ledger), expected, rtol=1e-4, atol=1e-5)


def test_copies_are_bounded_and_whoever_lost_one_begins_anew() -> None:
    start = {"w": np.zeros(8, np.float32)}
    layout = layout_of(start)
    with patch("fedpace.strategies.waiting.COPIES_BYTES", 64):
        ledger = Ledger(FedAvg().composition, records(start)["arrays"], "arrays")  # type: ignore[arg-type]
    devices = [Device(stream, layout) for stream in (1, 2, 3)]
    ones = np.ones(8, np.float32)

    def receive(task: int, device: Device) -> None:
        ledger.receive(task, 0, RecordsUpdate(records({STEP: device.send(task, ones)})), checked=True)

    for task, device in enumerate(devices):
        receive(task, device)
        ledger.fold(fold_of([task], [1.0]))
        device.hear(device.open[0], True)
        assert ledger._waiting.copies.nbytes <= 64
    with pytest.raises(PayloadError, match="begin with zeros"):
        receive(10, devices[0])
    for task, device in enumerate(devices[1:], 11):
        receive(task, device)
    with pytest.raises(PayloadError, match="no room for one more copy"):
        receive(13, Device(4, layout))
    ledger.discard([11])
    receive(13, Device(4, layout))


# ---------------------------------------------------------------- memory

NUMBERS = 1 << 20


def stored(directory: Path, arrays: dict[str, Any]) -> UpdateHandle:
    return StoredUpdate(directory, to_payload(records(arrays), BlobStore(directory).put))


@pytest.mark.parametrize("kind", ["dense", TopK(0.01), TopK(0.01) >> Quantise(bits=4), Quantise(), Half()], ids=str)
def test_folding_takes_the_memory_of_one_model_however_many_updates(tmp_path: Path, kind: Any) -> None:
    """Memory that Python and numpy take; files that are mapped are none of it. What `fold_bytes` says is right."""
    layout = StepLayout({"w": (NUMBERS,)})
    start = {"w": np.zeros(NUMBERS, np.float32)}
    ledger = Ledger(FedAvg().composition, records(start)["arrays"], "arrays")  # type: ignore[arg-type]
    count = 12
    step = np.random.default_rng(0).normal(size=NUMBERS).astype(np.float32)
    packed = {} if kind == "dense" else {STEP: pack_step(encode(kind, step, seed=0), layout, stream=1)}
    updates = [stored(tmp_path / str(task), packed or {"w": step}) for task in range(count)]
    del packed
    tracemalloc.start()
    try:
        for task, update in enumerate(updates):
            ledger.receive(task, 0, update, checked=False)
        ledger.fold(fold_of(range(count), [1 / count] * count))
        ledger.step(1)
        record = ledger.current.record
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    said = ledger.fold_bytes(count)
    assert said == step.nbytes
    assert said <= peak < 1.6 * said
    np.testing.assert_allclose(record["w"].numpy()[:9], ledger.current.arrays["w"][:9])


@dataclass(frozen=True)
class Remembering:
    """An optimiser that looks back: it moves by the change before as well."""

    def step(self, change: Vector, memory: dict[str, Any], step: int) -> Vector:
        memory["before"], memory["now"] = memory.get("now", np.zeros_like(change)), change
        return change


def test_a_change_that_an_optimiser_remembers_stays_as_it_was() -> None:
    start = {"w": np.full(NUMBERS, 1, np.float32)}
    composition = dataclasses.replace(FedAvg().composition, optimiser=Remembering())
    ledger = Ledger(composition, records(start)["arrays"], "arrays")  # type: ignore[arg-type]
    for version in range(2):
        theirs = {"w": np.full(NUMBERS, 3 * version + 2, np.float32)}
        ledger.receive(version, version, RecordsUpdate(records(theirs)), checked=True)
        ledger.fold(fold_of([version], [1.0]))
        ledger.step(version + 1)
        assert ledger.current.arrays["w"][-1] == 3 * version + 2
    memory = ledger._optimiser_memory
    assert (memory["before"] == 1).all() and (memory["now"] == 3).all() and (start["w"] == 1).all()


def test_folders_that_need_all_are_charged_for_all(tmp_path: Path) -> None:
    start = {"w": np.zeros(1 << 16, np.float32)}
    for folder, updates, vectors in ((Summing(), 8, 2), (Median(), 8, 10)):
        ledger = Ledger(composed(folder), records(start)["arrays"], "arrays")  # type: ignore[arg-type]
        assert ledger.fold_bytes(updates) == vectors * start["w"].nbytes
        for task in range(updates):
            ledger.receive(task, 0, stored(tmp_path / str(task), start), checked=True)
        tracemalloc.start()
        try:
            ledger.fold(fold_of(range(updates), [1 / updates] * updates))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak > 0.9 * ledger.fold_bytes(updates)
