"""quickstart-numpy: the ServerApp."""

from __future__ import annotations

from flwr.common import Context, Metrics, ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg

from quickstart_numpy.task import first_model


def weighted_average(metrics: list[tuple[int, Metrics]]) -> Metrics:
    """The devices' accuracies, weighted by their images."""
    total = sum(examples for examples, _ in metrics)
    return {"accuracy": sum(examples * float(found["accuracy"]) for examples, found in metrics) / total}


def server_fn(context: Context) -> ServerAppComponents:
    """Construct components that set the ServerApp behaviour."""
    strategy = FedAvg(
        fraction_fit=float(context.run_config["fraction-fit"]),
        fraction_evaluate=float(context.run_config["fraction-fit"]),
        min_available_clients=2,
        initial_parameters=ndarrays_to_parameters(first_model()),
        evaluate_metrics_aggregation_fn=weighted_average,
    )
    config = ServerConfig(num_rounds=int(context.run_config["num-server-rounds"]))
    return ServerAppComponents(strategy=strategy, config=config)


app = ServerApp(server_fn=server_fn)
