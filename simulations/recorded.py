"""What a recording stands for in a simulation: the fleet, who comes and goes, and the answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedpace.hosting.recording import Arrival, Recording
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.payloads import all_blobs
from fedpace.protocol.updates import PayloadUpdate
from fedpace.simulations.work import Answer, Computation


class RecordedFleet:
    """Who its devices were; everything else about them comes from the recording."""

    def __init__(self, recording: Recording) -> None:
        nodes = {arrival.node_id for arrival in recording.arrivals() if arrival.what == "joined"}
        self.name = f"the recording {recording.directory}"
        self.size = len(nodes)
        self.node_ids = np.array(sorted(nodes) or [0], dtype=np.uint64)


class RecordedPresence:
    """Everything that arrived but answers, in order: who came, who went, what was heard of them."""

    def __init__(self, recording: Recording) -> None:
        self._coming = [row for row in recording.arrivals() if not row.task]
        self._place = 0

    @property
    def next_change(self) -> float:
        return self._coming[self._place].due if self._place < len(self._coming) else math.inf

    def take(self) -> Arrival:
        self._place += 1
        return self._coming[self._place - 1]


class RecordedExecutor:
    """Answers as recorded, whatever is asked now. Raises RunError where the recording's bytes are damaged."""

    cohort = 1
    keeps_state = False

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._answers = {row.task: row for row in recording.arrivals() if row.what == "replied"}

    def steps(self, device: int, message_type: str, config: Mapping[str, Any]) -> float | None:
        return 0.0

    def run(self, computations: Sequence[Computation]) -> list[Answer]:
        return [self._answer(self._answers[computation.task].payload) for computation in computations]

    def _answer(self, payload: pb.Payload | None) -> Answer:
        assert payload is not None, "who replied sent something"
        blobs = {blob.name: self._recording.get(blob) for blob in all_blobs(payload)}

        def get(blob: pb.Blob) -> memoryview:
            return blobs[blob.name]

        update = PayloadUpdate(payload, get)
        return Answer(update, metrics=update.metrics)

    def close(self) -> None:
        """There is nothing to end."""
