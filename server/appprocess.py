"""The process of a ServerApp: `python -m fedpace.server.appprocess`, started by the coordinator.

User code that hangs, leaks or holds the interpreter lock costs this process, never a heartbeat.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

from fedpace.errors import FedpaceError
from fedpace.hosting.app import AppFolder, load_app_folder
from fedpace.hosting.flower import SUPERLINK_NODE_ID, become, make_run
from fedpace.hosting.outputs import Outputs
from fedpace.hosting.processes import log_to_stderr, parent_socket
from fedpace.hosting.recording import Recorder
from fedpace.hosting.serverapp import Ending, run_serverapp
from fedpace.hosting.settings import ServerSettings, read_settings
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.frames import FrameSocket
from fedpace.protocol.values import encode_values
from fedpace.server.grid import FleetGrid

SPEC = "FEDPACE_SERVERAPP"
"""Environment variable that says what to run, as JSON: see `server.link`."""


def main() -> None:
    connection = FrameSocket(parent_socket(sys.argv[1:]))
    log_to_stderr()
    spec: dict[str, Any] = json.loads(os.environ[SPEC])
    try:
        outcome = _run(connection, spec)
    except FedpaceError as error:
        outcome = pb.Outcome(status="failed", reason=str(error))
    sys.stdout.flush()
    connection.send(pb.AppMessage(outcome=outcome))
    os._exit(0)  # threads of the app must not keep the process alive


def _run(connection: FrameSocket, spec: dict[str, Any]) -> pb.Outcome:
    app = load_app_folder(Path(spec["app"]))
    settings = read_settings(ServerSettings, app.settings, "server")
    run_id = int(spec["run_id"])
    become(run_id, SUPERLINK_NODE_ID)
    initial_model = Path(spec["initial_model"]) if spec["initial_model"] else None
    outputs = Outputs(Path(spec["out"]), keep_versions=settings.keep_versions)
    recorder = _recorder(app, spec, initial_model)
    run = make_run(app, run_id, spec["overrides"])
    grid = FleetGrid(connection, Path(spec["directory"]), outputs, run, recorder)

    def ready() -> None:
        gc.freeze()  # what is here now stays, and need not be looked through again
        connection.send(pb.AppMessage(ready=pb.Ready()))
        grid.wait_for_start()

    ending = run_serverapp(
        app,
        grid,
        outputs,
        run_id=run_id,
        run_config=spec["run_config"],
        seed=int(spec["seed"]),
        seconds=grid.now,
        initial_model=initial_model,
        ready=ready,
        ended=grid.end,
    )
    if recorder is not None:
        recorder.close(ending.status, outputs.directory / "decisions.jsonl")
    return _outcome(ending, outputs)


def _recorder(app: AppFolder, spec: dict[str, Any], initial_model: Path | None) -> Recorder | None:
    if spec["record"] is None:
        return None
    return Recorder(
        Path(spec["record"]),
        app,
        run_id=int(spec["run_id"]),
        seed=int(spec["seed"]),
        overrides=spec["overrides"],
        initial_model=initial_model,
    )


def _outcome(ending: Ending, outputs: Outputs) -> pb.Outcome:
    watch = ending.watch
    outcome = pb.Outcome(
        status=ending.status,
        reason=ending.reason,
        traceback=ending.traceback,
        versions=watch.versions,
        watched=watch.seen,
        folded=watch.folded,
        model_sha256=outputs.model_sha256 or "",
        training_seconds=watch.training_seconds,
    )
    if watch.final is not None:
        encode_values(watch.final, outcome.final)
    return outcome


if __name__ == "__main__":
    main()
