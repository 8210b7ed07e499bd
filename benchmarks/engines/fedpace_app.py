"""The app that fedpace simulates: a server that takes the time of its rounds, and a declared local training."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp import strategy as flower
from torch import nn

from benchmarks.engines.arrays import BATCH_SIZE, DEVICES_A_ROUND, LEARNING_RATE, SAMPLES, Work, load
from benchmarks.engines.meter import Meter, RoundMeter
from benchmarks.engines.models import make_model
from fedpace.clients.training import SGD, FederatedData, LocalTraining, Partitions
from fedpace.strategies import FedAvg, FedBuff

WORK = "FEDPACE_BENCHMARK_WORK"
"""The environment variable that names the work's file: what a declaration makes, it makes without a run config."""


@functools.cache
def work() -> Work:
    return load(Path(os.environ[WORK]))


def model() -> nn.Module:
    return make_model(work().name)


def data() -> FederatedData:
    its = work()
    offsets = np.arange(its.devices + 1, dtype=np.int64) * SAMPLES
    return FederatedData(
        its.train_x, its.train_y, Partitions(its.partition.reshape(-1), offsets), its.test_x, its.test_y
    )


training = LocalTraining(model=model, data=data, optimizer=SGD(lr=LEARNING_RATE), epochs=1, batch_size=BATCH_SIZE)
client = training.client_app()
server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run the strategy; write what it took and the last model, as the other engines do."""
    config = context.run_config
    meter = Meter(int(config["root"]))
    rounds = RoundMeter(meter, int(config["warm-up"]), int(config["rounds"]))
    its = work()

    def after_round(done: int, arrays: ArrayRecord) -> None:
        rounds.after(done)
        if done == rounds.last:
            np.savez(str(config["model"]), **{name: array.numpy() for name, array in arrays.items()})

    make_strategy(str(config["strategy"]), its.devices, int(config["in-flight"])).start(
        grid=grid,
        initial_arrays=ArrayRecord({name: torch.from_numpy(array) for name, array in its.weights.items()}),
        num_rounds=rounds.last,
        train_config=ConfigRecord({"work": os.environ[WORK]}),
        evaluate_fn=after_round,
    )
    Path(str(config["times"])).write_text(json.dumps(meter.times))


def make_strategy(name: str, devices: int, in_flight: int) -> flower.Strategy:
    """`DEVICES_A_ROUND` updates a version, nothing evaluated by devices."""
    if name == "FedBuff":
        return FedBuff(k=DEVICES_A_ROUND, train_nodes=in_flight, min_available_nodes=devices)
    if name == "FedAvg":
        return FedAvg(train_nodes=DEVICES_A_ROUND, fraction_evaluate=0.0, min_available_nodes=devices)
    if name == "flwr:FedAvg":
        return flower.FedAvg(
            fraction_train=DEVICES_A_ROUND / devices,
            fraction_evaluate=0.0,
            min_train_nodes=DEVICES_A_ROUND,
            min_available_nodes=devices,
        )
    raise ValueError(f"no strategy {name!r} here: FedAvg, FedBuff or flwr:FedAvg")
