"""Executor `inline`: any ClientApp, in this process, one computation after another. For debugging, and for tests."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedpace.errors import PayloadError
from fedpace.hosting.app import load_app_folder
from fedpace.hosting.config import Config
from fedpace.hosting.flower import identity_kept, load_client_app
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.records import decode, encode
from fedpace.simulations.executors.device import Devices, Task, unreadable
from fedpace.simulations.executors.packing import Blobs, PackedContent, failed_answer, make_answer, make_offer
from fedpace.simulations.work import Answer, Computation, Content


class InlineExecutor:
    """An app, or its folder, run as any of `devices` devices. `run_config` has the app's defaults in it.

    What the app does to the global generators, to torch's number of threads (one, meanwhile) and to who Flower takes
    this process for is undone after each `run`; the rest of the process is the app's to change. Raises AppError for a
    folder that is no app; what the app's own code raises when it is imported passes through.
    """

    cohort = 1
    keeps_state = True

    def __init__(
        self,
        app: ClientApp | Path,
        run_id: int,
        devices: int,
        run_config: Config | None = None,
        *,
        check_updates: bool = True,
    ) -> None:
        with globals_kept():
            self._app = _Interruptible(load_client_app(load_app_folder(app)) if isinstance(app, Path) else app)
        self._run_id = run_id
        self._devices = Devices(self._app, run_id, devices, run_config or {}, check_updates=check_updates)

    def steps(self, device: int, message_type: str, config: Mapping[str, Any]) -> float | None:
        return None

    def run(self, computations: Sequence[Computation]) -> list[Answer]:
        """As the contract says; a Ctrl-C passes through."""
        self._app.interrupted = False
        with identity_kept(), globals_kept():
            return [self._compute(computation) for computation in computations]

    def close(self) -> None:
        """There is nothing to end."""

    def _compute(self, computation: Computation) -> Answer:
        own = Blobs()
        try:
            content, blobs = _packed(computation.content)
            payload = content.payload(computation.config_name, computation.config)
            state = pb.Payload() if computation.state is None else encode(computation.state, own.put)
        except PayloadError as error:
            return failed_answer(unreadable(error))
        offer = make_offer(self._run_id, computation, payload)
        task = Task(offer, computation.device, computation.node_id, computation.seed, state)
        record = self._devices.work(task, lambda blob: (own if blob in own else blobs).get(blob), own.put)
        if self._app.interrupted:
            raise KeyboardInterrupt
        after = decode(record.state, own.get) if record.HasField("state") else None
        return make_answer(record.reply, after, own.get)


def _packed(content: Content) -> tuple[PackedContent, Blobs]:
    """What is sent to many alike is written once."""
    if "inline" not in content.kept:
        blobs = Blobs()
        content.kept["inline"] = PackedContent(content.records, blobs.put, blobs.get), blobs
    found: tuple[PackedContent, Blobs] = content.kept["inline"]
    return found


class _Interruptible(ClientApp):
    """An app during which Ctrl-C may be pressed: that is no failure of its own."""

    def __init__(self, app: ClientApp) -> None:
        super().__init__()
        self._app = app
        self.interrupted = False

    def __call__(self, message: Message, context: Context) -> Message:
        try:
            return self._app(message, context)
        except KeyboardInterrupt:
            self.interrupted = True
            raise


@contextmanager
def globals_kept() -> Iterator[None]:
    """The global generators, and torch's number of threads, are afterwards what they were."""
    torch = sys.modules.get("torch")
    python, legacy = random.getstate(), np.random.get_state()
    threads, state = (torch.get_num_threads(), torch.get_rng_state()) if torch is not None else (1, None)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        if torch is not None:
            torch.set_num_threads(threads)
            torch.set_rng_state(state)
