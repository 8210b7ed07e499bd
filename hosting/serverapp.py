"""Runs a ServerApp against any grid, watches it, and says how it ended."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from fedpace.errors import FedpaceError
from fedpace.hosting.app import AppFolder
from fedpace.hosting.config import Config
from fedpace.hosting.flower import SUPERLINK_NODE_ID, RunNotRunningException, load_server_app, make_context
from fedpace.hosting.outputs import Outputs, load_model
from fedpace.hosting.seeds import derive_seed, seed_globals
from fedpace.hosting.watch import Watch, watch_strategies

log = logging.getLogger("fedpace.serverapp")


@dataclass(frozen=True)
class Ending:
    """How a ServerApp ended: `status` is finished, failed or interrupted."""

    status: str
    reason: str
    traceback: str
    watch: Watch


def run_serverapp(
    app: AppFolder,
    grid: Grid,
    outputs: Outputs,
    *,
    run_id: int,
    run_config: Config,
    seed: int,
    seconds: Callable[[], float],
    initial_model: Path | None = None,
    ready: Callable[[], None] = lambda: None,
    ended: Callable[[], None] = lambda: None,
    instead: Callable[..., Result] | None = None,
) -> Ending:
    """Loads the app, calls `ready` (which may wait for devices), runs it to its end, calls `ended`, and waits for its
    files. `instead` is what the first strategy that is started is replaced with: see `Watch`.

    Never raises for what user code does: its exceptions and exits are in the returned `Ending`.
    """
    watch = Watch(outputs, seconds, None if initial_model is None else load_model(initial_model), instead)
    status, reason, trace = "finished", "", ""
    try:
        seed_globals(derive_seed(seed, "serverapp"))
        server_app = load_server_app(app)
        watch_strategies(watch)
        ready()
        seed_globals(derive_seed(seed, "serverapp"))
        server_app(grid, make_context(run_id, SUPERLINK_NODE_ID, {}, run_config, RecordDict()))
        watch.refuse_initial("the app starts no strategy with a model of its own")
        if not watch.seen:
            log.warning("the app used no Flower strategy: there are no final metrics and no model file")
    except RunNotRunningException:
        status, reason = "interrupted", "the server was told to stop"
    except FedpaceError as error:
        status, reason = "failed", str(error)
    except BaseException as error:  # noqa: BLE001 - user code may raise anything, and exit
        status, reason = "failed", f"{type(error).__name__}: {error}"
        trace = "".join(traceback.format_exception(_without_our_frames(error)))
    ended()
    try:
        outputs.close()
    except OSError as error:
        status, reason = "failed", f"the model could not be written to {outputs.directory}: {error}"
    return Ending(status, reason, trace, watch)


def _without_our_frames(error: BaseException) -> BaseException:
    """The exception with a traceback that begins in the app, not in the code that called it."""
    frames: Any = error.__traceback__
    while frames is not None and frames.tb_next is not None and frames.tb_frame.f_globals.get("__name__") == __name__:
        frames = frames.tb_next
    return error.with_traceback(frames)
