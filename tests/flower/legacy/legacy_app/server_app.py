"""FedAvg of the legacy API, run by DefaultWorkflow inside a ServerApp."""

from __future__ import annotations

import numpy as np
from flwr.common import Context, NDArrays, Scalar, ndarrays_to_parameters
from flwr.server import Grid, LegacyContext, ServerApp, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow

FEATURES = 8

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds; write the weights they end with."""
    nodes, rounds = int(context.run_config["nodes"]), int(context.run_config["num-rounds"])
    output = str(context.run_config["output"])

    def save_last(server_round: int, parameters: NDArrays, config: dict[str, Scalar]) -> None:
        weight, bias = parameters
        if server_round == rounds and output:
            np.savez(output, weight=weight, bias=bias)

    strategy = FedAvg(
        min_fit_clients=nodes,
        min_evaluate_clients=nodes,
        min_available_clients=nodes,
        initial_parameters=ndarrays_to_parameters([np.zeros(FEATURES, np.float32), np.zeros(1, np.float32)]),
        on_fit_config_fn=lambda server_round: {"server-round": server_round},
        evaluate_fn=save_last,
    )
    legacy = LegacyContext(context=context, config=ServerConfig(num_rounds=rounds), strategy=strategy)
    DefaultWorkflow()(grid, legacy)
    if len(legacy.history.losses_distributed) < rounds:
        raise RuntimeError(f"{len(legacy.history.losses_distributed)} rounds of {rounds} were evaluated")
