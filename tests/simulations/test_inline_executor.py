from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from fedpace.errors import AppError
from fedpace.hosting.flower import become
from fedpace.simulations.executors.inline import InlineExecutor
from fedpace.simulations.work import Answer, Content
from tests.simulations.batches import (
    APPS,
    CONDUCT,
    DEVICES,
    RUN_CONFIG,
    RUN_ID,
    computation,
    content,
    outcomes,
)


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch) -> Iterator[InlineExecutor]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    executor = InlineExecutor(CONDUCT, RUN_ID, DEVICES, RUN_CONFIG)
    yield executor
    executor.close()


def one(executor: InlineExecutor, *arguments: Any, **options: Any) -> Answer:
    (answer,) = executor.run([computation(*arguments, **options)])
    return answer


# ---------------------------------------------------------------- what an app is given


def test_an_app_is_told_what_a_real_device_would_tell_it(executor: InlineExecutor) -> None:
    answer = one(executor, content(2, lr=0.1, kept=[1, 2]), "tell", task=9, lr=0.2, extra=b"x")
    assert answer.update is not None
    node_id = (1 << 62) + 4
    assert dict(answer.update.content().config_records["told"]) == {
        "node": node_id,
        "run": RUN_ID,
        "of-message": [RUN_ID, 1, node_id],
        "texts": ["9", "3", "train", ""],
        "times": [12.5, 600.0],
        "node-config.partition-id": 4,
        "node-config.num-partitions": DEVICES,
        **{f"run-config.{key}": value for key, value in RUN_CONFIG.items()},
        "config.lr": 0.2,
        "config.kept": [1, 2],
        "config.do": "tell",
        "config.extra": b"x",
        "records": ["arrays", "config"],
    }


def test_a_config_record_is_made_where_there_is_none(executor: InlineExecutor) -> None:
    sent = Content(RecordDict({"arrays": ArrayRecord()}))
    answer = one(executor, sent, "tell")
    assert answer.update is not None
    assert answer.update.content().config_records["told"]["records"] == ["arrays", "config"]


def test_what_an_app_writes_into_its_message_and_state_is_its_own(executor: InlineExecutor) -> None:
    sent, state = content(3, list=[1.0]), RecordDict({"mine": MetricRecord({"n": 0})})
    for _ in range(2):
        answer = one(executor, sent, "scribble", state=state)
        assert answer.metrics == {"found": [3.0, 1.0]}
        assert answer.state == RecordDict({"mine": MetricRecord({"n": 1})})
    assert sent.records.array_records["arrays"]["array-0"].numpy().tolist() == [1.0] * 3
    assert sent.records["config"] == ConfigRecord({"list": [1.0]})
    assert state == RecordDict({"mine": MetricRecord({"n": 0})})
    again = one(executor, sent, "tell")
    assert again.update is not None
    told = again.update.content().config_records["told"]
    assert told["node-config.partition-id"] == 4 and "run-config.new" not in told


def test_draws_depend_on_the_seed_alone(executor: InlineExecutor) -> None:
    sent = content()
    draws = [
        answer.metrics["draws"]
        for answer in executor.run([computation(sent, "draw", seed=seed, task=seed) for seed in (1, 2, 1)])
    ]
    assert draws[0] == draws[2] != draws[1]
    assert one(executor, sent, "draw", seed=1).metrics["draws"] == draws[0]


def test_the_process_is_afterwards_what_it_was(executor: InlineExecutor) -> None:
    become(5, 6)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    threads = torch.get_num_threads()
    expected = random.random(), np.random.random(), torch.rand(()).item()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    executor.run([computation(content(), do, seed=3) for do in ("draw", "late", "fail")])
    assert (random.random(), np.random.random(), torch.rand(()).item()) == expected
    assert torch.get_num_threads() == threads
    assert (TaskIdentity.run_id, TaskIdentity.node_id) == (5, 6)


def test_one_thread_of_torch_works_meanwhile(executor: InlineExecutor) -> None:
    assert one(executor, content(), "late").metrics["draws"][1] == 1


def test_the_task_clock_stands_still(executor: InlineExecutor) -> None:
    answer = one(executor, content(8), message_type="train.measured")
    assert answer.metrics["compute-seconds"] == 0.0 and answer.metrics["bytes-in"] > 32


# ---------------------------------------------------------------- what comes back


