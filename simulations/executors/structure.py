"""A model's arrays as one row of float32 numbers, and whether the model can be run for many devices at once."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from flwr.app import ArrayRecord
from numpy.typing import NDArray
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from fedpace.errors import ConfigError, PayloadError
from fedpace.protocol.received import numbers_of

Floats = NDArray[np.float32]

INSTEAD = "choose another executor (pool or inline)"


@dataclass(frozen=True)
class Place:
    """Where an array lies in a row: numbers [start, stop), of a shape; `trained` or constant."""

    name: str
    start: int
    stop: int
    shape: tuple[int, ...]
    trained: bool


class Structure:
    """The arrays of a model's `state_dict`, in its order. Raises ConfigError for models that cannot be fused."""

    def __init__(self, model: nn.Module) -> None:
        _refuse(model)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.places: list[Place] = []
        start = 0
        for name, array in model.state_dict().items():
            stop = start + prod(array.shape)
            self.places.append(Place(name, start, stop, tuple(array.shape), name in trained))
            start = stop
        self.size = start
        """Numbers in a row."""
        self.convolutional = any(isinstance(module, _ConvNd) for module in model.modules())
        if not trained:
            raise ConfigError("fused: the model has no parameter to train")

    def row(self, record: ArrayRecord) -> Floats:
        """A record's arrays as one row. Raises ConfigError where they are not the model's."""
        if record.keys() != {place.name for place in self.places}:
            raise ConfigError(f"the message's arrays are {_few(record.keys())}; the model has {_few(self.names)}")
        row = np.empty(self.size, np.float32)
        for place in self.places:
            try:
                found = numbers_of(record[place.name])
                row[place.start : place.stop].reshape(place.shape)[...] = found
            except (PayloadError, TypeError, ValueError) as error:
                told = f"{place.name!r}, {place.shape} in the model"
                raise ConfigError(f"the message's array {told}, cannot be used: {error}") from error
            if found.shape != place.shape:
                raise ConfigError(f"the message's array {place.name!r} is {found.shape}; in the model {place.shape}")
        return row

    @property
    def names(self) -> list[str]:
        return [place.name for place in self.places]

    def views(self, row: Floats) -> dict[str, NDArray[np.generic]]:
        """The arrays of one row by their names, without a copy."""
        return {place.name: row[place.start : place.stop].reshape(place.shape) for place in self.places}


def _refuse(model: nn.Module) -> None:
    for name, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, _NormBase) and module.track_running_stats:
            raise ConfigError(f"fused: {name!r} ({kind}) keeps statistics of batches: use GroupNorm, or {INSTEAD}")
        if isinstance(module, _DropoutNd) and module.p > 0:
            raise ConfigError(f"fused: {name!r} ({kind}) draws random numbers: leave it out, or {INSTEAD}")
    names = list(model.state_dict())
    if len({id(array) for array in model.state_dict(keep_vars=True).values()}) < len(names):
        raise ConfigError(f"fused: some of the model's arrays are shared between modules: {INSTEAD}")
    for name, array in model.state_dict().items():
        if array.dtype != torch.float32:
            raise ConfigError(f"fused: the model's array {name!r} is {array.dtype}, not torch.float32: {INSTEAD}")


def _few(names: Collection[str]) -> str:
    shown = ", ".join(map(repr, list(names)[:4]))
    return f"{shown} ..." if len(names) > 4 else shown
