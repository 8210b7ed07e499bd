"""`fedpace server`: one run, from the first device to `result.json`."""

from __future__ import annotations

import asyncio
import logging
import secrets
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from fedpace.certs.identity import Identity
from fedpace.errors import ConfigError
from fedpace.hosting.app import AppFolder
from fedpace.hosting.config import Config, merge_config
from fedpace.hosting.outputs import EXIT_CODES, to_json, write_result
from fedpace.hosting.settings import ServerSettings, read_settings
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.chunks import WINDOW_OPTIONS, add_fleet_service
from fedpace.protocol.limits import MESSAGE_BYTES
from fedpace.protocol.values import decode_values, encode_values
from fedpace.server.coordinator import Coordinator
from fedpace.server.link import AppLink, AppSpec
from fedpace.server.service import FleetService

log = logging.getLogger("fedpace.server")

_TICK_SECONDS = 0.25


@dataclass(frozen=True)
class ServerOptions:
    """What the command line says. `identity` is None with --insecure."""

    app: AppFolder
    address: str
    state: Path
    out: Path
    identity: Identity | None
    overrides: Config
    min_nodes: int
    initial_model: Path | None
    record: Path | None
    seed: int


async def serve(options: ServerOptions) -> int:
    """Runs the server until its ServerApp has ended. Returns the exit code.

    Raises ConfigError where the address cannot be taken or the configuration is wrong.
    """
    settings = read_settings(ServerSettings, options.app.settings, "server")
    run_config = merge_config(options.app.config, options.overrides, "--run-config")
    run_id = secrets.randbits(63)
    directory = options.state / "runs" / str(run_id)
    directory.mkdir(parents=True)
    options.out.mkdir(parents=True, exist_ok=True)
    run = pb.Run(run_id=run_id, run_config=encode_values(run_config), seed=options.seed)
    coordinator = Coordinator(options.app, run, settings, directory)
    spec = AppSpec(
        app=str(options.app.directory),
        run_id=run_id,
        overrides=options.overrides,
        run_config=run_config,
        seed=options.seed,
        directory=str(directory),
        out=str(options.out),
        initial_model=None if options.initial_model is None else str(options.initial_model),
        record=None if options.record is None else str(options.record),
    )
    try:
        server = await _listen(options, coordinator)
        outcome = await _run(coordinator, AppLink(coordinator, spec, options.min_nodes))
        coordinator.close("the run is over")
        await server.stop(grace=1.0)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    result = make_result(coordinator, outcome)
    write_result(options.out, result)
    _report(outcome, result, options.out)
    return EXIT_CODES[outcome.status]


async def _listen(options: ServerOptions, coordinator: Coordinator) -> grpc.aio.Server:
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", MESSAGE_BYTES),
            ("grpc.max_send_message_length", MESSAGE_BYTES),
            ("grpc.so_reuseport", 0),
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            *WINDOW_OPTIONS,
        ]
    )
    add_fleet_service(FleetService(coordinator, insecure=options.identity is None), server)
    try:
        if options.identity is None:
            port = server.add_insecure_port(options.address)
        else:
            identity = options.identity
            credentials = grpc.ssl_server_credentials(
                [(identity.key, identity.cert)], root_certificates=identity.ca, require_client_auth=True
            )
            port = server.add_secure_port(options.address, credentials)
    except RuntimeError as error:
        raise ConfigError(f"cannot listen on {options.address}: is the port taken? ({error})") from None
    await server.start()
    host = options.address.rpartition(":")[0]
    how = "without TLS" if options.identity is None else "with TLS and client certificates"
    log.info("listening on %s:%d %s; %s", host, port, how, options.app)
    return server


async def _run(coordinator: Coordinator, link: AppLink) -> pb.Outcome:
    """Waits for the ServerApp to end; a signal drains first, a second one does not wait."""
    running = asyncio.create_task(link.run())
    drain = asyncio.Event()
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        if drain.is_set():
            link.kill()
        else:
            log.info("stopping: work under way has %g s to end", coordinator.settings.drain_seconds)
            coordinator.drain("the server is stopping")
            loop.call_later(coordinator.settings.drain_seconds, link.kill)
            drain.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    ticker = asyncio.create_task(_tick(coordinator))
    try:
        outcome = await running
    finally:
        ticker.cancel()  # the signals stay handled: one more must not cut off the writing of the result
    if drain.is_set() and outcome.status != "finished":
        outcome.status, outcome.reason, outcome.traceback = "interrupted", "the server was told to stop", ""
    return outcome


async def _tick(coordinator: Coordinator) -> None:
    while True:
        await asyncio.sleep(_TICK_SECONDS)
        coordinator.tick()


def make_result(coordinator: Coordinator, outcome: pb.Outcome) -> dict[str, Any]:
    """What `result.json` says. Counts of folded and discarded updates are null where no strategy was seen."""
    counts = coordinator.counts
    return {
        "status": outcome.status,
        "reason": outcome.reason,
        "run_id": coordinator.run.run_id,
        "seed": coordinator.run.seed,
        "versions": outcome.versions,
        "final": decode_values(outcome.final) if outcome.watched else None,
        "updates": {
            "received": counts.received,
            "folded": outcome.folded if outcome.watched else None,
            "discarded": max(0, counts.received - outcome.folded) if outcome.watched else None,
            "rejected": counts.rejected,
            "duplicate": counts.duplicate,
        },
        "lost": counts.lost,
        "bytes_up": counts.bytes_up,
        "bytes_down": counts.bytes_down,
        "wall_seconds": round(coordinator.seconds, 3),
        "training_seconds": round(outcome.training_seconds, 3),
        "model_sha256": outcome.model_sha256 or None,
    }


def _report(outcome: pb.Outcome, result: dict[str, Any], out: Path) -> None:
    if outcome.traceback:
        log.error("the ServerApp raised:\n%s", outcome.traceback.rstrip())
    if result["lost"]:
        log.warning("lost on the way: %d tasks, named in %s", len(result["lost"]), out / "result.json")
    if outcome.status == "failed":
        log.error("the run failed: %s", outcome.reason)
    else:
        log.info("the run is %s after %.1f s; see %s", outcome.status, result["wall_seconds"], out)
    print(to_json(result))
