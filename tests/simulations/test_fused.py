"""`fused` does what the ClientApp does on a device, for many devices at once."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Metadata, RecordDict
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from fedpace.clients.training import SGD, Adam, LocalTraining
from fedpace.errors import ConfigError, RunError
from fedpace.hosting.clientapp import AppFailure, run_clientapp
from fedpace.hosting.flower import become, make_context, make_request
from fedpace.hosting.seeds import seed_globals
from fedpace.protocol.received import content_bytes, flat_metrics
from fedpace.simulations.executors.fused import FusedExecutor
from fedpace.simulations.executors.updates import RowUpdate
from fedpace.simulations.work import Answer, Computation, Content
from tests.simulations.trainings import MODELS, make_data, make_mislabelled, make_model, make_training

TRAIN, EVALUATE = "train", "evaluate"


def make_content(model: str, version: int = 0, config: Mapping[str, Any] | None = None) -> Content:
    torch.manual_seed(version)
    arrays = ArrayRecord(make_model(model).state_dict())
    return Content(RecordDict({"arrays": arrays, "config": ConfigRecord({"lr": 0.05, **(config or {})})}))


def make_computation(
    device: int, content: Content, kind: str = TRAIN, config: Mapping[str, Any] | None = None, task: int = 1
) -> Computation:
    seed = 0x9E3779B97F4A7C15 * (100 * task + device + 1) % 2**64
    return Computation(task, device, device + 100, kind, content, "config", config or {}, "", 0.0, 3600.0, seed)


def on_device(training: LocalTraining, computation: Computation) -> RecordDict | AppFailure:
    """What the ClientApp makes of a computation."""
    become(7, computation.node_id)
    content = RecordDict(dict(computation.content.records.items()))
    content["config"] = ConfigRecord({**content.config_records["config"], **computation.config})
    metadata = Metadata(7, "1", 1, computation.node_id, "", "", 0.0, 3600.0, computation.message_type)
    context = make_context(7, computation.node_id, {"partition-id": computation.device}, {}, RecordDict())
    seed_globals(computation.seed)
    reply = run_clientapp(training.client_app(), make_request(metadata, content), context)
    return reply if isinstance(reply, AppFailure) else reply.content


def check_close(found: Any, expected: Any, slack: float = 0.0) -> None:
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5 + slack)


def amplified(training: LocalTraining, computation: Computation, expected: RecordDict) -> float:
    """How far apart the ClientApp's own answers are when the weights it starts from are an ulp apart."""
    found, metrics = 0.0, flat_metrics(expected)
    for seed in range(4):
        rng = np.random.default_rng(seed)
        records = RecordDict(dict(computation.content.records.items()))
        for name, record in records.array_records.items():
            weights = {key: array.numpy() for key, array in record.items()}
            ways = {key: rng.choice(np.array([-1e9, 1e9], array.dtype), array.shape) for key, array in weights.items()}
            moved = {key: Array(np.nextafter(array, ways[key])) for key, array in weights.items()}
            records[name] = ArrayRecord(moved)
        other = on_device(training, replace(computation, content=Content(records)))
        assert isinstance(other, RecordDict)
        theirs = flat_metrics(other)
        found = max(found, *(abs(theirs[name] - value) for name, value in metrics.items()))
        for name, record in expected.array_records.items():
            ends = zip(record.values(), other.array_records[name].values(), strict=True)
            found = max(found, *(float(np.abs(one.numpy() - two.numpy()).max()) for one, two in ends))
    return found


def check_same(training: LocalTraining, computations: Sequence[Computation], answers: Sequence[Answer]) -> None:
    """The answers are those of the ClientApp, to float tolerance."""
    assert len(answers) == len(computations)
    for computation, answer in zip(computations, answers, strict=True):
        expected = on_device(training, computation)
        if isinstance(expected, AppFailure):
            assert answer.update is None
            assert (answer.code, answer.reason) == (expected.code, expected.reason)
            continue
        arrays = [array.numpy() for record in expected.array_records.values() for array in record.values()]
        if not all(np.isfinite(array).all() for array in arrays):  # training ran away
            assert answer.update is None and "NaN or infinite" in answer.reason
            continue
        try:
            check_answer(answer, expected)
        except AssertionError:  # some optimisers make of a bit more than that
            check_answer(answer, expected, 4 * amplified(training, computation, expected))


