from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from benchmarks.engines.arrays import make_work
from fedpace.simulations.executors.inline import InlineExecutor
from fedpace.simulations.work import Computation, Content

APP = Path(__file__).parents[2] / "benchmarks/apps/digits_mlp"


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(APP)
    return importlib.import_module("digits_mlp.task")


def test_the_app_has_the_data_and_the_first_model_of_work_m(task: Any) -> None:
    work = make_work("M", 1200)
    for device in (0, 999, 1000, 1199):
        images, labels = task.images_of(device, 1200)
        expected = work.device(device)
        assert np.array_equal(images.numpy(), expected[0]) and np.array_equal(labels.numpy(), expected[1])
    _, (images, labels) = task.split()
    assert np.array_equal(images.numpy(), work.test_x) and np.array_equal(labels.numpy(), work.test_y)
    first = task.first_model().state_dict()
    assert list(first) == list(work.weights)
    assert all(np.array_equal(first[name].numpy(), array) for name, array in work.weights.items())


def test_a_device_trains(task: Any) -> None:
    model = task.first_model()
    content = Content(RecordDict({"arrays": ArrayRecord(model.state_dict()), "config": ConfigRecord({})}))
    batch = [
        Computation(n, n, 1 << 40, "train", content, "config", {"server-round": 1}, "1", 0.0, 60.0, n)
        for n in range(20)
    ]
    answers = InlineExecutor(APP, 1, 1200, {}).run(batch)
    before = task.evaluate(model)[0]
    trained: list[Any] = []
    for answer in answers:
        assert answer.update is not None and answer.metrics == {"num-examples": 32}
        trained.append(answer.update.arrays())
    mean = {name: np.mean([arrays[name] for arrays in trained], axis=0) for name in trained[0]}
    model.load_state_dict({name: torch.from_numpy(np.asarray(array)) for name, array in mean.items()})
    assert task.evaluate(model)[0] < before
