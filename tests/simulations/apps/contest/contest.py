"""Devices draw a point to their own, each as it is told to behave; a strategy of Flower's own for others to replace."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters
from flwr.server import LegacyContext, ServerConfig
from flwr.server.strategy import FedAvg as LegacyFedAvg
from flwr.server.workflow import DefaultWorkflow
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

SIZE = 4

client = ClientApp()
server = ServerApp()


def centre(partition: int) -> np.ndarray:
    return np.random.default_rng(partition).normal(1.0, 0.3, SIZE).astype(np.float32)


@client.train()
def train(message: Message, context: Context) -> Message:
    config = message.content["config"]
    match config.get("behave", "well"):
        case "raises":
            raise ValueError("this device will not")
        case "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hangs":
            while True:
                time.sleep(1)
        case "prints":
            print("a device has something to say")
    model = message.content["arrays"]["w"].numpy()
    moved = model + np.float32(config.get("lr", 0.3)) * (centre(int(context.node_config["partition-id"])) - model)
    content = {
        "arrays": ArrayRecord({"w": Array(moved.astype(np.float32))}),
        "metrics": MetricRecord({"num-examples": 1}),
    }
    return Message(RecordDict(content), reply_to=message)


def evaluate(done: int, arrays: ArrayRecord) -> MetricRecord:
    distance = float(np.linalg.norm(arrays["w"].numpy().astype(np.float64) - 1.0))
    return MetricRecord(
        {"accuracy": float(np.exp(-distance)), "loss": distance, "slow_accuracy": float(np.exp(-2 * distance))}
    )


@server.main()
def main(grid: Grid, context: Context) -> None:
    conduct = context.run_config["server"]
    print("a server has something to say")
    initial = ArrayRecord({"w": Array(np.zeros(SIZE, np.float32))})
    if conduct == "raises":
        raise ValueError("the app has had enough")
    if conduct == "silent":
        return
    if conduct == "legacy":
        strategy = LegacyFedAvg(initial_parameters=ndarrays_to_parameters([np.zeros(SIZE, np.float32)]))
        DefaultWorkflow()(grid, LegacyContext(context=context, config=ServerConfig(num_rounds=2), strategy=strategy))
        return
    tests = {"blind": None, "vague": lambda done, arrays: MetricRecord({"loss": 1.0})}.get(str(conduct), evaluate)
    result = FedAvg().start(grid, initial, num_rounds=2, evaluate_fn=tests)
    print(result.evaluate_metrics_serverapp[2]["accuracy"])