def check_answer(answer: Answer, expected: RecordDict, slack: float = 0.0) -> None:
    assert answer.update is not None, answer.reason
    metrics = flat_metrics(expected)
    assert answer.metrics.keys() == metrics.keys()
    assert {name: type(value) for name, value in answer.metrics.items()} == {
        name: type(value) for name, value in metrics.items()
    }
    assert answer.metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6 + slack)
    found = answer.update.content()
    assert list(found) == list(expected)
    assert answer.update.nbytes == content_bytes(found) == content_bytes(expected)
    for name, record in expected.array_records.items():
        views = answer.update.arrays(name)
        assert list(views) == list(record)
        for key, array in record.items():
            check_close(views[key], array.numpy(), slack)
            np.testing.assert_array_equal(views[key], found.array_records[name][key].numpy())
            assert views[key].dtype == array.numpy().dtype


def said(caplog: pytest.LogCaptureFixture) -> list[int]:
    return [record.levelno for record in caplog.records if record.name.startswith("fedpace")]


OPTIMIZERS = st.one_of(
    st.builds(SGD, st.just(0.1), st.sampled_from([0.0, 0.9]), weight_decay=st.sampled_from([0.0, 0.01])),
    st.just(SGD(0.05, 0.5, nesterov=True)),
    st.builds(
        Adam, st.just(0.01), weight_decay=st.sampled_from([0.0, 0.1]), decoupled=st.booleans(), eps=st.just(1e-3)
    ),
)
CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "local-steps": st.integers(1, 9),
        "local-epochs": st.integers(1, 3),
        "batch-size": st.sampled_from([3, 4]),
        "learning-rate": st.just(0.02),
        "lr": st.sampled_from([0.03, 0.2]),
        "proximal-mu": st.sampled_from([0.0, 0.5]),
        "sample-from": st.integers(0, 2),
        "sample-to": st.integers(3, 9),
        "unknown": st.just("anything"),
    },
)


@settings(max_examples=25, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow])
@given(
    model=st.sampled_from(MODELS),
    optimizer=OPTIMIZERS,
    sizes=st.lists(st.integers(0, 11), min_size=1, max_size=6).map(tuple),
    batch_size=st.integers(1, 5),
    epochs=st.integers(1, 2),
    width=st.sampled_from([None, 1, 2, 4]),
    own_loss=st.booleans(),
    shifted=st.booleans(),
    data=st.data(),
)
def test_fused_equals_the_sequential_loop(
    model: str,
    optimizer: SGD | Adam,
    sizes: tuple[int, ...],
    batch_size: int,
    epochs: int,
    width: int | None,
    own_loss: bool,
    shifted: bool,
    data: st.DataObject,
) -> None:
    training = make_training(
        model, sizes, optimizer, batch_size=batch_size, epochs=epochs, own_loss=own_loss, shifted=shifted
    )
    versions = [make_content(model, version) for version in range(2)]
    tasks = st.tuples(
        st.integers(0, len(sizes) - 1), st.integers(0, 1), st.sampled_from([TRAIN, TRAIN, EVALUATE]), CONFIGS
    )
    drawn = data.draw(st.lists(tasks, min_size=1, max_size=8))
    computations = [
        make_computation(device, versions[version], kind, config, task)
        for task, (device, version, kind, config) in enumerate(drawn)
    ]
    executor = FusedExecutor(training, width=width, compiled=False)
    check_same(training, computations, executor.run(computations))
    for computation in computations:
        steps = executor.steps(computation.device, computation.message_type, {"lr": 0.05, **computation.config})
        expected = on_device(training, computation)
        if computation.message_type == TRAIN and not isinstance(expected, AppFailure):
            assert steps == flat_metrics(expected)["local-steps"]


@pytest.mark.slow
@pytest.mark.xdist_group("compile")
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("model", "optimizer"), [("mlp", SGD(0.1)), ("cnn", SGD(0.1, 0.9, 0.01)), ("frozen", Adam(0.01, decoupled=True))]
)
def test_compiled_programs_equal_the_sequential_loop(
    model: str, optimizer: SGD | Adam, caplog: pytest.LogCaptureFixture
) -> None:
    training = make_training(model, optimizer=optimizer, epochs=2)
    versions = [make_content(model, 0), make_content(model, 1, {"proximal-mu": 0.3})]
    computations = [make_computation(device, versions[device % 2]) for device in range(6)]
    computations += [make_computation(device, versions[0], EVALUATE) for device in range(6)]
    answers = FusedExecutor(training).run(computations)
    assert not said(caplog)  # of a compiler that is missing
    check_same(training, computations, answers)


