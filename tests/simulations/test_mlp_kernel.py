"""The kernel of `fused` trains perceptrons as the ClientApp does on a device, and takes no other model for one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedpace.clients.training import SGD, Adam, LocalTraining
from fedpace.simulations.executors.chunks import ChunkRunner
from fedpace.simulations.executors.fused import FusedExecutor
from fedpace.simulations.work import Content
from tests.simulations.test_fused import CONFIGS, OPTIMIZERS, check_same, digest, make_computation, some_computations
from tests.simulations.trainings import make_data, make_model, make_training

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("compile"), pytest.mark.timeout(300)]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu_": partial(nn.ReLU, inplace=True),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "none": nn.Identity,
}


def make_perceptron(widths: tuple[int, ...], activation: str, bias: bool) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in zip((36, *widths), (*widths, 3), strict=True):
        layers += [nn.Linear(inputs, outputs, bias=bias), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


def make_regression(sizes: tuple[int, ...], shifted: bool) -> LocalTraining:
    """Of inputs so small that no learning rate drawn here makes a model run away."""
    data = make_data(sizes, shifted=shifted)
    targets = np.random.default_rng(3).standard_normal((90, 3)).astype(np.float32)
    data = replace(data, inputs=data.inputs / 10, targets=targets, test_targets=targets[:40])
    return LocalTraining(model=partial(make_model, "mlp"), data=lambda: data, loss="mean-squared-error")


def kernel_of(training: LocalTraining) -> object:
    return ChunkRunner(training, "cpu").kernel


@settings(max_examples=40, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow])
@given(
    widths=st.sampled_from([(), (5,), (17, 9), (32, 16, 40)]),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    bias=st.booleans(),
    optimizer=OPTIMIZERS,
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6).map(tuple),
    batch_size=st.integers(1, 40),
    regression=st.booleans(),
    shifted=st.booleans(),
    data=st.data(),
)
def test_the_kernel_equals_the_sequential_loop(
    widths: tuple[int, ...],
    activation: str,
    bias: bool,
    optimizer: SGD | Adam,
    sizes: tuple[int, ...],
    batch_size: int,
    regression: bool,
    shifted: bool,
    data: st.DataObject,
) -> None:
    model = partial(make_perceptron, widths, activation, bias)
    base = make_regression(sizes, shifted) if regression else make_training(sizes=sizes, shifted=shifted)
    training = replace(base, model=model, optimizer=optimizer, batch_size=batch_size)
    versions = []
    for version in range(2):
        torch.manual_seed(version)
        arrays = ArrayRecord(model().state_dict())
        versions.append(Content(RecordDict({"arrays": arrays, "config": ConfigRecord({"lr": 0.05})})))
    tasks = st.tuples(st.integers(0, len(sizes) - 1), st.integers(0, 1), CONFIGS)
    drawn = data.draw(st.lists(tasks, min_size=1, max_size=8))
    computations = [
        make_computation(device, versions[version], config=config, task=task)
        for task, (device, version, config) in enumerate(drawn)
    ]
    assert kernel_of(training) is not None
    check_same(training, computations, FusedExecutor(training).run(computations))


def test_the_same_bits_in_any_company_and_for_any_number_of_workers() -> None:
    training, computations = make_training(epochs=3), some_computations(count=23)
    assert kernel_of(training) is not None
    one, two = FusedExecutor(training), FusedExecutor(training, workers=2)
    try:
        together = digest(one.run(computations))
        assert together == digest(two.run(computations))
        assert together == [digest(one.run([computation]))[0] for computation in computations]
    finally:
        two.close()


class Branches(nn.Module):
    """Two layers that both see the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(36, 3), nn.Linear(36, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        flat = inputs.flatten(1)
        out: Tensor = self.one(flat) + self.two(flat)
        return out


class Unused(nn.Module):
    """A layer that takes no part, and keeps its numbers only where they have no weight decay."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(36, 3), nn.Linear(36, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.one(inputs.flatten(1))
        return out


class Twice(nn.Module):
    """A layer that is used again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(36, 3), nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.again(self.again(self.first(inputs.flatten(1))))
        return out


class Written(nn.Module):
    """What `nn.Sequential` would do, in code."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.hidden = nn.Linear(8, 3), nn.Linear(36, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.out(torch.relu(self.hidden(inputs.view(len(inputs), -1))))
        return out


@pytest.mark.parametrize(
    ("model", "known"),
    [
        (Written, True),
        (partial(make_model, "linear"), True),
        (partial(make_model, "cnn"), False),
        (partial(make_model, "frozen"), False),
        (Branches, False),
        (Unused, False),
        (Twice, False),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 3), nn.Softmax(1)), False),
        (lambda: nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(36, 3)), False),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 3), nn.ReLU(), nn.Tanh()), False),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 3).requires_grad_(False), nn.Linear(3, 3)), False),
        (lambda: nn.Sequential(nn.Flatten(0, 1), nn.Linear(6, 3)), False),
    ],
)
def test_what_is_a_perceptron(model: Callable[[], nn.Module], known: bool) -> None:
    assert (kernel_of(replace(make_training(), model=model)) is not None) is known


def test_what_is_no_perceptrons_work() -> None:
    training = make_training()
    data = training.federation
    assert kernel_of(make_training(own_loss=True)) is None
    assert kernel_of(training.with_data(replace(data, targets=data.targets + 1))) is None
    assert kernel_of(training.with_data(replace(data, targets=data.targets - 1))) is None
    assert kernel_of(replace(training, loss="mean-squared-error")) is None


def test_a_model_that_runs_away_is_rejected_alone() -> None:
    training = make_training()
    computations = some_computations()
    computations[3] = replace(computations[3], config={"lr": 1e30, "local-epochs": 9})
    answers = FusedExecutor(training).run(computations)
    assert [answer.code for answer in answers] == [4 if index == 3 else 0 for index in range(len(answers))]
    assert answers[3].reason == "rejected: array '1.weight' of record 'arrays' holds NaN or infinite numbers"
