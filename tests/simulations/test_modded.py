"""`fused` with mods that act on what training made: what `inline` does with the same app, and at the same times."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from fedpace.clients.mods import compress, measure
from fedpace.clients.training import declared_training
from fedpace.clients.training.declaration import declared_mods
from fedpace.protocol.codecs import typical_bytes
from fedpace.protocol.encoded import CODEC, StepLayout, read_step
from fedpace.simulations.executors.fused import FusedExecutor
from fedpace.simulations.executors.inline import InlineExecutor
from fedpace.simulations.executors.modded import ModdedExecutor
from fedpace.simulations.work import Answer, Computation, Content, Executor
from tests.simulations.trainings import make_model, make_training

RUN_ID, DEVICES = 7, 6


def content() -> Content:
    arrays = ArrayRecord(make_model("mlp").state_dict())
    return Content(RecordDict({"arrays": arrays, "config": ConfigRecord({"lr": 0.05})}))


def computation(task: int, device: int, kind: str, sent: Content, state: RecordDict | None, codec: str) -> Computation:
    config = {CODEC: codec} if codec else {}
    seed = 1000 * task + device
    return Computation(task, device, device + 100, kind, sent, "config", config, "", 0.0, 3600.0, seed, state)


def steps(answers: Sequence[Answer], sent: Content) -> list[np.ndarray]:
    """What compressed updates decode to."""
    arrays = sent.records.array_records["arrays"]
    layout = StepLayout.of((name, array.dtype, array.shape) for name, array in arrays.items())
    found = []
    for answer in answers:
        assert answer.update is not None, answer.reason
        view = answer.update.encoded("arrays")
        assert view is not None
        found.append(read_step(view, layout).frame.dense())
    return found


def test_it_does_what_inline_does_with_the_state_of_each_device() -> None:
    training, mods = make_training(), [compress("topk(0.2)")]
    app = training.client_app(mods=mods)
    assert declared_training(app) is training and declared_mods(app) == tuple(mods)
    executors: list[Executor] = [
        ModdedExecutor(FusedExecutor(training, compiled=False), mods, RUN_ID, DEVICES, {}),
        InlineExecutor(app, RUN_ID, DEVICES),
    ]
    states: list[list[RecordDict | None]] = [[None] * DEVICES, [None] * DEVICES]
    for task, codec in enumerate(["", "", "quantise(8)"]):
        sent, found = content(), []
        for executor, own in zip(executors, states, strict=True):
            assert executor.keeps_state
            numbers = range(1 + task * DEVICES, 1 + (task + 1) * DEVICES)
            work = [
                computation(number, device, "train", sent, own[device], codec) for device, number in enumerate(numbers)
            ]
            answers = executor.run(work)
            own[:] = [answer.state for answer in answers]
            assert all("fedpace.feedback" in (state or {}) for state in own)
            found.append(steps(answers, sent))
            assert all({"train-loss", "num-examples", "local-steps"} == set(answer.metrics) for answer in answers)
        for fused, inline in zip(*found, strict=True):
            assert np.count_nonzero(fused) == np.count_nonzero(inline)
            np.testing.assert_allclose(fused, inline, rtol=1e-3, atol=2e-4 if codec else 1e-6)


def test_evaluations_and_failures_are_those_of_fused() -> None:
    training, mods = make_training(), [compress("topk(0.2)")]
    executor = ModdedExecutor(FusedExecutor(training, compiled=False), mods, RUN_ID, DEVICES, {})
    sent = content()
    evaluated, nobody = executor.run(
        [computation(1, 0, "evaluate", sent, None, ""), computation(2, DEVICES + 3, "train", sent, None, "")]
    )
    assert evaluated.update is not None and "loss" in evaluated.metrics
    assert nobody.update is None and "no partition" in nobody.reason


def test_a_mod_that_raises_fails_its_own_task() -> None:
    class Fussy:
        after_training = True

        def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
            if context.node_config["partition-id"] == 1:
                raise ValueError("not me")
            return call_next(message, context)

    training = make_training()
    executor = ModdedExecutor(FusedExecutor(training, compiled=False), [Fussy()], RUN_ID, DEVICES, {})
    sent = content()
    first, second = executor.run([computation(1 + device, device, "train", sent, None, "") for device in range(2)])
    assert first.update is not None
    assert second.update is None and "not me" in second.reason


def test_mods_that_act_before_training_leave_it_undeclared() -> None:
    assert declared_training(make_training().client_app(mods=[measure, compress("sign")])) is None


@pytest.mark.parametrize(("codec", "least", "most"), [("topk(0.01)", 400, 700), ("quantise(8)", 10_000, 10_300)])
def test_typical_bytes_are_those_of_a_step(codec: str, least: int, most: int) -> None:
    assert least < typical_bytes(codec, 10_000) < most
