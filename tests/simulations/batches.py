"""Computations for executors, and what came of them in a form that compares bit by bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedpace.simulations.work import Answer, Computation, Content
from tests.generators import bits

APPS = Path(__file__).with_name("apps")
CONDUCT = APPS / "conduct"
RUN_ID, DEVICES = 77, 1000
RUN_CONFIG: dict[str, Any] = {"lr": 0.5, "name": "x", "deep": True}


def content(*sizes: int, **config: Any) -> Content:
    """A float32 array of ones for each size, and a config."""
    arrays = ArrayRecord({f"array-{index}": Array(np.ones(size, np.float32)) for index, size in enumerate(sizes)})
    return Content(RecordDict({"arrays": arrays, "config": ConfigRecord(config)}))


def computation(
    sent: Content,
    do: str = "",
    *,
    task: int = 1,
    device: int = 4,
    seed: int = 5,
    message_type: str = "train",
    config_name: str = "config",
    state: RecordDict | None = None,
    **config: Any,
) -> Computation:
    own: Mapping[str, Any] = {**({"do": do} if do else {}), **config}
    return Computation(
        task=task,
        device=device,
        node_id=(1 << 62) + device,
        message_type=message_type,
        content=sent,
        config_name=config_name,
        config=own,
        group_id="3",
        created_at=12.5,
        ttl=600.0,
        seed=seed,
        state=state,
    )


def outcomes(answers: Sequence[Answer]) -> list[Any]:
    """Everything that answers say, as something that compares equal only where every bit is equal."""
    return [
        (
            None if answer.update is None else bits(answer.update.content()),
            {name: bits(value) for name, value in answer.metrics.items()},
            answer.code,
            answer.reason,
            None if answer.state is None else bits(answer.state),
        )
        for answer in answers
    ]
