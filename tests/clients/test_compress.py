"""The `compress` mod: what it does to a reply and to a device's state, and that replies become arrays again."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, Metadata, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import strategy as flowers

from fedpace.clients.mods import compress, measure
from fedpace.errors import ConfigError
from fedpace.hosting.app import load_app_folder
from fedpace.hosting.flower import become, load_client_app, make_context, make_request
from fedpace.hosting.settings import ServerSettings, read_settings
from fedpace.protocol.codecs import QSGD, LowRank, TopK
from fedpace.protocol.decoding import decode_steps, decoded, sent_records
from fedpace.protocol.encoded import CODEC, FATES, STEP, STEP_TYPE
from fedpace.protocol.polled import paced
from fedpace.strategies import FedAvg, FedBuff
from fedpace.strategies.planners import CodecByBandwidth
from tests.inline_grid import RUN_ID, InlineGrid, copied

APP = Path(__file__).parents[1] / "flower" / "compressed"
EXACT = TopK(1.0)
Arrays = dict[str, np.ndarray[Any, Any]]


def record(arrays: Arrays) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def request(content: RecordDict, kind: str = "train", number: int = 1) -> Message:
    become(RUN_ID, 1)
    metadata = Metadata(RUN_ID, str(number), 1, 7, "", "", 1000.0 + number, 60.0, kind)
    return make_request(metadata, copied(content))


def fresh() -> Context:
    return make_context(RUN_ID, 7, {}, {}, RecordDict())


def answers(content: dict[str, Any]) -> Callable[[Message, Context], Message]:
    return lambda message, context: Message(RecordDict(content), reply_to=message)


def reply_of(
    mod: Any, before: Arrays, after: Arrays, context: Context | None = None, config: dict[str, Any] | None = None
) -> Message:
    content = RecordDict({"arrays": record(before), "config": ConfigRecord(config or {})})
    found: Message = mod(request(content), context or fresh(), answers({"arrays": record(after)}))
    return found


def plain(reply: Message, before: Arrays) -> Arrays:
    content = copied(reply.content)
    decode_steps(content, sent_records(RecordDict({"arrays": record(before)})))
    return {name: array.numpy() for name, array in content.array_records["arrays"].items()}


# ---------------------------------------------------------------- what is compressed


def test_every_kind_of_array_comes_back_as_it_went() -> None:
    generator = np.random.default_rng(0)
    before: Arrays = {
        "half": generator.normal(size=(3, 4)).astype(np.float16),
        "steps": np.arange(4),
        "single": generator.normal(size=5).astype(np.float32),
        "swapped": generator.normal(size=(2, 2)).astype(">f4"),
        "scalar": np.array(3.0, np.float32),
        "none": np.zeros((0, 3), np.float32),
        "double": generator.normal(size=(2, 3, 2)),
        "turned": np.asfortranarray(generator.normal(size=(3, 5)).astype(np.float32)),
        "complex": generator.normal(size=2) + 1j,
        "flags": np.array([True, False]),
    }
    after = {
        name: ~array if array.dtype == bool else (np.asarray(array) + np.ones_like(array)).astype(array.dtype)
        for name, array in ((name, np.asarray(array)) for name, array in before.items())
    }
    reply = reply_of(compress(EXACT), before, after)
    assert list(reply.content.array_records["arrays"]) == [STEP, "steps", "complex", "flags"]
    step = reply.content.array_records["arrays"][STEP]
    assert (step.dtype, step.shape, step.stype) == ("float32", (12 + 5 + 4 + 1 + 12 + 15,), STEP_TYPE)
    found = plain(reply, before)
    assert list(found) == list(before)
    for name, array in after.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        np.testing.assert_allclose(found[name], array, rtol=2e-3 if name == "half" else 1e-6)


def test_it_is_small() -> None:
    before = {"w": np.zeros(5000, np.float32)}
    after = {"w": np.random.default_rng(0).normal(size=5000).astype(np.float32)}
    step = reply_of(compress("topk(0.01) >> quantise(4)"), before, after).content.array_records["arrays"][STEP]
    assert len(step.data) < 150 < 20_000 / 100


def test_other_records_and_other_messages_pass() -> None:
    before, after = {"w": np.zeros(3, np.float32)}, {"w": np.ones(3, np.float32)}
    extra, metrics = record({"c": np.ones(3, np.float32)}), MetricRecord({"num-examples": 3})
    content = RecordDict({"arrays": record(before), "control": extra, "config": ConfigRecord()})
    app = answers({"control": extra, "arrays": record(after), "metrics": metrics})
    reply = compress(EXACT)(request(content), fresh(), app)
    assert reply.content["control"] == extra and reply.content["metrics"] == metrics
    assert list(reply.content.array_records["arrays"]) == [STEP]
    for kind in ("evaluate", "query"):
        context = fresh()
        reply = compress(EXACT)(request(content, kind), context, app)
        assert list(reply.content.array_records["arrays"]) == ["w"] and not context.state
    no_model = RecordDict({"config": ConfigRecord()})
    assert compress(EXACT)(request(no_model), fresh(), answers({"metrics": metrics})).content["metrics"] == metrics


def test_an_error_passes_and_changes_nothing() -> None:
    context = fresh()
    content = RecordDict({"arrays": record({"w": np.zeros(3, np.float32)})})
    reply = compress(EXACT)(request(content), context, lambda m, _: Message(Error(2, "broken"), reply_to=m))
    assert reply.has_error() and not context.state


def test_flowers_legacy_records_have_another_name_on_the_way_back() -> None:
    def parameters(arrays: Arrays) -> ArrayRecord:
        plain = record(arrays)
        return ArrayRecord({name: Array("", (), array.stype, array.data) for name, array in plain.items()})

    before, after = {"0": np.zeros((2, 3), np.float32)}, {"0": np.ones((2, 3), np.float32)}
    content = RecordDict({"fitins.parameters": parameters(before), "fitins.config": ConfigRecord()})
    app = answers({"fitres.parameters": parameters(after)})
    reply = copied(compress(EXACT)(request(content), fresh(), app).content)
    assert list(reply.array_records["fitres.parameters"]) == [STEP]
    decode_steps(reply, sent_records(content))
    assert reply.array_records["fitres.parameters"] == parameters(after)


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ({}, r"array 'w' of the model was float32\[3\], and is missing in the reply"),
        ({"w": np.ones(2, np.float32)}, r"was float32\[3\], and is float32\[2\] in the reply"),
        ({"w": np.ones(3, np.int64)}, r"was float32\[3\], and is int64\[3\] in the reply"),
        ({"w": np.array([1, np.nan, 1], np.float32)}, "array 'w' is not finite after training"),
        ({"w": np.array([1, 1e300, 1])}, "array 'w' is not finite after training, or changed beyond float32"),
    ],
)
def test_a_reply_without_the_model_is_refused_and_the_state_stays(after: Arrays, message: str) -> None:
    context = fresh()
    with pytest.raises(ConfigError, match=message):
        reply_of(compress(EXACT), {"w": np.zeros(3, np.float32)}, after, context)
    assert not context.state


def test_which_record_is_the_model_must_be_clear() -> None:
    arrays = record({"w": np.zeros(3, np.float32)})
    content = RecordDict({"one": arrays, "two": arrays})
    with pytest.raises(ConfigError, match="which array record is the model"):
        compress(EXACT)(request(content), fresh(), answers({}))
    with pytest.raises(ConfigError, match="no array record 'one', in which the model came, but 'two'"):
        compress(EXACT)(request(RecordDict({"one": arrays})), fresh(), answers({"two": arrays}))


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"codec": "topkk(1)"}, "is no codec"),
        ({"error_feedback": "ef"}, "error_feedback is 'ef'"),
        ({"momentum": 1.0}, "momentum is 1.0"),
        ({"decay": 0.0}, "decay is 0.0"),
        ({"error_feedback": False, "momentum": 0.5}, "momentum is a variant of error feedback"),
        ({"error_feedback": "ef21", "decay": 0.5}, "decay is for the residual"),
        ({"error_feedback": "ef21", "codec": QSGD(1)}, "contractive codecs only"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compress(**{"codec": TopK(0.1), **settings})


def test_the_strategy_may_choose_the_codec() -> None:
    before, after = {"w": np.zeros(4, np.float32)}, {"w": np.arange(4, dtype=np.float32)}
    context = fresh()
    reply = reply_of(compress(TopK(0.25)), before, after, context, {CODEC: "topk(0.5)"})
    assert plain(reply, before)["w"].tolist() == [0, 0, 2, 3]
    reply = reply_of(compress(TopK(0.25)), before, {"w": np.zeros(4, np.float32)}, context)
    assert plain(reply, before)["w"].tolist() == [0, 1, 0, 0], "what the other codec left goes along"
    with pytest.raises(ConfigError, match="'nonsense' is no codec"):
        reply_of(compress(TopK(0.25)), before, after, context, {CODEC: "nonsense"})
    with pytest.raises(ConfigError, match="contractive codecs only"):
        reply_of(compress(TopK(0.25), error_feedback="ef21"), before, after, None, {CODEC: "qsgd(1)", FATES: 1.0})


def test_ef21_is_for_strategies_that_tell_fates() -> None:
    before, after = {"w": np.zeros(4, np.float32)}, {"w": np.ones(4, np.float32)}
    with pytest.raises(ConfigError, match="this strategy does not tell"):
        reply_of(compress(TopK(0.5), error_feedback="ef21"), before, after)


def test_without_feedback_nothing_is_kept_but_what_the_codec_keeps() -> None:
    before, after = {"w": np.zeros((4, 4), np.float32)}, {"w": np.outer(np.arange(4), np.ones(4)).astype(np.float32)}
    context = fresh()
    reply_of(compress(TopK(0.1), error_feedback=False), before, after, context)
    assert not context.state
    for _ in range(2):
        reply = reply_of(compress(LowRank(1), error_feedback=False), before, after, context)
    np.testing.assert_allclose(plain(reply, before)["w"], after["w"], atol=1e-4)
    assert "kept" not in context.state.array_records["fedpace.feedback"]


def test_another_model_begins_with_another_residual() -> None:
    context = fresh()
    zeros, ones = np.zeros(4, np.float32), np.ones(4, np.float32)
    reply_of(compress(TopK(0.25)), {"w": zeros}, {"w": ones}, context)
    first = context.state.config_records["fedpace.feedback.facts"]["stream"]
    reply = reply_of(compress(TopK(1.0)), {"v": zeros}, {"v": zeros}, context)
    assert plain(reply, {"v": zeros})["v"].tolist() == [0] * 4
    assert first != 0


def test_feedback_that_grows_without_end_says_so() -> None:
    before, context = {"w": np.zeros(64, np.float32)}, fresh()
    after = {"w": np.random.default_rng(0).normal(size=64).astype(np.float32)}
    mod = compress("randomk(0.1, scaled=true)")
    content = RecordDict({"arrays": record(before), "config": ConfigRecord()})
    with pytest.raises(ConfigError, match=r"error feedback settles with contractive codecs, and randomk.* is none"):
        for number in range(500):
            mod(request(content, number=number), context, answers({"arrays": record(after)}))


def test_the_same_task_makes_the_same_bytes() -> None:
    """But for the stream's name, which is drawn."""
    before = {"w": np.zeros(500, np.float32)}
    after = {"w": np.random.default_rng(0).normal(size=500).astype(np.float32)}
    mod = compress("randomk(0.1) >> quantise(4, rounding=stochastic)")
    one, two = (reply_of(mod, before, after).content.array_records["arrays"][STEP].data for _ in range(2))
    assert (one[:6], one[10:]) == (two[:6], two[10:])


