"""Named strategies: each a choice of parts, a few lines long. Any part may be replaced by name.

    FedBuff(k=5, selector=ShortestJobFirst(), fraction_train=0.5)

Settings are Flower's where Flower has them. `fraction_train` is the share of connected devices a round asks, or, in
strategies without rounds, the share kept at work; `train_nodes` is the same as a count. Devices evaluate in strategies
with rounds, as in Flower; without rounds only if `fraction_evaluate` says so, since it takes their time from training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

from flwr.app import ArrayRecord

from fedpace.errors import ConfigError
from fedpace.protocol.codecs import Codec
from fedpace.strategies.compensators import CachedCalibration, ControlVariates, Overlap
from fedpace.strategies.composition import Composition
from fedpace.strategies.folders import Mean
from fedpace.strategies.gates import All, Arrivals, Deadline
from fedpace.strategies.optimisers import SGD, Adam
from fedpace.strategies.parts import (
    Compensator,
    Folder,
    Gate,
    Optimiser,
    Planner,
    Selector,
    SelectorFunction,
)
from fedpace.strategies.planners import Fixed, Together
from fedpace.strategies.selectors import GainPerSecond, QLearning, Tiers, Uniform, Utility
from fedpace.strategies.strategy import PacedStrategy
from fedpace.strategies.weighers import Absolute, FleetShare, Mixing, NormalisedSteps, Polynomial, Samples


class Settings(TypedDict, total=False):
    """What every preset takes beside its own; see `Composition` and `PacedStrategy`."""

    fraction_train: float
    train_nodes: int
    fraction_evaluate: float
    min_train_nodes: int
    min_evaluate_nodes: int
    min_available_nodes: int
    evaluate_every: int
    max_staleness: int | None
    local_steps: int | None
    weighted_by_key: str
    arrayrecord_key: str
    configrecord_key: str
    config: Mapping[str, Any]
    validation_fn: Callable[[ArrayRecord], float] | None
    seed: int | None
    directory: Path | None
    downlink: Codec | str | None
    selector: Selector | SelectorFunction
    planner: Planner
    gate: Gate
    weighers: Sequence[Any]
    compensators: Sequence[Compensator]
    folder: Folder
    optimiser: Optimiser


_PARTS = ("selector", "planner", "gate", "weighers", "compensators", "folder", "optimiser")
_STRATEGY = ("config", "validation_fn", "arrayrecord_key", "configrecord_key", "seed", "directory", "downlink")


class Preset(PacedStrategy):
    """A strategy of named parts. Raises ConfigError for settings that are unknown, out of range, or at odds."""

    def __init__(self, settings: Settings, **defaults: Any) -> None:
        given: dict[str, Any] = dict(settings)
        if unknown := given.keys() - Settings.__annotations__.keys():
            raise ConfigError(
                f"{type(self).__name__} has no setting {', '.join(sorted(unknown))}: "
                f"there are {', '.join(sorted(Settings.__annotations__))}"
            )
        if "train_nodes" in given and "fraction_train" in given:
            raise ConfigError(f"{type(self).__name__}: give fraction_train or train_nodes, not both")
        parts: dict[str, Any] = {
            "selector": Uniform(),
            "planner": Fixed(given.get("local_steps")),
            "gate": All(),
            "weighers": (Samples(),),
            "compensators": (),
            "folder": Mean(),
            "optimiser": SGD(),
            **defaults,
            **{name: given[name] for name in _PARTS if name in given},
        }
        in_rounds = getattr(parts["gate"], "rounds", True)
        composition = Composition(
            **parts,
            devices=given.get("train_nodes", float(given.get("fraction_train", 1.0))),
            min_train=given.get("min_train_nodes", 2),
            min_available=given.get("min_available_nodes", 2),
            fraction_evaluate=given.get("fraction_evaluate", 1.0 if in_rounds else 0.0),
            min_evaluate=given.get("min_evaluate_nodes", 2) if given.get("fraction_evaluate") != 0.0 else 0,
            evaluate_every=given.get("evaluate_every", 1),
            max_staleness=given.get("max_staleness"),
            samples_key=given.get("weighted_by_key", "num-examples"),
        )
        super().__init__(composition, **{name: given[name] for name in _STRATEGY if name in given})


class FedAvg(Preset):
    """Federated averaging, in rounds that wait for all (McMahan et al. 2017, algorithm 1)."""

    def __init__(self, **settings: Unpack[Settings]) -> None:
        super().__init__(settings)


class FedProx(Preset):
    """FedAvg with a proximal term at the devices (Li et al. 2020, "Federated Optimization in Heterogeneous Networks",
    eq. 2). `proximal_mu` goes out as "proximal-mu", as Flower's does; the `proximal` mod, or the app, applies it."""

    def __init__(self, proximal_mu: float = 0.01, **settings: Unpack[Settings]) -> None:
        if not 0.0 <= proximal_mu < float("inf"):
            raise ConfigError(f"FedProx: proximal_mu is {proximal_mu}; choose 0 or more")
        settings["config"] = {**settings.get("config", {}), "proximal-mu": float(proximal_mu)}
        super().__init__(settings)


class FedNova(Preset):
    """FedAvg for devices that take different numbers of steps (Wang et al. 2020, "Tackling the Objective Inconsistency
    Problem in Heterogeneous Federated Optimization", eq. 8). Steps are those that devices report: see the `measure` mod."""

    def __init__(self, **settings: Unpack[Settings]) -> None:
        super().__init__(settings, weighers=(Samples(), NormalisedSteps()))


