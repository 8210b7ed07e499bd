"""The coordinator's end of the process that runs the ServerApp: starts it, passes messages, says how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
from dataclasses import asdict, dataclass

from fedpace.hosting.config import Config
from fedpace.hosting.processes import Child, start_child
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.frames import receive
from fedpace.server.appprocess import SPEC
from fedpace.server.coordinator import Coordinator

log = logging.getLogger("fedpace.server")


@dataclass(frozen=True)
class AppSpec:
    """What the ServerApp's process is to run. Plain values: it travels as JSON."""

    app: str
    run_id: int
    overrides: Config
    run_config: Config
    seed: int
    directory: str
    out: str
    initial_model: str | None
    record: str | None


class AppLink:
    """Runs one ServerApp in a process of its own and joins it to the coordinator."""

    def __init__(self, coordinator: Coordinator, spec: AppSpec, min_nodes: int) -> None:
        self._coordinator = coordinator
        self._spec = spec
        self._min_nodes = min_nodes
        self._child: Child | None = None

    async def run(self) -> pb.Outcome:
        """Starts the process and serves it until it ends, however it ends."""
        environment = {**os.environ, SPEC: json.dumps(asdict(self._spec))}
        child = await start_child("fedpace.server.appprocess", environment=environment)
        self._child = child
        self._coordinator.tell_app = child.send
        outcome: pb.Outcome | None = None
        starter: asyncio.Task[None] | None = None
        try:
            while outcome is None and (message := await receive(child.reader, pb.AppMessage)) is not None:
                kind = message.WhichOneof("kind")
                if kind == "push":
                    self._coordinator.push(message.push.task)
                elif kind == "cancel":
                    self._coordinator.cancel(message.cancel.task_ids)
                elif kind == "ready":
                    starter = asyncio.create_task(self._start_when_ready(child))
                elif kind == "outcome":
                    outcome = message.outcome
        finally:
            self._coordinator.tell_app = lambda message: None
            if starter is not None:
                starter.cancel()
            status = await self._end(child)
        return outcome if outcome is not None else _died(status)

    async def _start_when_ready(self, child: Child) -> None:
        coordinator = self._coordinator
        if coordinator.registry.connected < self._min_nodes:
            log.info("waiting for %d devices (%d are here)", self._min_nodes, coordinator.registry.connected)
        while coordinator.registry.connected < self._min_nodes:
            coordinator.fleet_changed.clear()
            await coordinator.fleet_changed.wait()
        child.send(pb.FleetMessage(at=coordinator.seconds, start=pb.Start(status="start")))

    async def _end(self, child: Child) -> int:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(child.wait(), 5.0)
        child.kill()
        return await child.wait()

    def kill(self) -> None:
        """Ends the process now; `run` returns with what is known."""
        if self._child is not None:
            self._child.kill()


def _died(status: int) -> pb.Outcome:
    how = f"with signal {signal.Signals(-status).name}" if status < 0 else f"with exit status {status}"
    return pb.Outcome(status="failed", reason=f"the ServerApp's process ended {how}")