def digest(answers: Sequence[Answer]) -> list[bytes]:
    return [b"".join(view.tobytes() for view in answer.update.arrays().values()) for answer in answers if answer.update]


def some_computations(model: str = "mlp", count: int = 11) -> list[Computation]:
    versions = [make_content(model, version) for version in range(3)]
    return [make_computation(task % 6, versions[task % 3], task=task) for task in range(count)]


@pytest.mark.parametrize(("model", "width"), [("mlp", 2), ("cnn", None)])
def test_the_same_bits_for_one_and_two_workers_again_and_again(model: str, width: int | None) -> None:
    training, computations = make_training(model), some_computations(model)
    one = FusedExecutor(training, width=width, compiled=False)
    two = FusedExecutor(training, width=width, workers=2, compiled=False)
    try:
        first = two.run(computations)
        assert digest(first) == digest(one.run(computations)) == digest(two.run(computations))
        for kind in (TRAIN, EVALUATE):
            same = [make_computation(device, computations[0].content, kind) for device in range(6)]
            assert [answer.metrics for answer in one.run(same)] == [answer.metrics for answer in two.run(same)]
        kept = digest(first)
    finally:
        two.close()
    assert digest(first) == kept  # handles stay readable
    with pytest.raises(RunError, match="have been ended"):
        two.run(computations)


def test_another_width_and_another_company_stay_within_tolerance() -> None:
    training, computations = make_training("cnn"), some_computations("cnn")
    alone = [FusedExecutor(training, compiled=False).run([computation])[0] for computation in computations]
    for width in (1, 3, 20):
        together = FusedExecutor(training, width=width, compiled=False).run(computations)
        for one, other in zip(alone, together, strict=True):
            assert one.update is not None
            assert other.update is not None
            for mine, theirs in zip(one.update.arrays().values(), other.update.arrays().values(), strict=True):
                check_close(mine, theirs)


def test_updates_are_views_of_one_matrix_until_they_are_released() -> None:
    answers = FusedExecutor(make_training(), compiled=False).run(some_computations())
    updates = [answer.update for answer in answers]
    assert all(isinstance(update, RowUpdate) for update in updates)
    first, second = (update for update in updates[:2] if isinstance(update, RowUpdate))
    assert first.matrix is second.matrix
    views = first.arrays()
    assert all(np.shares_memory(view, first.matrix) for view in views.values())
    with pytest.raises(ValueError, match="read-only"):
        next(iter(views.values())).fill(0)
    assert first.arrays("another") == {}
    first.release()
    assert first.arrays() == {}
    assert all(np.isfinite(view).all() for view in views.values())


def test_memory_is_used_again_only_when_nobody_looks_at_it() -> None:
    executor = FusedExecutor(make_training(), workers=2, compiled=False)
    try:
        computations = some_computations()
        answers = executor.run(computations)
        kept = [view for answer in answers if answer.update for view in answer.update.arrays().values()]
        before = [view.copy() for view in kept]
        for answer in answers:
            assert answer.update is not None
            answer.update.release()
        del answers, answer
        for task in range(3):
            executor.run(some_computations(count=5 + task))
        for view, copy in zip(kept, before, strict=True):
            np.testing.assert_array_equal(view, copy)
    finally:
        executor.close()


@pytest.mark.timeout(60)
def test_a_worker_that_dies_ends_the_run_with_a_sentence() -> None:
    executor = FusedExecutor(make_training(), workers=2, width=1, compiled=False)
    workers = multiprocessing.active_children()
    try:
        executor.run(some_computations())
        workers[-1].kill()
        with pytest.raises(RunError, match=r"worker \d of the fused executor \(process \d+\) was ended by signal 9"):
            for _ in range(3):
                executor.run(some_computations())
    finally:
        executor.close()
    assert not any(worker.is_alive() for worker in workers)


