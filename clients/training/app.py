"""The ClientApp of a `LocalTraining`: a device after the other, with torch's own optimisers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod
from torch import Tensor, nn

from fedpace.clients.training.declaration import EVALUATION_BATCH, NO_SAMPLES, SGD, LocalRun
from fedpace.clients.training.losses import correct, losses
from fedpace.clients.training.order import local_batches, next_seed
from fedpace.errors import ConfigError

if TYPE_CHECKING:
    from fedpace.clients.training.declaration import LocalTraining

Samples = tuple[Tensor, Tensor]

_UNSEEDED = torch.Generator().initial_seed()
"""The seed that torch's generators have before anybody seeds them: in every process the same."""


def make_client_app(training: LocalTraining, mods: Sequence[Mod]) -> ClientApp:
    """The ClientApp that `LocalTraining.client_app` promises."""
    app = ClientApp(mods=list(mods))

    @app.train()
    def train_on_device(message: Message, context: Context) -> Message:
        run = training.plan(_config(message, context))
        device = _accelerator(context)
        name, model = _received_model(training, message, device)
        inputs, targets = _own_samples(training, context, device, evaluate=False)
        chosen = slice(run.first, run.last)
        metrics = train(training, model, (inputs[chosen], targets[chosen]), run, _task_seed())
        content = RecordDict({name: ArrayRecord(model.state_dict()), "metrics": MetricRecord(dict(metrics))})
        return Message(content=content, reply_to=message)

    @app.evaluate()
    def evaluate_on_device(message: Message, context: Context) -> Message:
        device = _accelerator(context)
        _, model = _received_model(training, message, device)
        metrics = evaluate(training, model, _own_samples(training, context, device, evaluate=True))
        return Message(content=RecordDict({"metrics": MetricRecord(dict(metrics))}), reply_to=message)

    return app


def train(
    training: LocalTraining, model: nn.Module, samples: Samples, run: LocalRun, seed: int
) -> Mapping[str, int | float]:
    """Trains the model in place. Returns "train-loss", the mean of the last pass without the proximal term,
    "num-examples" and "local-steps". Raises ConfigError where there are no samples."""
    inputs, targets = samples
    if not len(targets):
        raise ConfigError(NO_SAMPLES)
    optimizer = _optimizer(training, model, run.lr)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    anchors = [parameter.detach().clone() for parameter in parameters] if run.mu else []
    model.train()
    total, seen, steps = 0.0, 0, run.steps_of(len(targets))
    for first, rows in local_batches(seed, len(targets), run.batch_size, steps):
        batch = torch.from_numpy(rows).to(targets.device)
        optimizer.zero_grad()
        loss = losses(training.loss)(model(inputs[batch]), targets[batch]).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        for parameter, anchor in zip(parameters, anchors, strict=False):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - anchor, alpha=run.mu)
        optimizer.step()
        if first:
            total, seen = 0.0, 0
        total += loss.item() * len(rows)
        seen += len(rows)
    return {"train-loss": total / seen, "num-examples": len(targets), "local-steps": steps}


@torch.no_grad()
def evaluate(training: LocalTraining, model: nn.Module, samples: Samples) -> Mapping[str, int | float]:
    """Mean "loss", and "accuracy" where targets are labels; and "num-examples".

    Raises ConfigError where there are no samples."""
    inputs, targets = samples
    if not len(targets):
        raise ConfigError(NO_SAMPLES)
    model.eval()
    total, right, labels = 0.0, 0.0, False
    for rows in torch.split(torch.arange(len(targets), device=targets.device), EVALUATION_BATCH):
        outputs = model(inputs[rows])
        total += losses(training.loss)(outputs, targets[rows]).sum().item()
        found = correct(outputs, targets[rows])
        if found is not None:
            labels, right = True, right + found.sum().item()
    accuracy = {"accuracy": right / len(targets)} if labels else {}
    return {"loss": total / len(targets), **accuracy, "num-examples": len(targets)}


def _optimizer(training: LocalTraining, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    told = training.optimizer
    if isinstance(told, SGD):
        return torch.optim.SGD(
            model.parameters(), lr, momentum=told.momentum, weight_decay=told.weight_decay, nesterov=told.nesterov
        )
    kind = torch.optim.AdamW if told.decoupled else torch.optim.Adam
    return kind(model.parameters(), lr, betas=told.betas, eps=told.eps, weight_decay=told.weight_decay)


def _config(message: Message, context: Context) -> dict[str, Any]:
    """The run's config, and over it what the message says."""
    config: dict[str, Any] = dict(context.run_config)
    for record in message.content.config_records.values():
        config.update(record)
    return config


def _task_seed() -> int:
    """torch's seed. Whoever seeds before every task has the same orders again; else each task has orders of its own."""
    seed = torch.initial_seed()
    if seed == _UNSEEDED:
        seed = torch.seed()
    torch.manual_seed(next_seed(seed))
    return seed


def _accelerator(context: Context) -> torch.device:
    """The accelerator that this device's owner or its runtime names, else the first there is."""
    return torch.device(str(context.node_config.get("device") or ("cuda:0" if torch.cuda.is_available() else "cpu")))


def _received_model(training: LocalTraining, message: Message, device: torch.device) -> tuple[str, nn.Module]:
    """The model that came, and the name of its record."""
    records = message.content.array_records
    if len(records) != 1:
        raise ConfigError(f"local training: the message has {len(records)} array records; it takes one, the model")
    ((name, record),) = records.items()
    model = training.model()
    model.load_state_dict(record.to_torch_state_dict())
    return name, model.to(device)


def _own_samples(training: LocalTraining, context: Context, device: torch.device, *, evaluate: bool) -> Samples:
    if "partition-id" not in context.node_config:
        raise ConfigError(
            "local training: the node config does not say which samples are this device's: start it with "
            "--node-config 'partition-id=0'"
        )
    partition = int(context.node_config["partition-id"])
    data = training.federation
    if not 0 <= partition < len(data.partitions):
        raise ConfigError(f"local training: no partition {partition}; there are {len(data.partitions)}")
    inputs, targets = data.samples(partition, data.testing if evaluate else data.training)
    return torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device)
