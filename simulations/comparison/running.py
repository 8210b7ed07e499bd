"""One run: an app on a simulated fleet, with the scenario's strategy in the place of its own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from fedpace.errors import ConfigError
from fedpace.hosting.app import load_app_folder
from fedpace.hosting.flower import RunNotRunningException
from fedpace.hosting.outputs import Outputs
from fedpace.hosting.seeds import derive_seed
from fedpace.simulations.comparison.composing import make_strategy
from fedpace.simulations.comparison.details import write_details
from fedpace.simulations.comparison.runs import COLUMNS, Outcome, RunSpec
from fedpace.simulations.fleets import load_fleet
from fedpace.simulations.grid import VirtualGrid
from fedpace.simulations.run import Prepared, SimulationOptions, make_grid, prepare, run_app
from fedpace.simulations.tomlfile import LARGE
from fedpace.strategies.strategy import StrategyEnded

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


def options_of(spec: RunSpec, out: Path) -> SimulationOptions:
    """The run as `fedpace simulate` would be told of it."""
    return SimulationOptions(
        app=load_app_folder(Path(spec.folder)),
        devices=spec.devices,
        fleet=spec.fleet_file,
        executor=spec.executor,
        workers=1,
        device="cpu",
        steps=spec.steps,
        overrides=dict(spec.config),
        seed=spec.seed,
        initial_model=None,
        out=out,
    )


def prepare_app(spec: RunSpec) -> Prepared:
    """The app, ready for all runs with the same `app_key`. Where `auto` finds no declared training, its ClientApp is
    called in this process: runs are spread over the cores already."""
    return prepare(options_of(spec, Path()), otherwise="inline")


def run_one(spec: RunSpec, prepared: Prepared, out: Path) -> Outcome:
    """Runs it to its end, whatever that is, and leaves details in a folder that is there."""
    began = time.monotonic()
    options = options_of(spec, out)
    fleet = load_fleet(spec.fleet_file, spec.devices, derive_seed(spec.seed, "fleet"))
    outputs = RunOutputs(out)
    until = spec.virtual_seconds if spec.virtual_seconds < LARGE else math.inf
    grid = make_grid(options, prepared, fleet, outputs, until=until)
    instead = _Instead(spec, grid, outputs)
    ending = run_app(options, prepared, grid, outputs, instead)
    status, reason = instead.status, instead.reason
    if not status:
        status, reason = "failed", ending.reason
        if ending.status == "finished":
            reason = "the ServerApp ended without a strategy of flwr.serverapp; there is nothing to compare"
    if ending.traceback:
        (out / "traceback.txt").write_text(ending.traceback)
    write_details(out / "details.npz", fleet, grid.trace, outputs.folds, outputs.messages)
    counts = grid.counts
    return Outcome(
        status=status,
        reason=reason,
        virtual_seconds=grid.seconds,
        device_seconds=grid.device_seconds(),
        bytes_up=counts.bytes_up,
        bytes_down=counts.bytes_down,
        folded=outputs.folded,
        discarded=outputs.discarded,
        lost=counts.failed + counts.expired,
        given_up=counts.cancelled,
        wall_seconds=round(time.monotonic() - began, 3),
        evaluations=instead.evaluations,
    )


class RunOutputs(Outputs):
    """Of a run's decisions keeps those that a comparison is about, in memory: thousands of runs would fill a disk.

    `folds` are tasks, staleness and weights of each fold; `messages` the tasks of message ids that differ from them.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, only_last=True)
        self.current: ArrayRecord | None = None
        self.folded = self.discarded = self.made = 0
        self.folds: list[tuple[list[int], list[int], list[float]]] = []
        self.messages: dict[int, str] = {}

    def metrics(self, server_round: int, version: int, seconds: float, source: str, metrics: Mapping[str, Any]) -> None:
        if source == "server":
            super().metrics(server_round, version, seconds, source, metrics)

    def version(self, version: int, arrays: ArrayRecord) -> None:
        self.current = arrays
        super().version(version, arrays)

    def decision(self, seconds: float, decision: Mapping[str, Any]) -> None:
        match decision["what"]:
            case "fold":
                self.folds.append((decision["tasks"], decision["staleness"], decision["weights"]))
                self.folded += len(decision["tasks"])
            case "step":
                self.made = decision["version"]
            case "discard":
                self.discarded += len(decision["tasks"])
            case "sent":
                self.messages.update(zip(decision["tasks"], decision["messages"], strict=True))

    def decision_text(self, seconds: float, text: str) -> None:
        """What was sent and came back: the trace has it."""

    def close(self) -> None:
        super().close()
        (self.directory / "decisions.jsonl").unlink(missing_ok=True)