def test_memory_that_is_given_up_is_forgotten_by_workers_too() -> None:
    executor = FusedExecutor(make_training(), workers=2, width=1, compiled=False)
    try:
        workers = [psutil.Process(worker.pid) for worker in multiprocessing.active_children()]
        computations = some_computations()
        kept = [executor.run(computations) for _ in range(12)]
        most = [shared_blocks(worker) for worker in workers]
        del kept
        executor.run(computations)
        executor.run(computations)
        assert all(shared_blocks(worker) < before - 5 for worker, before in zip(workers, most, strict=True))
    finally:
        executor.close()


def shared_blocks(process: psutil.Process) -> int:
    return Path(f"/proc/{process.pid}/maps").read_text().count("memfd:fedpace")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(  # the mlp side by side, the cnn one after the other
    ("kind", "model"), [(TRAIN, "mlp"), (TRAIN, "cnn"), (EVALUATE, "mlp")]
)
def test_work_that_fails_where_it_runs_fails_alone(model: str, kind: str, workers: int) -> None:
    training, content = replace(make_training(model), data=make_mislabelled), make_content(model)
    executor = FusedExecutor(training, workers=workers, compiled=False)
    try:
        computations = [make_computation(device, content, kind) for device in range(3)]
        first, wrong, last = executor.run(computations)
        assert wrong.update is None
        assert wrong.code == 2
        assert "out of bounds" in wrong.reason
        check_same(training, [computations[0], computations[2]], [first, last])
    finally:
        executor.close()


def test_batches_may_be_gathered_in_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    training, computations = make_training("cnn", epochs=2), some_computations("cnn")
    computations += [make_computation(device, computations[0].content, EVALUATE) for device in range(6)]
    expected = FusedExecutor(training, compiled=False).run(computations)
    for size in (1, 1000):
        monkeypatch.setattr("fedpace.simulations.executors.schedule._GATHERED_BYTES", size)
        found = FusedExecutor(training, compiled=False).run(computations)
        assert digest(found) == digest(expected)
        assert [answer.metrics for answer in found] == [answer.metrics for answer in expected]


def test_updates_that_are_not_finite_are_rejected() -> None:
    training, content = make_training(), make_content("mlp")
    computations = [make_computation(device, content, config={"lr": lr}) for device, lr in enumerate((0.1, 1e30, 0.1))]
    computations[1] = replace(computations[1], config={"lr": 1e30, "local-epochs": 9})
    first, wrong, last = FusedExecutor(training, compiled=False).run(computations)
    assert (wrong.update, wrong.code) == (None, 4)
    assert wrong.reason.startswith("rejected: array '1.weight' of record 'arrays' holds NaN")
    check_same(training, [computations[0], computations[2]], [first, last])


def test_updates_tell_where_they_lie_together() -> None:
    training, sent = make_training(), make_content("mlp").records.array_records["arrays"]
    turned = ArrayRecord(dict(reversed(list(sent.items()))))
    wide = ArrayRecord({name: Array(array.numpy().astype(np.float64)) for name, array in sent.items()})
    executor = FusedExecutor(training, compiled=False)
    for record, together in ((sent, True), (turned, False), (wide, False)):
        content = Content(RecordDict({"arrays": record, "config": ConfigRecord()}))
        for answer in executor.run([make_computation(device, content) for device in range(3)]):
            assert answer.update is not None
            place = answer.update.place("arrays")
            assert (place is not None) is together
            assert answer.update.place("another") is None
            if place is not None:
                flat = np.concatenate([view.reshape(-1) for view in answer.update.arrays("arrays").values()])
                np.testing.assert_array_equal(place[0][place[1]], flat)
            answer.update.release()
            assert answer.update.place("arrays") is None


def test_equal_numbers_of_other_types_are_not_taken_for_each_other() -> None:
    executor, content = FusedExecutor(make_training(), compiled=False), make_content("mlp")
    for value, works in ((1, True), (True, False), (1.0, False), (1, True)):
        config = {"local-steps": value}
        assert (executor.steps(0, TRAIN, config) == 1) is works
        (answer,) = executor.run([make_computation(0, content, config=config)])
        assert (answer.update is not None) is works


def test_a_declaration_that_cannot_go_to_workers_is_refused() -> None:
    training = LocalTraining(model=lambda: make_model("mlp"), data=partial(make_data, (3, 4)))
    with pytest.raises(ConfigError, match="at the top of a module, or use one worker"):
        FusedExecutor(training, workers=2, compiled=False)


