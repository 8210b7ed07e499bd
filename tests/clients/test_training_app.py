"""The ClientApp of a `LocalTraining`, alone and under strategies."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp.strategy import FedAvg
from torch import nn
from torch.nn import functional as F

from fedpace import strategies
from fedpace.clients.mods import measure
from fedpace.clients.training import SGD, Adam, FederatedData, LocalTraining, by_key, declared_training, iid
from fedpace.clients.training.app import evaluate, train
from fedpace.clients.training.declaration import LocalRun
from fedpace.clients.training.order import local_batches
from fedpace.errors import ConfigError
from fedpace.hosting.seeds import seed_globals
from tests.inline_grid import InlineGrid

RNG = np.random.default_rng(1)
LABELS = RNG.integers(0, 3, 120)
INPUTS = (RNG.standard_normal((120, 5)) + 2 * np.eye(5, dtype=np.float64)[LABELS]).astype(np.float32)


def make_data() -> FederatedData:
    return FederatedData(INPUTS, LABELS, iid(90, 4, seed=0), INPUTS[90:], LABELS[90:], iid(30, 4, seed=1))


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def make_training(**given: Any) -> LocalTraining:
    return LocalTraining(**{"model": make_model, "data": make_data, "batch_size": 8, **given})


def samples_of(device: int) -> tuple[torch.Tensor, torch.Tensor]:
    data = make_data()
    inputs, targets = data.samples(device, data.training)
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def optimizers(model: nn.Module) -> dict[str, tuple[SGD | Adam, torch.optim.Optimizer]]:
    parameters = list(model.parameters())
    return {
        "sgd": (SGD(0.2), torch.optim.SGD(parameters, 0.2)),
        "nesterov": (
            SGD(0.2, 0.8, 0.1, nesterov=True),
            torch.optim.SGD(parameters, 0.2, momentum=0.8, weight_decay=0.1, nesterov=True),
        ),
        "adam": (Adam(0.02, weight_decay=0.1), torch.optim.Adam(parameters, 0.02, weight_decay=0.1)),
        "adamw": (
            Adam(0.02, (0.8, 0.9), 1e-4, 0.1, decoupled=True),
            torch.optim.AdamW(parameters, 0.02, (0.8, 0.9), 1e-4, 0.1),
        ),
    }


@pytest.mark.parametrize("name", ["sgd", "nesterov", "adam", "adamw"])
@pytest.mark.parametrize("mu", [0.0, 0.7])
def test_it_trains_as_one_writes_it_by_hand(name: str, mu: float) -> None:
    torch.manual_seed(3)
    model, other = make_model(), make_model()
    other.load_state_dict(model.state_dict())
    first = [parameter.detach().clone() for parameter in other.parameters()]
    declared, optimizer = optimizers(other)[name]
    training, run = make_training(optimizer=declared), LocalRun(None, 2, 8, declared.lr, mu)
    inputs, targets = samples_of(1)
    metrics = train(training, model, (inputs, targets), run, seed=9)
    losses = []
    for _, rows in local_batches(9, len(targets), 8, 2 * -(-len(targets) // 8)):
        plain = F.cross_entropy(other(inputs[rows]), targets[rows])
        distance = sum(((one - two) ** 2).sum() for one, two in zip(other.parameters(), first, strict=True))
        optimizer.zero_grad()
        (plain + mu / 2 * distance).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append((plain.item(), len(rows)))
    last = losses[len(losses) // 2 :]
    assert metrics["train-loss"] == pytest.approx(sum(loss * n for loss, n in last) / len(targets), rel=1e-5)
    assert metrics["num-examples"] == len(targets)
    assert metrics["local-steps"] == len(losses)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make_strategy", [FedAvg, strategies.FedAvg, strategies.FedProx])
def test_strategies_learn_with_it(make_strategy: Callable[..., Any]) -> None:
    seed_globals(0)
    given = {"proximal_mu": 0.1} if make_strategy is strategies.FedProx else {}
    training = make_training(optimizer=SGD(0.3))
    result = make_strategy(min_available_nodes=4, **given).start(
        grid=InlineGrid(training.client_app(), nodes=4),
        initial_arrays=ArrayRecord(make_model().state_dict()),
        num_rounds=6,
    )
    evaluated = {number: dict(metrics) for number, metrics in result.evaluate_metrics_clientapp.items()}
    assert evaluated[6]["accuracy"] > 0.7  # of three classes; which device gets which order is not fixed
    assert evaluated[6]["loss"] < 0.75 * evaluated[1]["loss"]
    assert {"train-loss", "local-steps"} <= set(result.train_metrics_clientapp[6])


def replies(training: LocalTraining, config: dict[str, Any], seed: int | None = None, kind: str = "train") -> Message:
    torch.manual_seed(0)
    grid = InlineGrid(training.client_app(), nodes=1)
    arrays = ArrayRecord(make_model().state_dict())
    content = RecordDict({"arrays": arrays, "config": ConfigRecord(config)})
    if seed is not None:
        seed_globals(seed)
    (reply,) = grid.send_and_receive([grid.create_message(content, kind, 100, "1")])
    return reply


def weights_of(message: Message) -> bytes:
    return b"".join(array.data for array in message.content.array_records["arrays"].values())


def test_a_seed_says_the_order_of_the_samples() -> None:
    training = make_training()
    assert weights_of(replies(training, {}, seed=1)) == weights_of(replies(training, {}, seed=1))
    assert weights_of(replies(training, {}, seed=1)) != weights_of(replies(training, {}, seed=2))
    seed_globals(1)
    app, arrays = training.client_app(), ArrayRecord(make_model().state_dict())
    grid = InlineGrid(app, nodes=1)
    content = RecordDict({"arrays": arrays, "config": ConfigRecord({"lr": 0.5})})
    messages = [grid.create_message(content, "train", 100, "1") for _ in range(2)]
    one, two = grid.send_and_receive(messages)
    assert weights_of(one) != weights_of(two)  # nobody seeded in between


def test_the_message_says_how_much_work_it_is() -> None:
    training = make_training(steps=3)
    metrics = replies(training, {}).content.metric_records["metrics"]
    assert (metrics["local-steps"], metrics["num-examples"]) == (3, 23)
    assert replies(training, {"local-epochs": 2}).content.metric_records["metrics"]["local-steps"] == 6
    assert replies(training, {"local-steps": 7}).content.metric_records["metrics"]["local-steps"] == 7
    part = {"local-epochs": 1, "sample-from": 3, "sample-to": 13, "batch-size": 5}
    metrics = replies(training, part).content.metric_records["metrics"]
    assert (metrics["local-steps"], metrics["num-examples"]) == (2, 10)
    assert weights_of(replies(training, {"lr": 0.1}, seed=1)) != weights_of(replies(training, {"lr": 0.2}, seed=1))


def test_failures_say_why() -> None:
    training = make_training(data=lambda: FederatedData(INPUTS, LABELS, by_key(np.zeros(120)), INPUTS, LABELS))
    grid = InlineGrid(training.client_app(), nodes=2)
    arrays = ArrayRecord(make_model().state_dict())

    def reason(content: RecordDict, node: int = 100) -> str:
        (reply,) = grid.send_and_receive([grid.create_message(content, "train", node, "1")])
        return str(reply.error.reason)

    assert "no partition 1; there are 1" in reason(RecordDict({"arrays": arrays, "config": ConfigRecord()}), 101)
    assert "2 array records" in reason(RecordDict({"one": arrays, "two": arrays}))
    assert "batch-size is 0" in reason(RecordDict({"arrays": arrays, "config": ConfigRecord({"batch-size": 0})}))
    assert "no samples" in reason(RecordDict({"arrays": arrays, "config": ConfigRecord({"sample-from": 500})}))
    assert "Missing key" in reason(RecordDict({"arrays": ArrayRecord({}), "config": ConfigRecord()}))


def test_a_context_that_names_no_partition() -> None:
    app = make_training().client_app()
    InlineGrid(app, nodes=1)
    message = Message(RecordDict({"arrays": ArrayRecord(make_model().state_dict())}), 100, "train")
    with pytest.raises(ConfigError, match="partition-id=0"):
        app(message, Context(run_id=1, node_id=100, node_config={}, state=RecordDict(), run_config={}))


@pytest.mark.parametrize("loss", ["cross-entropy", "mean-squared-error", "binary-cross-entropy"])
def test_losses_are_means_over_samples(loss: str) -> None:
    labels = loss == "cross-entropy"
    targets = LABELS if labels else INPUTS[:, :3].copy()
    if loss == "binary-cross-entropy":
        targets = (targets > 0).astype(np.float32)
    data = FederatedData(INPUTS, targets, iid(120, 2, seed=0), INPUTS, targets)
    training, model = make_training(loss=loss, data=lambda: data), make_model()
    tensors = torch.from_numpy(INPUTS), torch.from_numpy(targets)
    metrics = evaluate(training, model, tensors)
    torch_losses: dict[str, Callable[..., torch.Tensor]] = {
        "cross-entropy": F.cross_entropy,
        "mean-squared-error": F.mse_loss,
        "binary-cross-entropy": F.binary_cross_entropy_with_logits,
    }
    with torch.no_grad():
        outputs = model(tensors[0])
    assert metrics["loss"] == pytest.approx(torch_losses[loss](outputs, tensors[1]).item(), rel=1e-5)
    assert metrics["num-examples"] == 120
    if labels:
        assert metrics["accuracy"] == pytest.approx((outputs.argmax(1) == tensors[1]).float().mean().item())
    assert ("accuracy" in metrics) == labels


def test_an_app_knows_its_declaration_unless_mods_may_change_it() -> None:
    training = make_training()
    assert declared_training(training.client_app()) is training
    assert declared_training(training.client_app([measure])) is None


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"loss": "hinge"}, "no loss 'hinge'"),
        ({"optimizer": 0.1}, "the optimiser is 0.1"),
        ({"epochs": 0}, "epochs is 0"),
        ({"steps": 1.5}, "steps is 1.5"),
        ({"batch_size": True}, "batch_size is True"),
        ({"model": None}, "model is None"),
    ],
)
def test_declarations_that_cannot_be_are_refused(given: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        make_training(**given)


@pytest.mark.parametrize(
    "make",
    [
        partial(SGD, 0.0),
        partial(SGD, -1.0),
        partial(SGD, float("nan")),
        partial(SGD, 0.1, nesterov=True),
        partial(Adam, betas=(0.9, 1.0)),
        partial(Adam, eps=-1.0),
    ],
)
def test_optimisers_that_cannot_be_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(ConfigError, match=r"SGD|Adam"):
        make()


def test_data_has_to_be_federated_data() -> None:
    with pytest.raises(ConfigError, match="returned a list"):
        _ = make_training(data=list).federation
