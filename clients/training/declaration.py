"""`LocalTraining`: what a device does with the model it gets, declared once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod

from fedpace.clients.training.data import FederatedData
from fedpace.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

CONFIG_KEYS = (
    "local-steps",
    "local-epochs",
    "batch-size",
    "learning-rate",
    "lr",
    "proximal-mu",
    "sample-from",
    "sample-to",
)
"""What a run's config and, before it, a message's config may say about a task; of "learning-rate" and "lr", the latter."""

LOSSES = ("cross-entropy", "mean-squared-error", "binary-cross-entropy")

EVALUATION_BATCH = 64
"""Samples that are evaluated at once."""

NO_SAMPLES = "local training: this device has no samples for this task"

_DECLARED = "fedpace_local_training"


@dataclass(frozen=True)
class SGD:
    """torch.optim.SGD, without dampening."""

    lr: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        _check_number("SGD: lr", self.lr, above_zero=True)
        _check_number("SGD: momentum", self.momentum)
        _check_number("SGD: weight_decay", self.weight_decay)
        if self.nesterov and not self.momentum:
            raise ConfigError("SGD: Nesterov's step needs a momentum above 0")


@dataclass(frozen=True)
class Adam:
    """torch.optim.Adam, or, with `decoupled` weight decay, torch.optim.AdamW."""

    lr: float = 0.001
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False

    def __post_init__(self) -> None:
        _check_number("Adam: lr", self.lr, above_zero=True)
        _check_number("Adam: eps", self.eps)
        _check_number("Adam: weight_decay", self.weight_decay)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"Adam: betas are {self.betas}; choose both from 0 to less than 1")


@dataclass(frozen=True, slots=True)
class LocalRun:
    """One task's local work. `steps` (batches) where they were asked for, else `epochs`; `first` and `last` (or None)
    bound the device's samples that it is about; `mu` is FedProx's, 0 for none."""

    steps: int | None
    epochs: int
    batch_size: int
    lr: float
    mu: float = 0.0
    first: int = 0
    last: int | None = None

    def samples(self, held: int) -> int:
        """How many of the `held` samples of a device it is about."""
        return max(0, (held if self.last is None else min(held, self.last)) - self.first)

    def steps_of(self, samples: int) -> int:
        """Batches that a device with so many samples trains on, the smaller one at the end of a pass included."""
        return self.epochs * -(-samples // self.batch_size) if self.steps is None else self.steps


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """Local training on each device's own samples: minimise `loss` with `optimizer` for `epochs`, or for `steps`.

    `model` makes the model; it maps inputs (n, ...) to outputs (n, ...). `data` is called once a process. `loss` is one
    of `LOSSES`, or a function of a batch's outputs and targets that returns the losses of its samples, of shape (n,).
    Every pass takes the samples in a new order, drawn from torch's global seed, in batches of `batch_size`, of which
    the last may be smaller. Raises ConfigError for what cannot be.
    """

    model: Callable[[], nn.Module]
    data: Callable[[], FederatedData]
    loss: str | Callable[[Tensor, Tensor], Tensor] = "cross-entropy"
    optimizer: SGD | Adam = field(default_factory=SGD)
    epochs: int = 1
    steps: int | None = None
    batch_size: int = 32

    def __post_init__(self) -> None:
        if isinstance(self.loss, str) and self.loss not in LOSSES:
            raise ConfigError(
                f"local training: no loss {self.loss!r}; choose one of {', '.join(LOSSES)}, or a function"
            )
        if not isinstance(self.optimizer, SGD | Adam):
            raise ConfigError(f"local training: the optimiser is {self.optimizer!r}; choose SGD(...) or Adam(...)")
        for name in ("model", "data"):
            if not callable(getattr(self, name)):
                raise ConfigError(f"local training: {name} is {getattr(self, name)!r}; give a function that makes it")
        for name in ("epochs", "batch_size") if self.steps is None else ("steps", "batch_size"):
            _check_count(f"local training: {name}", getattr(self, name))

    @cached_property
    def federation(self) -> FederatedData:
        """The data, made when first asked for. Raises ConfigError where `data` returns something else."""
        data = self.data()
        if not isinstance(data, FederatedData):
            raise ConfigError(f"local training: data() returned a {type(data).__name__}, not a FederatedData")
        return data

    def with_data(self, data: FederatedData) -> LocalTraining:
        """The same training of data that is there already."""
        return replace(self, data=lambda: data)

    def plan(self, config: Mapping[str, Any]) -> LocalRun:
        """What a task does whose config is `config`. Raises ConfigError for values that cannot be."""
        lr = config.get("lr", config.get("learning-rate", self.optimizer.lr))
        steps = config.get("local-steps")
        if steps is None and "local-epochs" not in config:
            steps = self.steps
        run = LocalRun(
            steps=steps,
            epochs=config.get("local-epochs", self.epochs),
            batch_size=config.get("batch-size", self.batch_size),
            lr=lr,
            mu=config.get("proximal-mu", 0.0),
            first=config.get("sample-from", 0),
            last=config.get("sample-to"),
        )
        if run.steps is None:
            _check_count("config: local-epochs", run.epochs)
        else:
            _check_count("config: local-steps", run.steps)
        _check_count("config: batch-size", run.batch_size)
        _check_number("config: learning-rate", run.lr, above_zero=True)
        _check_number("config: proximal-mu", run.mu)
        _check_count("config: sample-from", run.first, 0)
        if run.last is not None:
            _check_count("config: sample-to", run.last, run.first + 1)
        return run

    def client_app(self, mods: Sequence[Mod] = ()) -> ClientApp:
        """A ClientApp that trains and evaluates so, with the samples of the node config's "partition-id".

        It knows its declaration where it has no `mods`, which may change anything, or only such as say by an attribute
        `after_training` that they hand on messages as they came (`declared_training`, `declared_mods`).
        """
        from fedpace.clients.training.app import make_client_app

        app = make_client_app(self, mods)
        if all(getattr(mod, "after_training", False) for mod in mods):
            setattr(app, _DECLARED, (self, tuple(mods)))
        return app

    def __getstate__(self) -> dict[str, Any]:
        """Without the data: another process makes or maps its own."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


def declared_training(app: ClientApp) -> LocalTraining | None:
    """What a ClientApp does before its mods, where `LocalTraining.client_app` made it, without mods that change that."""
    found: tuple[LocalTraining, tuple[Mod, ...]] | None = getattr(app, _DECLARED, None)
    return None if found is None else found[0]


def declared_mods(app: ClientApp) -> tuple[Mod, ...]:
    """The mods of an app that has a `declared_training`."""
    found: tuple[LocalTraining, tuple[Mod, ...]] | None = getattr(app, _DECLARED, None)
    return () if found is None else found[1]


def _check_count(what: str, value: Any, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{what} is {value!r}; choose a whole number, {least} or more")


def _check_number(what: str, value: Any, *, above_zero: bool = False) -> None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")
    if not good or (above_zero and value == 0):
        raise ConfigError(f"{what} is {value!r}; choose a number {'above 0' if above_zero else 'of 0 or more'}")
