"""quickstart-numpy: the ClientApp."""

from __future__ import annotations

from flwr.client import Client, ClientApp, NumPyClient
from flwr.common import Context, NDArrays, Scalar

from quickstart_numpy.task import evaluate, load_data, train


class FlowerClient(NumPyClient):
    """Softmax regression on the images of one partition."""

    def __init__(self, partition_id: int, num_partitions: int, epochs: int, learning_rate: float) -> None:
        self.train_set, self.test_set = load_data(partition_id, num_partitions)
        self.epochs = epochs
        self.learning_rate = learning_rate

    def fit(self, parameters: NDArrays, config: dict[str, Scalar]) -> tuple[NDArrays, int, dict[str, Scalar]]:
        """Train on the partition's images."""
        loss = train(parameters, self.train_set, self.epochs, self.learning_rate)
        return parameters, len(self.train_set[1]), {"train_loss": loss}

    def evaluate(self, parameters: NDArrays, config: dict[str, Scalar]) -> tuple[float, int, dict[str, Scalar]]:
        """Evaluate on the images that the partition holds back."""
        loss, accuracy = evaluate(parameters, self.test_set)
        return loss, len(self.test_set[1]), {"accuracy": accuracy}


def client_fn(context: Context) -> Client:
    """Construct the client of a node."""
    partition_id = int(context.node_config["partition-id"])
    num_partitions = int(context.node_config["num-partitions"])
    epochs = int(context.run_config["local-epochs"])
    learning_rate = float(context.run_config["learning-rate"])
    return FlowerClient(partition_id, num_partitions, epochs, learning_rate).to_client()


app = ClientApp(client_fn)