def test_an_update_shows_the_arrays_of_the_reply_without_a_copy(executor: InlineExecutor) -> None:
    answer = one(executor, content(3, 2), "add", device=6)
    update = answer.update
    assert update is not None and (answer.code, answer.reason, answer.state) == (0, "", None)
    arrays = update.arrays("arrays")
    assert {name: array.tolist() for name, array in arrays.items()} == {"array-0": [7.0] * 3, "array-1": [7.0] * 2}
    assert all(np.shares_memory(array, update.arrays()[name]) for name, array in arrays.items())
    assert not any(array.flags.writeable or array.flags.owndata for array in arrays.values())
    assert update.arrays("other") == {} and update.nbytes > 20
    assert update.content().array_records["arrays"]["array-0"].numpy().tolist() == [7.0] * 3
    update.release()
    assert (dict(update.arrays()), dict(update.content())) == ({}, {})
    assert arrays["array-0"].tolist() == [7.0] * 3, "views that are still held stay readable"


@pytest.mark.parametrize(
    ("do", "code", "reason"),
    [
        ("fail", 2, "ValueError: no good"),
        ("leave", 2, "SystemExit: 3"),
        ("text", 2, "the ClientApp returned a str, not a Message"),
        ("refuse", 42, "too tired"),
        ("odd", 2, "the value of 'a' is a object, which no Flower record holds"),
        ("spoil", 2, "the ClientApp left a reply or a state that cannot be read: AttributeError: 'int' object"),
        ("infinite", 4, "rejected: array 'array-0' of record 'arrays' holds NaN or infinite numbers"),
        ("reshape", 4, "rejected: array 'array-0' of record 'arrays' is float32[3, 1], but float32[3] was sent out"),
    ],
)
def test_a_failure_has_a_code_and_a_reason(executor: InlineExecutor, do: str, code: int, reason: str) -> None:
    failed, good = executor.run([computation(content(3), do), computation(content(3), "add")])
    assert failed.update is None and failed.code == code and failed.reason.startswith(reason), failed.reason
    assert good.update is not None


def test_a_message_that_is_none_fails(executor: InlineExecutor) -> None:
    assert one(executor, content(), "add", message_type="dance").code == 3
    answer = one(executor, content(), "add", bad=np.float32(1))
    assert (answer.code, answer.update) == (3, None)
    assert "the value of 'bad' is a float32, which no Flower record holds" in answer.reason


def test_unchecked_updates_may_hold_anything() -> None:
    executor = InlineExecutor(CONDUCT, RUN_ID, DEVICES, check_updates=False)
    assert all(one(executor, content(3), do).code == 0 for do in ("infinite", "reshape"))


def test_the_state_is_what_the_app_left_unless_it_failed(executor: InlineExecutor) -> None:
    sent, state = content(1), None
    for n in (1, 2, 3):
        answer = one(executor, sent, "count", then="add", size=4, state=state)
        state = answer.state
        assert state is not None and state.metric_records["tally"]["n"] == n
        assert state.array_records["array"]["0"].numpy().tolist() == [n] * 4
    assert one(executor, sent, "count", then="fail", size=4, state=state).state is None
    rejected = one(executor, sent, "count", then="infinite", size=4, state=state)
    assert rejected.state is not None and rejected.state.metric_records["tally"]["n"] == 4, (
        "a device does not know of it"
    )


def test_ctrl_c_is_no_failure_of_the_app(executor: InlineExecutor) -> None:
    with pytest.raises(KeyboardInterrupt):
        one(executor, content(), "interrupt")
    assert one(executor, content(1), "add").update is not None


# ---------------------------------------------------------------- apps


def test_an_app_that_is_already_loaded() -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(RecordDict({"arrays": ArrayRecord({"w": Array(np.zeros(2))})}), reply_to=message)

    (answer,) = InlineExecutor(app, RUN_ID, DEVICES).run([computation(content())])
    assert answer.update is not None and answer.update.arrays()["w"].tolist() == [0, 0]


def test_a_folder_that_is_no_app_is_an_app_error() -> None:
    with pytest.raises(AppError, match="has no pyproject"):
        InlineExecutor(APPS, RUN_ID, DEVICES)


def test_the_same_app_in_two_executors_gives_the_same_bits(executor: InlineExecutor) -> None:
    batch = [computation(content(3), do, seed=7) for do in ("add", "draw", "fail", "reshape")]
    other = InlineExecutor(CONDUCT, RUN_ID, DEVICES, RUN_CONFIG)
    first, second = outcomes(executor.run(batch)), outcomes(other.run(batch))
    assert [a[1:] for a in first] == [a[1:] for a in second] and first == second
