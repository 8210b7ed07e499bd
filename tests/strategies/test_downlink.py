"""The server's steps in few bytes: replicas hold the server's model bit for bit, whoever took part when."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedpace.clients.mods import compress, replica
from fedpace.errors import ConfigError, PayloadError
from fedpace.protocol.codecs import TopK, encode, parse_codec
from fedpace.protocol.downlink import STEPS, VERSION, pack_steps, read_steps
from fedpace.protocol.encoded import StepLayout
from fedpace.strategies import FedAvg, FedBuff
from fedpace.strategies.presets import Preset
from tests.inline_grid import InlineGrid

Arrays = dict[str, NDArray[Any]]
CODECS = ("quantise(8)", "quantise(4)", "topk(0.1) >> half(float16)", "sign", "randomk(0.3)", "lowrank(2)")


def make_model(dtype: str) -> ArrayRecord:
    rng = np.random.default_rng(0)
    arrays: Arrays = {
        "weight": rng.standard_normal((50, 4)).astype(dtype),
        "counter": np.array([3, 7], np.int64),
        "bias": rng.standard_normal(5).astype(np.float32),
    }
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


def numbers(record: ArrayRecord) -> Arrays:
    return {name: array.numpy() for name, array in record.items()}


class Seen:
    """An app that notes which model it was given, by the version that its message has, and moves it a little."""

    def __init__(self, *mods: Any) -> None:
        self.models: list[tuple[int, Arrays]] = []
        self.app = ClientApp(mods=[replica, *mods])
        self.app.train()(self.train)
        self.app.evaluate()(self.evaluate)

    def train(self, message: Message, context: Context) -> Message:
        arrays = self.note(message)
        rng = np.random.default_rng([message.metadata.dst_node_id, len(self.models)])
        for array in arrays.values():
            array += rng.normal(0.3, 1.0, array.shape).astype(array.dtype)
        record = ArrayRecord({name: Array(array) for name, array in arrays.items()})
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message)

    def evaluate(self, message: Message, context: Context) -> Message:
        self.note(message)
        metrics = MetricRecord({"num-examples": 1, "accuracy": 0.5})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    def note(self, message: Message) -> Arrays:
        version = message.content.config_records["config"][VERSION]
        assert isinstance(version, int)
        self.models.append((version, numbers(message.content.array_records["arrays"])))
        return numbers(message.content.array_records["arrays"])


def watched(strategy: Preset) -> dict[int, Arrays]:
    """The versions that a strategy makes after version 0, once it has run."""
    versions: dict[int, Arrays] = {}

    def report(number: int, arrays: ArrayRecord, folded: int, metrics: MetricRecord) -> None:
        versions[len(versions)] = numbers(arrays)
        assert VERSION not in metrics

    strategy.report_version = report  # type: ignore[method-assign,assignment]
    return versions


def check_equal(found: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]]) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        assert found[name].tobytes() == array.tobytes(), name


def sent_steps(grid: InlineGrid) -> list[bool]:
    return [STEPS in message.content.array_records["arrays"] for message in grid.sent]


class Forgetful(InlineGrid):
    """Now and then a device loses its state."""

    def __init__(self, app: ClientApp, nodes: int, share: float) -> None:
        super().__init__(app, nodes)
        self._share, self._rng = share, np.random.default_rng(5)

    def context(self, node_id: int) -> Context:
        context = super().context(node_id)
        if self._rng.random() < self._share:
            context.state.clear()
        return context


@settings(max_examples=25, deadline=None)
@given(
    codec=st.sampled_from(CODECS),
    dtype=st.sampled_from(["float32", "float64", "float16"]),
    make=st.sampled_from([FedAvg, FedBuff]),
    fraction=st.sampled_from([0.3, 1.0]),
    forgets=st.sampled_from([0.0, 0.3]),
    compressed=st.booleans(),
)
def test_every_device_is_given_the_servers_own_bits(
    codec: str, dtype: str, make: Callable[..., Preset], fraction: float, forgets: float, compressed: bool
) -> None:
    seen = Seen(*([compress(TopK(0.2))] if compressed else []))
    grid = Forgetful(seen.app, 6, forgets)
    strategy = make(downlink=codec, fraction_train=fraction, fraction_evaluate=0.5, seed=4)
    versions = watched(strategy)
    initial = make_model(dtype)
    versions[0] = numbers(initial)
    strategy.start(grid=grid, initial_arrays=initial, num_rounds=7)
    assert len(versions) > (2 if forgets else 7)
    for version, arrays in seen.models:
        check_equal(arrays, versions[version])
    if not forgets and fraction == 1.0:
        assert any(sent_steps(grid))


def test_devices_without_the_mod_get_the_whole_model() -> None:
    seen = Seen()
    seen.app = ClientApp()
    seen.app.train()(seen.train)
    grid = InlineGrid(seen.app, 3)
    FedAvg(downlink="quantise(8)", fraction_evaluate=0.0).start(
        grid=grid, initial_arrays=make_model("float32"), num_rounds=3
    )
    assert len(grid.sent) == 9 and not any(sent_steps(grid))


def test_steps_cost_what_they_say() -> None:
    """Eight bits a number and one scale a chunk: a quarter of float32, once the whole model is there."""
    seen = Seen()
    grid = InlineGrid(seen.app, 2)
    model = ArrayRecord({"weight": Array(np.zeros((1000, 100), np.float32))})
    strategy = FedAvg(downlink="quantise(8)", fraction_evaluate=0.0)
    strategy.start(grid=grid, initial_arrays=model, num_rounds=4)
    sizes = [sum(len(array.data) for array in m.content.array_records["arrays"].values()) for m in grid.sent]
    assert sent_steps(grid) == [False] * 2 + [True] * 6
    assert max(sizes[2:]) < 0.27 * min(sizes[:2])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda state: state.clear(), "holds no version of the model"),
        (lambda state: state["fedpace.replica-version"].update(version=9), "this device holds version 9"),
        (
            lambda state: state["fedpace.replica"].update(bias=Array(np.zeros(5, np.float32))),
            "what this device held as version 1 was not that",
        ),
        (
            lambda state: state["fedpace.replica"].update(bias=Array(np.zeros(6, np.float32))),
            "are steps of a model with other arrays",
        ),
    ],
)
def test_a_device_that_holds_something_else_says_so_and_is_sent_all(
    damage: Callable[[RecordDict], None], reason: str
) -> None:
    seen = Seen()
    failures: list[str] = []

    class Damaging(InlineGrid):
        def push_messages(self, messages: Any) -> Any:
            messages = list(messages)
            if len(self.sent) == 4:
                damage(super().context(100).state)
            ids = super().push_messages(messages)
            failures.extend(str(reply.error.reason) for reply in self._replies.values() if reply.has_error())
            return ids

    grid = Damaging(seen.app, 2)
    FedAvg(downlink="quantise(8)", fraction_evaluate=0.0).start(
        grid=grid, initial_arrays=make_model("float32"), num_rounds=4
    )
    assert len(set(failures)) == 1 and reason in failures[0]
    assert sent_steps(grid) == [False, False, True, True, True, True, False, True]


def test_a_codec_that_never_sends_what_it_drops_is_refused() -> None:
    with pytest.raises(ConfigError, match="zip"):
        FedAvg(downlink="zip(9)")
    with pytest.raises(ConfigError, match="no floating-point arrays"):
        FedAvg(downlink="quantise(8)").start(
            grid=InlineGrid(Seen().app), initial_arrays=ArrayRecord({"n": Array(np.array([1]))}), num_rounds=1
        )


def packed() -> tuple[bytes, StepLayout]:
    layout = StepLayout({"weight": (4, 5), "bias": (3,)})
    rng = np.random.default_rng(1)
    codec = parse_codec("topk(0.3) >> quantise(4)")
    frames = [encode(codec, rng.standard_normal(23).astype(np.float32), seed=seed) for seed in range(3)]
    return pack_steps(frames, layout, first=5, digest=1234).data, layout


def test_steps_are_read_as_they_were_packed() -> None:
    data, layout = packed()
    steps = read_steps(data, layout)
    assert (steps.first, steps.last, steps.digest, len(steps.frames)) == (5, 8, 1234, 3)


@pytest.mark.slow
def test_damaged_steps_are_refused() -> None:
    data, layout = packed()
    rng, refused = np.random.default_rng(2), 0
    for _ in range(20_000):
        damaged = bytearray(data)
        for place in rng.integers(len(data), size=rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
        try:
            read_steps(bytes(damaged[: rng.integers(len(data) + 1)] if rng.random() < 0.3 else damaged), layout)
        except PayloadError:
            refused += 1
    assert refused > 5_000
