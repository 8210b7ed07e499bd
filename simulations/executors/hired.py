"""The pool's end of a worker process."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flwr.app import Array, RecordDict

from fedpace.hosting.config import Config
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.mapped import MappedArray
from fedpace.protocol.payloads import all_blobs
from fedpace.protocol.records import decode
from fedpace.protocol.values import encode_values
from fedpace.simulations.executors.packing import make_answer
from fedpace.simulations.executors.peer import Parts, Peer
from fedpace.simulations.executors.segments import Arena
from fedpace.simulations.executors.worker import SETUP, TASK
from fedpace.simulations.work import Answer, Computation

_END_SECONDS = 10.0
_QUEUED_BYTES = 64 << 10
"""A worker that is busy is sent no more than this: it lies in the socket until it is asked for, and nobody waits."""

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Setup:
    """What every worker of a pool is told first."""

    app: Path
    run_id: int
    devices: int
    run_config: Config
    check_updates: bool

    def parts(self) -> Parts:
        run = pb.Run(run_id=self.run_id, run_config=encode_values(self.run_config))
        setup = pb.Setup(app_directory=str(self.app))
        return SETUP.pack(self.devices, self.check_updates), setup.SerializeToString(), run.SerializeToString()


@dataclass
class Job:
    """A computation on its way. `index` is its place among the answers, `deaths` how many workers died of it."""

    index: int
    computation: Computation
    offer: pb.Offer
    state: pb.Payload
    deaths: int = 0
    parts: Parts = field(init=False)
    nbytes: int = field(init=False)
    blobs: list[pb.Blob] = field(init=False)
    """Those of the offer, then those of the state, which were written for this job alone."""
    state_blobs: list[pb.Blob] = field(init=False)

    def __post_init__(self) -> None:
        computation = self.computation
        head = TASK.pack(computation.device, computation.node_id, computation.seed)
        self.parts = (head, self.offer.SerializeToString(), self.state.SerializeToString())
        self.nbytes = sum(map(len, self.parts))
        self.state_blobs = all_blobs(self.state)
        self.blobs = all_blobs(self.offer.payload) + self.state_blobs


class Hired:
    """A worker process. It does jobs in the order given; `jobs` are those it has not answered."""

    def __init__(self, setup: Setup, arena: Arena) -> None:
        """Starts it, in a session of its own, so that no Ctrl-C in a terminal reaches it. What the app prints goes to
        standard error. Raises OSError where the system refuses another process."""
        ours, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fedpace.simulations.executors.worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=2,
                env={**os.environ, **_ONE_THREAD},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self.jobs: deque[Job] = deque()
        self.loaded = False
        self.peer = Peer(ours, arena)
        with contextlib.suppress(ConnectionError):
            self.peer.send(setup.parts())

    @property
    def pid(self) -> int:
        return self._process.pid

    def takes(self, job: Job, given: Sequence[Job], ahead: int) -> bool:
        """Whether a job may be given to it beside others: one is done while `ahead` wait, if they are not large."""
        jobs = [*self.jobs, *given]
        if len(jobs) > ahead:
            return False
        return not jobs or sum(other.nbytes for other in jobs[1:]) + job.nbytes <= _QUEUED_BYTES

    def give(self, jobs: Sequence[Job]) -> None:
        """Sends it jobs that it takes. They are its own even where it has died: whoever listens to it sees that."""
        self.jobs.extend(jobs)
        with contextlib.suppress(ConnectionError):
            for job in jobs:
                self.peer.write(job.parts, job.blobs)
            self.peer.flush()

    def answer(self, parts: Parts) -> tuple[Job, Answer]:
        """What a message from it says, of the first of its jobs. The update's arrays stay where they are."""
        record = pb.SlotRecord.FromString(parts[0])
        get = self.peer.mapped.get
        state = _own(decode(record.state, get)) if record.HasField("state") else None
        reply = record.reply
        views = {blob.name: get(blob) for blob in all_blobs(reply.payload)}
        return self.jobs.popleft(), make_answer(reply, state, lambda blob: views[blob.name])

    def end(self) -> str:
        """Ends it and whatever it started, at once; says how it ended if it already had."""
        self.peer.close()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        try:
            status = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            return "does not end"
        return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"


def _own(records: RecordDict) -> RecordDict:
    """Gives arrays bytes of their own: a state outlives the replies that lie beside it."""
    for record in records.array_records.values():
        for name, array in record.items():
            if isinstance(array, MappedArray):
                record[name] = Array(array.dtype, array.shape, array.stype, array.data)
    return records
