"""The search for a strategy's settings: the same number of trials for each, on seeds that no result is made of.

optuna's tree-structured Parzen estimator proposes (Bergstra et al. 2011, "Algorithms for hyper-parameter optimization"),
seeded, one trial after the other; the first one is the strategy untuned. A trial is a run a tuning seed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpace.errors import ConfigError
from fedpace.hosting.seeds import derive_seed
from fedpace.simulations.comparison.composing import check_setting, defaults_of, make_strategy
from fedpace.simulations.comparison.plan import spec_of
from fedpace.simulations.comparison.runs import Outcome, RunSpec
from fedpace.simulations.comparison.scenario import (
    App,
    Dimension,
    Fleet,
    Limits,
    Scenario,
    Strategy,
    value_at,
    with_values,
)

if TYPE_CHECKING:
    from optuna import Trial as Proposal

Values = dict[str, Any]
"""What was chosen for each dimension, by its dotted name."""

MISSED = 10.0
"""A run that ends one point of accuracy (0.01) below its target counts as a tenth of the time limit longer than that."""


@dataclass(frozen=True, slots=True)
class Trial:
    app: str
    fleet: str
    strategy: str
    trial: int
    settings: Values
    value: float
    chosen: bool


def search(
    scenario: Scenario, app: App, fleet: Fleet, strategy: Strategy
) -> Generator[list[RunSpec], list[Outcome], list[Trial]]:
    """The trials of one strategy; yields the runs that it needs, and is sent what became of them."""
    import optuna  # which takes a second, and is not always needed

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    tuning, space, limits = scenario.tuning, scenario.space_of(strategy), app.limits(fleet.name)
    seed = derive_seed(0, f"tuning {app.name} {fleet.name} {strategy.name}") & 0xFFFFFFFF
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(3, tuning.trials // 3))
    lower = tuning.objective == "seconds"
    study = optuna.create_study(sampler=sampler, direction="minimize" if lower else "maximize")
    study.enqueue_trial(_untuned(space, {**defaults_of(strategy.preset), **scenario.settings_of(strategy)}))
    known: dict[str, float] = {}
    tried: list[tuple[Values, float]] = []
    for number in range(tuning.trials):
        trial = study.ask()
        values = {name: _asked(trial, name, dimension) for name, dimension in space.items()}
        text = json.dumps(values, sort_keys=True)
        if text not in known:
            specs = [spec_of(scenario, app, fleet, strategy, seed, values, trial=number) for seed in tuning.seeds]
            outcomes = yield specs
            known[text] = value_of(outcomes, app.metric, limits, tuning.objective)
        study.tell(trial, known[text])
        tried.append((values, known[text]))
    best = (min if lower else max)(range(len(tried)), key=lambda number: tried[number][1])
    return [
        Trial(app.name, fleet.name, strategy.name, number, values, value, number == best)
        for number, (values, value) in enumerate(tried)
    ]


def value_of(outcomes: Sequence[Outcome], metric: str, limits: Limits, objective: str) -> float:
    """What a search makes least: the geometric mean of seconds to the target; or most: the mean of final accuracies.

    Runs that do not arrive count as longer than the limit, by how much accuracy they miss.
    """
    if objective == "accuracy":
        finals = [outcome.final(metric) if outcome.status == "completed" else 0.0 for outcome in outcomes]
        return math.fsum(0.0 if math.isnan(value) else value for value in finals) / len(finals)
    return math.exp(math.fsum(math.log(_seconds(outcome, metric, limits)) for outcome in outcomes) / len(outcomes))


def _seconds(outcome: Outcome, metric: str, limits: Limits) -> float:
    at = outcome.first_reaching(metric, limits.target)
    if at is not None:
        return max(1e-9, float(outcome.evaluations["virtual_seconds"][at]))
    best = 0.0
    if outcome.status == "completed":
        best = max((value for value in outcome.evaluations[metric] if not math.isnan(value)), default=0.0)
    bound = min(
        limits.virtual_seconds, max(outcome.virtual_seconds, 1.0) if outcome.status == "completed" else math.inf
    )
    return bound * (1.0 + MISSED * (limits.target - best))


def _untuned(space: Mapping[str, Dimension], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Where settings are in the space searched; what is elsewhere is left to the sampler."""
    found: dict[str, Any] = {}
    for name, dimension in space.items():
        value = value_at(settings, dimension.path)
        if dimension.choices:
            if value in dimension.choices:
                found[name] = dimension.choices.index(value)
        elif isinstance(value, int | float) and dimension.low <= value <= dimension.high:
            found[name] = value
    return found


