"""The work as FLGo wants it: a module named `core` with a pipe from a task's folder to its devices, and a calculator."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from flgo.benchmark.base import BasicTaskPipe
from flgo.benchmark.toolkits.cv.classification import GeneralCalculator
from torch.utils.data import TensorDataset

from benchmarks.engines.arrays import load

WORK = "work.npz"


class Batches:
    """Goes through a data set of tensors once each time it is asked, in another order."""

    def __init__(self, samples: TensorDataset, batch_size: int) -> None:
        self.samples = samples
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        return (self.samples[rows] for rows in torch.randperm(len(self.samples)).split(self.batch_size))


class TaskCalculator(GeneralCalculator):
    """Takes batches out of tensors whole, where FLGo would have PyTorch's loader collect them sample by sample."""

    def get_dataloader(self, dataset: TensorDataset, batch_size: int = 64, **_: Any) -> Batches:
        return Batches(dataset, batch_size)


class TaskPipe(BasicTaskPipe):
    """Gives each device its images as tensors of its own: quicker to index than FLGo's subsets of one data set."""

    def __init__(self, task_path: str) -> None:
        super().__init__(task_path)
        self.work = load(Path(task_path) / WORK)
        self.feddata = {"client_names": self.gen_client_names(self.work.devices)}

    def load_data(self, running_time_option: Any) -> dict[str, dict[str, Any]]:
        names = self.feddata["client_names"]
        return {name: {"train": self.images_of(index)} for index, name in enumerate(names)}

    def images_of(self, device: int) -> TensorDataset:
        return TensorDataset(*map(torch.from_numpy, self.work.device(device)))
