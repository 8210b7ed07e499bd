"""Run a Flower app folder in Flower's own simulation engine.

    python tests/flower/reference.py APPDIR NODES ['key=value ...']

The run config is what the app's pyproject.toml gives, with the third argument (TOML values) over it. No network is used.
The exit code is 0 where the ServerApp returned, and 1 with its traceback where it raised.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path


def simulate(app_dir: Path, nodes: int, overrides: str) -> None:
    """Run the app of `app_dir` on `nodes` simulated nodes, one Ray worker a CPU; raises what the ServerApp raised.

    Does what Flower's simulation process does with an app it was handed: the public `run_simulation` takes loaded apps
    only, and gives them an empty run config.
    """
    from flwr.app import Context, RecordDict
    from flwr.common.config import get_fused_config_from_dir, get_project_config, parse_config_args
    from flwr.common.constant import SUPERLINK_NODE_ID
    from flwr.simulation.run_simulation import _run_simulation
    from flwr.supercore.constant import NOOP_FEDERATION_ID
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity
    from flwr.supercore.telemetry import EventType

    run = Run.create_empty(run_id=1)
    run.primary_task_id = 1
    run.federation_id = NOOP_FEDERATION_ID
    run.override_config = parse_config_args([overrides] if overrides else None)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run.run_id, SUPERLINK_NODE_ID
    components = get_project_config(app_dir)["tool"]["flwr"]["app"]["components"]
    context = Context(
        run_id=run.run_id,
        node_id=SUPERLINK_NODE_ID,
        node_config={},
        state=RecordDict(),
        run_config=get_fused_config_from_dir(app_dir, run.override_config),
    )
    _run_simulation(
        num_supernodes=nodes,
        exit_event=EventType.FLWR_SIMULATION_RUN_LEAVE,
        server_app_attr=components["serverapp"],
        client_app_attr=components["clientapp"],
        server_app_context=context,
        app_dir=str(app_dir),
        run=run,
        backend_config={
            "client_resources": {"num_cpus": 1},
            "init_args": {"num_cpus": min(nodes, os.cpu_count() or 1)},
        },
        is_app=True,
    )


def main(arguments: list[str]) -> None:
    """Run with the command line's arguments, in an environment that keeps Flower and Ray to themselves."""
    if len(arguments) not in (2, 3):
        sys.exit("usage: reference.py APPDIR NODES ['key=value ...']")
    with tempfile.TemporaryDirectory() as home:
        os.environ |= {
            "FLWR_HOME": home,
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        simulate(Path(arguments[0]).resolve(), int(arguments[1]), " ".join(arguments[2:]))


if __name__ == "__main__":
    main(sys.argv[1:])
