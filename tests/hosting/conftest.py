"""What strategies are watched with. Watching changes Flower's classes for good; that is undone after every test."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.server.history import History
from flwr.server.strategy import Strategy as LegacyStrategy
from flwr.serverapp.strategy import Strategy
from safetensors.numpy import load_file

from fedpace.hosting.outputs import Outputs
from fedpace.hosting.watch import Watch, watch_strategies

Arrays = dict[str, np.ndarray[Any, Any]]


def _classes(base: type) -> Iterator[type]:
    yield base
    subclasses: list[type] = base.__subclasses__()
    for cls in subclasses:
        yield from _classes(cls)


@pytest.fixture(autouse=True)
def classes_as_they_were() -> Iterator[None]:
    bases: list[type] = [Strategy, LegacyStrategy, History]
    before = {cls: dict(vars(cls)) for base in bases for cls in _classes(base)}
    yield
    for cls, attributes in before.items():
        for name in set(vars(cls)) - set(attributes):
            delattr(cls, name)
        for name, value in attributes.items():
            if vars(cls)[name] is not value:
                setattr(cls, name, value)


class Seen:
    """A watch at work, and what it wrote down."""

    def __init__(self, out: Path, model: Arrays | None) -> None:
        self.out = out
        self.outputs = Outputs(out)
        self.watch = Watch(self.outputs, lambda: 0.0, model)
        watch_strategies(self.watch)

    def metrics(self) -> list[tuple[str, int, dict[str, Any]]]:
        self.outputs.close()
        entries = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        return [(entry["source"], entry["round"], entry["metrics"]) for entry in entries]

    def versions(self) -> list[Arrays]:
        self.outputs.close()
        return [load_file(path) for path in sorted((self.out / "versions").iterdir())]


See = Callable[..., Seen]


@pytest.fixture
def see(tmp_path: Path) -> Iterator[See]:
    """Begins to watch, with the model of --initial-model if one is given."""
    made: list[Seen] = []

    def make(model: Arrays | None = None) -> Seen:
        made.append(Seen(tmp_path / "out", model))
        return made[-1]

    yield make
    for seen in made:
        seen.outputs.close()