class SCAFFOLD(Preset):
    """Control variates against drift (Karimireddy et al. 2020, "SCAFFOLD", algorithm 1, option II). The ClientApp needs
    the `control_variates` mod."""

    def __init__(self, server_lr: float = 1.0, **settings: Unpack[Settings]) -> None:
        super().__init__(settings, compensators=(ControlVariates(),), optimiser=SGD(server_lr))


class FedAdam(Preset):
    """Adam at the server (Reddi et al. 2021, "Adaptive Federated Optimization", algorithm 2), with Flower's defaults."""

    def __init__(
        self,
        eta: float = 0.1,
        beta_1: float = 0.9,
        beta_2: float = 0.99,
        tau: float = 1e-3,
        **settings: Unpack[Settings],
    ) -> None:
        super().__init__(settings, optimiser=Adam(eta, beta_1, beta_2, tau))


class FedAsync(Preset):
    """Each arrival is mixed in at once (Xie et al. 2019, "Asynchronous Federated Optimization", algorithm 1): the model
    moves by alpha (1 + staleness)^-a towards the device's."""

    def __init__(self, alpha: float = 0.6, a: float = 0.5, **settings: Unpack[Settings]) -> None:
        super().__init__(
            settings,
            gate=Arrivals(1),
            weighers=(Mixing(alpha), Absolute(Polynomial(a))),
            folder=Mean(against="current"),
        )


class FedBuff(Preset):
    """Buffered asynchronous aggregation (Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous
    Aggregation", algorithm 1): every `k` arrivals one step of their mean, each times (1 + staleness)^-a."""

    def __init__(self, k: int = 10, server_lr: float = 1.0, a: float = 0.5, **settings: Unpack[Settings]) -> None:
        super().__init__(settings, gate=Arrivals(k), weighers=(Absolute(Polynomial(a)),), optimiser=SGD(server_lr))


class TiFL(Preset):
    """Rounds of devices from one tier of pace at a time (Chai et al. 2020, "TiFL", algorithm 2)."""

    def __init__(self, tiers: int = 5, **settings: Unpack[Settings]) -> None:
        super().__init__(settings, selector=Tiers(tiers))


class Oort(Preset):
    """Devices of high utility and high speed first, with exploration, and 30 % more asked than needed (Lai et al. 2021,
    "Oort: Efficient Federated Learning via Guided Participant Selection", algorithm 1)."""

    def __init__(self, over_selection: float = 1.3, **settings: Unpack[Settings]) -> None:
        super().__init__(settings, selector=Utility(), gate=Deadline(over_selection=over_selection))


class REFL(Preset):
    """Rounds that close early, and late updates that are folded all the same, with less weight (Abdelmoniem et al. 2023,
    "REFL: Resource-Efficient Federated Learning", section 4.2). Its other half, asking first those devices that will
    soon be gone, needs forecasts of availability, which no device gives here: selection is uniform."""

    def __init__(self, over_selection: float = 1.3, a: float = 1.0, **settings: Unpack[Settings]) -> None:
        gate = Deadline(over_selection=over_selection, late="fold")
        super().__init__(settings, gate=gate, weighers=(Samples(), Polynomial(a)))


class Compass(Preset):
    """Local steps by each device's speed, so that groups arrive together (Li et al. 2024, "FedCompass", algorithms 1 to
    3). The ClientApp must take "local-steps" from its config."""

    def __init__(
        self, q_min: int = 20, q_max: int = 100, slack: float = 1.2, a: float = 0.5, **settings: Unpack[Settings]
    ) -> None:
        together = Together(q_min, q_max, slack)
        super().__init__(
            settings, planner=together, gate=together, weighers=(Samples(), FleetShare(), Absolute(Polynomial(a)))
        )


class CA2FL(Preset):
    """FedBuff whose devices stand in for themselves while they are away, by their last updates (Wang et al. 2024,
    "Tackling the Data Heterogeneity in Asynchronous Federated Learning with Cached Update Calibration", algorithm 2)."""

    def __init__(self, k: int = 10, server_lr: float = 1.0, **settings: Unpack[Settings]) -> None:
        super().__init__(
            settings,
            gate=Arrivals(k),
            weighers=(),
            compensators=(CachedCalibration(unseen="zero", quantisation=None),),
            optimiser=SGD(server_lr),
        )


class QScheduler(Preset):
    """Rounds of the devices that Q-learning prefers: reward a/T + b/C for the time T and the cost C of a task."""

    def __init__(self, a: float = 1.0, b: float = 1.0, fraction: float = 0.5, **settings: Unpack[Settings]) -> None:
        if "train_nodes" not in settings:
            settings.setdefault("fraction_train", fraction)
        super().__init__(settings, selector=QLearning(a=a, b=b))


class Paced(Preset):
    """Ours. Buffered arrivals from those devices first that there is most to gain from a second; devices that are away are
    stood in for by their last updates, which age and are trusted by half; and what the model has done since a device
    began is not done again, so that steps can be long. docs/paced.md says what each part is worth.

    `k` updates make a version; `server_lr` is the server's step.
    """

    def __init__(self, k: int = 4, server_lr: float = 1.5, **settings: Unpack[Settings]) -> None:
        super().__init__(
            settings,
            selector=GainPerSecond(),
            gate=Arrivals(k),
            weighers=(Samples(), Absolute(Polynomial(0.25))),
            compensators=(CachedCalibration(trust=0.5, decay=0.99), Overlap()),
            optimiser=SGD(server_lr),
        )


PRESETS: dict[str, Callable[..., Preset]] = {
    preset.__name__: preset
    for preset in (
        FedAvg,
        FedProx,
        FedNova,
        SCAFFOLD,
        FedAdam,
        FedAsync,
        FedBuff,
        TiFL,
        Oort,
        REFL,
        Compass,
        CA2FL,
        QScheduler,
        Paced,
    )
}
"""The presets by name."""