def _asked(trial: Proposal, name: str, dimension: Dimension) -> Any:
    if dimension.choices:
        return dimension.choices[trial.suggest_categorical(name, range(len(dimension.choices)))]
    if dimension.whole:
        step = 1 if dimension.step is None else int(dimension.step)
        return trial.suggest_int(name, int(dimension.low), int(dimension.high), log=dimension.log, step=step)
    return trial.suggest_float(name, dimension.low, dimension.high, log=dimension.log, step=dimension.step)


# ------------------------------------------------------------ what was found, in a file


@dataclass(frozen=True, slots=True)
class Tuned:
    """What a search found, and all that it tried."""

    seeds: tuple[int, ...]
    trials: tuple[Trial, ...]

    def values(self, scenario: Scenario, app: App, fleet: Fleet, strategy: Strategy) -> Values:
        """What was chosen; for a fleet that was not searched on, what was chosen on the first that was.

        Raises LookupError where nothing was."""
        for name in (fleet.name, *scenario.tuning.fleets):
            for trial in self.trials:
                if trial.chosen and (trial.app, trial.fleet, trial.strategy) == (app.name, name, strategy.name):
                    return trial.settings
        raise LookupError(f"app {app.name}, fleet {fleet.name}, strategy {strategy.name}")


def write_tuned(path: Path, scenario: Scenario, trials: Sequence[Trial]) -> None:
    """A file for `--tuned`: a line a trial."""
    lines = [
        json.dumps({name: getattr(trial, name) for name in Trial.__slots__}, sort_keys=False)
        for trial in sorted(trials, key=lambda trial: (trial.app, trial.fleet, trial.strategy, trial.trial))
    ]
    seeds = json.dumps(list(scenario.tuning.seeds))
    rows = ",\n  ".join(lines)
    path.write_text(f'{{"seeds": {seeds}, "trials": [\n  {rows}\n]}}\n')


def read_tuned(path: Path, scenario: Scenario) -> Tuned:
    """Raises ConfigError for a file that is none, that lacks what the scenario needs, or was searched on its seeds."""
    try:
        plain = json.loads(path.read_text())
        tuned = Tuned(tuple(plain["seeds"]), tuple(Trial(**trial) for trial in plain["trials"]))
    except OSError as error:
        raise ConfigError(f"--tuned: {path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--tuned: {path} is no file that a comparison wrote: {error}") from None
    if both := sorted(set(tuned.seeds) & set(scenario.seeds)):
        raise ConfigError(f"--tuned: {path} was searched on seed {both[0]}, which is one of the scenario's own")
    for strategy in scenario.strategies:
        if space := scenario.space_of(strategy):
            for app in scenario.apps:
                for fleet in scenario.fleets:
                    _check_values(path, scenario, tuned, (app, fleet, strategy), space)
    return tuned


def _check_values(
    path: Path, scenario: Scenario, tuned: Tuned, of: tuple[App, Fleet, Strategy], space: Mapping[str, Dimension]
) -> None:
    app, fleet, strategy = of
    try:
        values = tuned.values(scenario, app, fleet, strategy)
    except LookupError as error:
        raise ConfigError(f"--tuned: {path} says nothing of {error}; search again, without --tuned") from None
    where = f"--tuned: {path}: app {app.name}, fleet {fleet.name}, strategy {strategy.name}"
    if values.keys() != space.keys():
        wanted = ", ".join(space)
        raise ConfigError(f"{where}: it chose {', '.join(values)}, the scenario searches {wanted}; search again")
    try:
        for name in values:
            check_setting(strategy.preset, name.partition(".")[0])
        changes = {tuple(name.split(".")): value for name, value in values.items()}
        make_strategy(strategy.preset, with_values(scenario.settings_of(strategy), changes))
    except (ConfigError, LookupError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from None