class _Over(Exception):
    """The run is over before its limits: `status` and a reason."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class _Instead:
    """Takes the place of `Strategy.start`, once, and the app ends there. `status` is empty until it does."""

    def __init__(self, spec: RunSpec, grid: VirtualGrid, outputs: RunOutputs) -> None:
        self.status = self.reason = ""
        self.evaluations: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        self._spec, self._grid, self._outputs = spec, grid, outputs
        self._evaluate_fn: EvaluateFn | None = None
        self._stage = -1

    def __call__(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Flower's arguments. Ends the app with RunNotRunningException, whatever comes after it: it is not compared."""
        if evaluate_fn is None:
            raise ConfigError("the app gives its strategy no evaluate_fn, by which strategies are compared")
        self._evaluate_fn = evaluate_fn
        strategy = make_strategy(self._spec.preset, self._spec.settings)
        try:
            self._end(*self._start(strategy, grid, initial_arrays, timeout, train_config, evaluate_config))
            if self.status == "completed" and self._outputs.current is not None:
                self._evaluate_once(self._outputs.made, self._outputs.current)
        except _Over as over:
            self._end(over.status, over.reason)
        raise RunNotRunningException

    def _start(
        self, strategy: Any, grid: Grid, arrays: ArrayRecord, timeout: float, train: Any, evaluate: Any
    ) -> tuple[str, str]:
        try:
            strategy.start(
                grid=grid,
                initial_arrays=arrays,
                num_rounds=self._spec.versions,
                timeout=timeout,
                train_config=train,
                evaluate_config=evaluate,
                evaluate_fn=self._evaluate,
            )
        except RunNotRunningException:
            if self._grid.seconds < self._spec.virtual_seconds:
                raise  # a signal
            return "completed", "its time was up"
        except StrategyEnded as ended:
            infinite = ended.status == "diverged" or "rejected: array" in str(ended)
            return "diverged" if infinite else "failed", str(ended)
        return "completed", f"{self._spec.versions} versions"

    def _end(self, status: str, reason: str) -> None:
        self.status, self.reason = status, reason

    def _evaluate(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Evaluates where it is time: evaluations come thick at first, in the squares of even steps, as accuracy does."""
        spec = self._spec
        if spec.virtual_seconds < LARGE:
            share = self._grid.seconds / spec.virtual_seconds
        else:
            share = self._outputs.made / spec.versions
        stage = int(spec.evaluations * math.sqrt(share))
        if stage <= self._stage:
            return None
        self._stage = stage
        return self._evaluate_once(server_round, arrays)

    def _evaluate_once(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Evaluates a version that was not yet. Raises _Over where the run ends with it."""
        made, rows = self._outputs.made, self.evaluations
        if rows["version"] and rows["version"][-1] == made:
            return None
        assert self._evaluate_fn is not None
        found = self._evaluate_fn(server_round, arrays)
        if found is None:
            return None
        plain: Mapping[str, Any] = found
        told = {name: float(plain.get(name, math.nan)) for name in ("accuracy", "loss", "slow_accuracy")}
        if "accuracy" not in found:
            raise ConfigError(f"the app's evaluate_fn gives {', '.join(found) or 'nothing'}; it needs accuracy")
        for name in ("accuracy", "loss"):
            if name in found and math.isnan(told[name]):
                raise _Over("diverged", f"version {made}: {name} is NaN")
        grid, counts = self._grid, self._grid.counts
        row = {
            "version": made,
            "virtual_seconds": grid.seconds,
            "device_seconds": grid.device_seconds(),
            "bytes_up": counts.bytes_up,
            "bytes_down": counts.bytes_down,
            "folded": self._outputs.folded,
            **told,
        }
        for name, value in row.items():
            rows[name].append(value)
        if self._spec.stop_at is not None and told[self._spec.metric] >= self._spec.stop_at:
            raise _Over("completed", "it reached its target")
        return found
