"""`fedpace simulate`: a Flower app on a simulated fleet, from the first round to `result.json`."""

from __future__ import annotations

import gc
import logging
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from flwr.serverapp.strategy import Result
from rich.console import Console
from rich.table import Table

from fedpace.clients.training.declaration import declared_mods, declared_training
from fedpace.errors import ConfigError
from fedpace.hosting.app import AppFolder
from fedpace.hosting.config import Config, merge_config
from fedpace.hosting.flower import SUPERLINK_NODE_ID, become, load_client_app, make_run
from fedpace.hosting.onethread import in_turns
from fedpace.hosting.outputs import EXIT_CODES, Outputs, write_result
from fedpace.hosting.seeds import derive_seed, seed_globals
from fedpace.hosting.serverapp import Ending, run_serverapp
from fedpace.hosting.virtualtime import virtual_time
from fedpace.simulations.fleets import SimulatedFleet, load_fleet
from fedpace.simulations.grid import VirtualGrid
from fedpace.simulations.progress import SimulationProgress, told_seconds
from fedpace.simulations.taskgrid import TaskGrid
from fedpace.simulations.work import Executor

log = logging.getLogger("fedpace.simulations")

EXECUTORS = ("auto", "inline", "pool", "fused")


@dataclass(frozen=True)
class SimulationOptions:
    """What the command line says. `workers` is None where the executor chooses; `steps` are those of a task of which
    nobody says how many it takes."""

    app: AppFolder
    devices: int
    fleet: str
    executor: str
    workers: int | None
    device: str
    steps: float
    overrides: Config
    seed: int
    initial_model: Path | None
    out: Path


@dataclass(frozen=True)
class Prepared:
    """An app whose ClientApp is loaded and ready to train, for runs of one seed."""

    run_id: int
    run_config: Config
    executor: Executor


def prepare(options: SimulationOptions, *, otherwise: str = "pool") -> Prepared:
    """Loads the ClientApp, and makes this process one of its runs. `otherwise`: see `make_executor`.

    Raises ConfigError where something does not fit."""
    run_config = merge_config(options.app.config, options.overrides, "--run-config")
    run_id = derive_seed(options.seed, "run") >> 1
    become(run_id, SUPERLINK_NODE_ID)
    quiet_flower()
    return Prepared(run_id, run_config, make_executor(options, run_id, run_config, otherwise))


def make_grid(
    options: SimulationOptions,
    prepared: Prepared,
    fleet: SimulatedFleet,
    outputs: Outputs,
    *,
    until: float = math.inf,
    progress: Callable[[VirtualGrid], None] = lambda grid: None,
) -> VirtualGrid:
    """A fleet for an app that is ready. `until`: see `VirtualGrid`."""
    run = make_run(options.app, prepared.run_id, options.overrides)
    executor, seed, steps = prepared.executor, options.seed, options.steps
    return VirtualGrid(run, fleet, executor, outputs, seed=seed, default_steps=steps, until=until, progress=progress)


def run_app(
    options: SimulationOptions,
    prepared: Prepared,
    grid: VirtualGrid,
    outputs: Outputs,
    instead: Callable[..., Result] | None = None,
) -> Ending:
    """Runs the ServerApp to its end. `instead` is called in the place of the first `Strategy.start`, with its arguments."""
    gc.collect()
    gc.freeze()  # what is here now stays, and need not be looked through again
    gc.set_threshold(20_000, 20, 20)
    with stopped_by_signals(grid), virtual_time(grid.now, grid.sleep), in_turns(grid) as grid.turns:
        return run_serverapp(
            options.app,
            grid,
            outputs,
            run_id=prepared.run_id,
            run_config=prepared.run_config,
            seed=options.seed,
            seconds=grid.now,
            initial_model=options.initial_model,
            instead=instead,
        )


def simulate(options: SimulationOptions) -> int:
    """Runs a simulation to its end. Returns the exit code; raises ConfigError where the configuration is wrong."""
    merge_config(options.app.config, options.overrides, "--run-config")  # which is quicker than what follows
    fleet = load_fleet(options.fleet, options.devices, derive_seed(options.seed, "fleet"))
    started = time.monotonic()
    prepared = prepare(options)
    outputs = Outputs(options.out, only_last=True)
    try:
        with SimulationProgress(options.devices) as progress:

            def look(grid: VirtualGrid) -> None:
                progress.metrics(outputs.latest_metrics)
                progress.update(grid.now(), outputs.latest, grid.counts.received)

            grid = make_grid(options, prepared, fleet, outputs, progress=look)
            began = time.monotonic()
            ending = run_app(options, prepared, grid, outputs)
    finally:
        prepared.executor.close()
    grid.trace.write(options.out / "trace.npz")
    result = make_result(options, grid, ending, outputs, began - started, time.monotonic() - began)
    write_result(options.out, result)
    report(options, ending, result)
    return EXIT_CODES[ending.status]


def make_executor(options: SimulationOptions, run_id: int, run_config: Config, otherwise: str = "pool") -> Executor:
    """The executor asked for. `auto` is `fused` where the ClientApp is a `LocalTraining`'s own and can be compiled for
    many devices, and `otherwise` elsewhere."""
    name = options.executor
    if name in ("auto", "fused"):
        fused = _fused(options, run_id, run_config, needed=name == "fused" or options.device != "cpu")
        if fused is not None:
            return fused
        name = otherwise
    if options.device != "cpu":
        raise ConfigError(
            f"--device {options.device}: executor {name} leaves the device to the app; only fused takes one"
        )
    if name == "inline":
        from fedpace.simulations.executors.inline import InlineExecutor

        return InlineExecutor(options.app.directory, run_id, options.devices, run_config)
    from fedpace.simulations.executors.pool import PoolExecutor

    return PoolExecutor(options.app.directory, run_id, options.devices, run_config, workers=options.workers)


