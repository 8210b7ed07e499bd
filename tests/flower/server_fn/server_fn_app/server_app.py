"""FedAvg of the legacy API from a server_fn; no initial model, so that one is asked of a client."""

from __future__ import annotations

import numpy as np
from flwr.common import Context, NDArrays, Scalar
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg


def server_fn(context: Context) -> ServerAppComponents:
    """The strategy and its rounds; the weights they end with are written."""
    nodes, rounds = int(context.run_config["nodes"]), int(context.run_config["num-rounds"])
    output = str(context.run_config["output"])

    def save_last(server_round: int, parameters: NDArrays, config: dict[str, Scalar]) -> None:
        if server_round == rounds and output:
            np.savez(output, weight=parameters[0])

    strategy = FedAvg(
        min_fit_clients=nodes,
        min_evaluate_clients=nodes,
        min_available_clients=nodes,
        evaluate_fn=save_last,
    )
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=rounds))


app = ServerApp(server_fn=server_fn)
