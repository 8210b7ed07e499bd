"""`fedpace simulate --replay`: a recorded run once more, with the same app, held against its decision log."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedpace.errors import ConfigError, RunError
from fedpace.hosting.app import AppFolder
from fedpace.hosting.config import merge_config
from fedpace.hosting.flower import SUPERLINK_NODE_ID, become, make_run
from fedpace.hosting.outputs import EXIT_CODES, Outputs, write_result
from fedpace.hosting.recording import Recording, load_recording
from fedpace.hosting.serverapp import Ending, run_serverapp
from fedpace.hosting.virtualtime import virtual_time
from fedpace.simulations.replaygrid import ReplayGrid
from fedpace.simulations.run import (
    SimulationOptions,
    make_result,
    quiet_flower,
    report,
    stopped_by_signals,
)

log = logging.getLogger("fedpace.simulations")


def replay(app: AppFolder, directory: Path, out: Path) -> int:
    """Replays a recording to its end. Returns the exit code: 0 if it was, and every decision is the recorded one.

    Raises ConfigError for a recording that is none, is damaged, or is another app's.
    """
    recording = load_recording(directory)
    _check_app(app, recording)
    run_config = merge_config(app.config, recording.overrides, "the recording's --run-config")
    become(recording.run_id, SUPERLINK_NODE_ID)
    quiet_flower()
    outputs = Outputs(out, only_last=True)
    grid = ReplayGrid(make_run(app, recording.run_id, recording.overrides), recording, outputs)
    began = time.monotonic()
    with stopped_by_signals(grid), virtual_time(lambda: grid.seconds, grid.sleep):
        ending = run_serverapp(
            app,
            grid,
            outputs,
            run_id=recording.run_id,
            run_config=run_config,
            seed=recording.seed,
            seconds=grid.now,
            initial_model=recording.initial_model,
            ended=grid.end,
        )
    ending, compared = _compare(grid, recording, ending, outputs)
    grid.trace.write(out / "trace.npz")
    options = SimulationOptions(
        app=app,
        devices=grid.fleet.size,
        fleet=grid.fleet.name,
        executor="recorded",
        workers=None,
        device="cpu",
        steps=0.0,
        overrides=recording.overrides,
        seed=recording.seed,
        initial_model=recording.initial_model,
        out=out,
    )
    result = make_result(options, grid, ending, outputs, 0.0, time.monotonic() - began) | {"replay": compared}
    if grid.halted and ending.status == "interrupted":
        result["reason"] = "the server was told to stop, as recorded"
    write_result(out, result)
    report(options, ending, result)
    return EXIT_CODES[ending.status]


def _check_app(app: AppFolder, recording: Recording) -> None:
    if app.name != recording.app["name"]:
        raise ConfigError(
            f"--app: the recording {recording.directory} is of the app {recording.app['name']}, this is {app.name}"
        )
    if app.sha256 != recording.app["sha256"]:
        log.warning("the app is not quite the one recorded (%s): it may decide otherwise", recording.app["sha256"][:12])


def _compare(grid: ReplayGrid, recording: Recording, ending: Ending, outputs: Outputs) -> tuple[Ending, dict[str, Any]]:
    """How the replay ended, and how far it was like the recorded run. To end like a run that failed is no difference."""
    interrupted = ending.status == "interrupted" and not grid.halted
    difference = grid.failure
    if difference is None and recording.complete and not interrupted:
        try:
            difference = recording.first_difference(outputs.directory / "decisions.jsonl")
        except RunError as error:
            difference = str(error)
    if difference is not None:
        failed = ending.status == "failed" and ending.reason != difference
        ending = replace(ending, status="failed", reason=f"{ending.reason}; {difference}" if failed else difference)
    if grid.other_models_from is not None:
        log.warning(
            "from task %d on, other models are sent than were recorded, and the devices answer as they did: another "
            "processor, number of threads or version of a library may round differently",
            grid.other_models_from,
        )
    compared = {
        "recording": str(recording.directory),
        "decisions": outputs.decisions,
        "difference": difference,
        "other_models_from_task": grid.other_models_from,
    }
    return ending, compared