def run_failure(executor: FusedExecutor, content: Content, device: int = 0, **given: Any) -> Answer:
    good = make_computation(1, make_content("mlp"))
    answer, other = executor.run([make_computation(device, content, **given), good])
    assert answer.update is None
    assert other.update is not None
    return answer


def test_what_a_device_could_not_do_fails_alone() -> None:
    training = make_training()
    executor = FusedExecutor(training, compiled=False)
    good = make_content("mlp")
    assert "no partition 6" in run_failure(executor, good, device=6).reason
    assert "not 'query'" in run_failure(executor, good, kind="query").reason
    assert "local-steps is 0" in run_failure(executor, good, config={"local-steps": 0}).reason
    assert "learning-rate is [1.0]" in run_failure(executor, good, config={"lr": [1.0]}).reason
    assert "has no samples" in run_failure(executor, good, config={"sample-from": 50}).reason
    assert "the model has '1.weight'" in run_failure(executor, make_content("cnn")).reason
    assert "array records" in run_failure(executor, Content(RecordDict())).reason
    wrong = RecordDict(dict(good.records.items()))
    arrays = {name: torch.zeros(2) for name in good.records.array_records["arrays"]}
    wrong["arrays"] = ArrayRecord(arrays)
    assert "'1.weight', (8, 36) in the model, cannot be used" in run_failure(executor, Content(wrong)).reason
    assert executor.steps(6, TRAIN, {}) is None
    assert executor.steps(0, "query", {}) is None
    assert executor.steps(0, TRAIN, {"local-steps": -1}) is None


class DrawsNumbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(36, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(nn.functional.dropout(inputs.flatten(1), 0.5, self.training))
        return out


def tied() -> nn.Module:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 3), first, second)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: nn.Sequential(nn.Conv2d(1, 3, 6), nn.BatchNorm2d(3), nn.Flatten()), "keeps statistics of batches"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(36, 3)), "draws random numbers"),
        (DrawsNumbers, "random"),
        (lambda: make_model("mlp").double(), "torch.float64, not torch.float32"),
        (lambda: make_model("linear").requires_grad_(False), "no parameter to train"),
        (tied, "shared between modules"),
        (lambda: nn.Linear(5, 3), "cannot be run"),
    ],
)
def test_models_that_cannot_be_fused_are_refused(model: Callable[[], nn.Module], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        FusedExecutor(LocalTraining(model=model, data=partial(make_data, (3, 4))), compiled=False)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"workers": 0}, "workers is 0"),
        ({"width": 0}, "width is 0"),
        ({"cohort": 0}, "cohort is 0"),
        ({"device": "tpu"}, "no device 'tpu'"),
        ({"run_config": {"batch-size": "many"}}, "batch-size is 'many'"),
    ],
)
def test_settings_that_cannot_be_are_refused(given: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        FusedExecutor(make_training(), compiled=False, **given)


class Recurrent(nn.Module):
    """torch knows no way to run its recurrent layers for many devices at once."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.out = nn.GRU(6, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.cells(inputs[:, 0])[1][0])
        return out


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_what_cannot_be_run_side_by_side_is_run_one_after_the_other() -> None:
    training = LocalTraining(model=Recurrent, data=partial(make_data, (5, 3)))
    content = Content(RecordDict({"arrays": ArrayRecord(Recurrent().state_dict()), "config": ConfigRecord()}))
    computations = [make_computation(device, content) for device in range(2)]
    check_same(training, computations, FusedExecutor(training, compiled=False).run(computations))


def run_without_a_compiler() -> list[str]:
    """What is logged, by a process whose environment names a compiler that is not there."""
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(f"{record.levelname} {record.name}")  # type: ignore[method-assign]
    logging.getLogger("fedpace").addHandler(handler)
    training, computations = make_training(batch_size=3), some_computations()
    check_same(training, computations, FusedExecutor(training).run(computations))
    return logged


@pytest.mark.slow
@pytest.mark.xdist_group("compile")
def test_without_a_compiler_it_is_slower_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: torch remembers for its whole life that a compiler failed."""
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        logged = process.submit(run_without_a_compiler).result(timeout=300)
    assert logged == ["WARNING fedpace.simulations.executors.programs"]