def test_without_torch() -> None:
    code = (
        "import sys; from fedpace.clients.mods.compress import compress; "
        "from fedpace.protocol.codecs import TopK; compress(TopK(0.1)); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---------------------------------------------------------------- with strategies


def compressed_app() -> ClientApp:
    return load_client_app(load_app_folder(APP))


def app_with(*mods: Any) -> ClientApp:
    """The same work behind other mods."""
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrays = message.content.array_records["arrays"]
        before = arrays["w"].numpy()
        point = np.random.default_rng(context.node_id % 1000).normal(size=before.shape)
        after = {"w": (before + 0.2 * (point - before)).astype(np.float32), "count": arrays["count"].numpy() + 1}
        time.sleep(0.001)
        content: dict[str, Any] = {"arrays": record(after), "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)

    return app


def model() -> ArrayRecord:
    return record({"w": np.zeros((20, 5), np.float32), "count": np.zeros((), np.int64)})


def middle(nodes: int) -> np.ndarray[Any, Any]:
    """Where the devices of an `InlineGrid` want the model to be, on average."""
    points = [np.random.default_rng(node % 1000).normal(size=(20, 5)) for node in range(100, 100 + nodes)]
    found: np.ndarray[Any, Any] = np.mean(points, axis=0)
    return found


def distance(arrays: ArrayRecord, nodes: int) -> float:
    return float(np.linalg.norm(arrays["w"].numpy() - middle(nodes)) / np.linalg.norm(middle(nodes)))


@pytest.mark.parametrize("grid_of", [decoded, paced], ids=["decoded", "paced"])
def test_flowers_own_strategy_sees_plain_arrays(grid_of: Callable[[Any], Any]) -> None:
    grid = InlineGrid(compressed_app(), nodes=4, broken=[3])
    strategy = flowers.FedAvg(fraction_evaluate=0.0)
    result = strategy.start(grid=grid_of(grid), initial_arrays=model(), num_rounds=60)
    assert distance(result.arrays, 3) < 0.2
    assert round(float(result.arrays["count"].numpy())) == 60


def test_without_decoding_flowers_own_strategy_does_not() -> None:
    grid = InlineGrid(compressed_app(), nodes=2)
    with pytest.raises(TypeError, match=r"fedpace\.step"):
        flowers.FedAvg(fraction_evaluate=0.0).start(grid=grid, initial_arrays=model(), num_rounds=1)


@pytest.mark.parametrize("strategy", [FedAvg(fraction_evaluate=0.0), FedBuff(2)], ids=["rounds", "buffer"])
@pytest.mark.parametrize("feedback", [True, "ef21"])
def test_our_strategies_fold_steps_as_they_come(strategy: Any, feedback: Any) -> None:
    """And tell each device in its next task what became of its last update."""
    grid = InlineGrid(app_with(measure, compress("topk(0.25) >> quantise(8)", error_feedback=feedback)), nodes=3)
    rounds = 60 if isinstance(strategy, FedAvg) else 120
    result = strategy.start(grid=grid, initial_arrays=model(), num_rounds=rounds)
    assert distance(result.arrays, 3) < 0.4
    told = [m.content.config_records["config"] for m in grid.sent if m.metadata.dst_node_id == 101]
    assert "fedpace.folded" not in told[0]
    heard = [config for config in told if config.get("fedpace.folded")]
    assert len(heard) > len(told) / 3
    assert all(1 <= len(str(config["fedpace.folded"]).split()) <= 3 for config in heard)
    facts: Any = grid.context(101).state.config_records["fedpace.feedback.facts"]
    assert len(facts["ids"]) <= 3


def test_a_codec_for_each_device_by_its_bandwidth() -> None:
    grid = InlineGrid(app_with(measure, compress("topk(0.25)")), nodes=2)
    strategy = FedAvg(fraction_evaluate=0.0, planner=CodecByBandwidth({0.0: "topk(0.5)"}))
    strategy.start(grid=grid, initial_arrays=model(), num_rounds=8)
    told = [message.content.config_records["config"].get("fedpace.codec") for message in grid.sent]
    assert told[0] is None and told[-1] == "topk(0.5)"
    assert grid.context(100).state.config_records["fedpace.feedback.facts"]["codec"] == "topk(0.5)"


def test_what_the_page_shows_runs() -> None:
    page = (APP.parents[2] / "docs" / "compression.md").read_text(encoding="utf-8")
    shown: dict[str, Any] = {"grid": InlineGrid(compressed_app(), nodes=2), "arrays": model()}
    blocks = [textwrap.dedent(code) for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL)]
    strategies: list[type] = []
    for number, code in enumerate(blocks, 1):
        exec(compile(code, f"compression.md, block {number}", "exec"), shown)  # noqa: S102
        strategies.append(type(shown.get("strategy")))
    assert isinstance(shown["app"], ClientApp) and strategies[-2:] == [FedBuff, FedAvg]
    [settings] = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    found = read_settings(ServerSettings, tomllib.loads(textwrap.dedent(settings))["tool"]["fedpace"], "server")
    assert found.codecs == ("topk", "quantise", "lowrank(4)")
