"""What the server does: average the devices' models with FedAvg, and test the result each round."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from numpy_only.task import evaluate, load_split, zeros

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run FedAvg from a model of zeros."""
    FedAvg(min_available_nodes=int(context.run_config["min-available-nodes"])).start(
        grid=grid,
        initial_arrays=ArrayRecord({key: Array(array) for key, array in zeros().items()}),
        num_rounds=int(context.run_config["num-rounds"]),
        evaluate_fn=evaluate_centrally,
    )


def evaluate_centrally(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Loss and accuracy on all test images."""
    loss, accuracy = evaluate({key: array.numpy() for key, array in arrays.items()}, load_split()[1])
    return MetricRecord({"loss": loss, "accuracy": accuracy})