def _fused(options: SimulationOptions, run_id: int, run_config: Config, *, needed: bool) -> Executor | None:
    """The executor `fused`; None where the app does not allow it and it is not needed."""
    seed_globals(derive_seed(options.seed, "clientapp"))
    app = load_client_app(options.app)
    training, mods = declared_training(app), declared_mods(app)
    if training is None:
        if needed:
            raise ConfigError(
                f"--executor fused: the ClientApp of {options.app.name} is not what LocalTraining.client_app() returns, "
                "without mods that act before training; declare its local work that way, or use --executor pool"
            )
        return None
    if options.devices > (there := len(training.federation.partitions)):
        raise ConfigError(
            f"--devices {options.devices}: the data of {options.app.name} have {there} partitions, one a device; "
            "choose fewer devices, or make more partitions"
        )
    from fedpace.simulations.executors.fused import FusedExecutor
    from fedpace.simulations.executors.modded import ModdedExecutor

    try:
        fused = FusedExecutor(training, workers=options.workers or 1, device=options.device, run_config=run_config)
        return ModdedExecutor(fused, mods, run_id, options.devices, run_config) if mods else fused
    except ConfigError as error:
        if needed:
            raise
        log.warning("executor fused cannot, so another one does: %s", error)
        return None


def quiet_flower() -> None:
    """A line a round is too much at thousands of rounds a minute; FEDPACE_LOG=info shows them all the same."""
    flower = logging.getLogger("flwr")
    flower.propagate = False  # it has a handler of its own
    if "FEDPACE_LOG" not in os.environ:
        flower.setLevel(logging.WARNING)


@contextmanager
def stopped_by_signals(grid: TaskGrid) -> Iterator[None]:
    """The first signal lets the run end with what it has, the second one ends the process."""

    def stop(number: int, frame: FrameType | None) -> None:
        log.info("stopping; once more to stop at once")
        grid.stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_result(
    options: SimulationOptions, grid: TaskGrid, ending: Ending, outputs: Outputs, preparing: float, running: float
) -> dict[str, Any]:
    """What `result.json` says: what a server's says, and what only a simulation knows."""
    counts, watch = grid.counts, ending.watch
    reason = "the simulation was told to stop" if ending.status == "interrupted" else ending.reason
    return {
        "status": ending.status,
        "reason": reason,
        "run_id": grid.run.run_id,
        "seed": options.seed,
        "versions": watch.versions,
        "final": watch.final,
        "updates": {
            "received": counts.received,
            "folded": watch.folded if watch.seen else None,
            "discarded": max(0, counts.received - watch.folded) if watch.seen else None,
            "rejected": counts.rejected,
            "duplicate": 0,
        },
        "lost": [],
        "bytes_up": counts.bytes_up,
        "bytes_down": counts.bytes_down,
        "wall_seconds": round(running, 3),
        "training_seconds": round(watch.training_seconds, 3),
        "model_sha256": outputs.model_sha256,
        "virtual_seconds": round(grid.seconds, 6),
        "device_seconds": round(counts.device_seconds, 6),
        "trace_sha256": grid.trace.sha256(),
        "devices": options.devices,
        "fleet": grid.fleet.name,
        "tasks": {
            "sent": counts.sent,
            "failed": counts.failed,
            "expired": counts.expired,
            "cancelled": counts.cancelled,
            "computed": counts.computed,
        },
        "events": grid.events,
        "preparing_seconds": round(preparing, 3),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }


def report(options: SimulationOptions, ending: Ending, result: dict[str, Any]) -> None:
    if ending.traceback:
        log.error("the ServerApp raised:\n%s", ending.traceback.rstrip())
    if ending.status == "failed":
        log.error("the run failed: %s", ending.reason)
    Console(width=None if sys.stdout.isatty() else 100).print(_summary(options, result))


def _summary(options: SimulationOptions, result: dict[str, Any]) -> Table:
    updates, tasks, wall = result["updates"], result["tasks"], max(result["wall_seconds"], 1e-9)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("status", result["status"] + (f": {result['reason']}" if result["reason"] else ""))
    table.add_row("fleet", f"{options.devices:,} devices of {result['fleet']}")
    for name, value in (result["final"] or {}).items():
        table.add_row(str(name), f"{value:.4g}" if isinstance(value, float) else str(value))
    table.add_row("versions", f"{result['versions']:,}")
    table.add_row("updates", f"{updates['received']:,} received, {updates['folded'] or 0:,} folded")
    table.add_row("tasks", ", ".join(f"{tasks[name]:,} {name}" for name in ("sent", "failed", "expired", "cancelled")))
    table.add_row("virtual time", told_seconds(result["virtual_seconds"]))
    table.add_row("device time", told_seconds(result["device_seconds"]))
    table.add_row("took", f"{told_seconds(wall)}, {updates['received'] / wall:,.0f} updates a second")
    table.add_row("memory", f"{result['peak_mb']:,.0f} MB at most, workers apart")
    table.add_row("results", str(options.out))
    return table
