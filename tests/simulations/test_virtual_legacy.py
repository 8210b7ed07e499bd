"""Flower's legacy server, whose threads ask devices and look for them, in virtual time."""

from __future__ import annotations

import concurrent.futures
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters
from flwr.server import History, Server, ServerApp, ServerAppComponents, ServerConfig, SimpleClientManager
from flwr.server import server as legacy_server
from flwr.server.strategy import FedAvg, Strategy

from fedpace.hosting.flower import RunNotRunningException, make_context
from fedpace.hosting.onethread import in_turns
from fedpace.simulations.executors.inline import InlineExecutor
from fedpace.simulations.grid import VirtualGrid
from tests.simulations.grids import DOWN, EVEN, LATENCY, RUN_ID, STEP, UP, GridOf

DEVICES = 40
SESSIONS = '[availability]\nmodel = "sessions"\nsession_median_seconds = 60.0\nday_share = 0.4\nnight_share = 0.4\n'
MODEL = [np.zeros(500, np.float32), np.ones((3, 2), np.float32)]


class Client(NumPyClient):
    def __init__(self, number: int) -> None:
        self.number = number

    def fit(self, parameters: Any, config: Any) -> Any:
        """A third of these fails."""
        if config.get("fails") and self.number % 3 == 0:
            raise ValueError("no good")
        return [array + np.float32(0.1 * self.number) for array in parameters], 1 + self.number, {}

    def evaluate(self, parameters: Any, config: Any) -> Any:
        return float(parameters[0][0]), 1, {}


app = ClientApp(lambda context: Client(int(context.node_config["partition-id"])).to_client())


class RememberingServer(Server):
    history = History()

    def fit(self, num_rounds: int, timeout: float | None) -> tuple[History, float]:
        self.history, seconds = super().fit(num_rounds, timeout)
        return self.history, seconds


class Federation:
    """Runs a legacy ServerApp on a grid."""

    def __init__(self, grid: VirtualGrid) -> None:
        self.grid = grid

    def run(self, strategy: Strategy, rounds: int = 3, timeout: float | None = None) -> RememberingServer:
        server = RememberingServer(client_manager=SimpleClientManager(), strategy=strategy)
        server.set_max_workers(2)
        parts = ServerAppComponents(server=server, config=ServerConfig(num_rounds=rounds, round_timeout=timeout))
        with in_turns(self.grid) as self.grid.turns:
            ServerApp(server_fn=lambda context: parts)(self.grid, make_context(RUN_ID, 1, {}, {}, RecordDict()))
        return server


FederationOf = Callable[..., Federation]


@pytest.fixture
def federation_of(grid_of: GridOf) -> Iterator[FederationOf]:
    grids = []

    def make(toml: str = EVEN) -> Federation:
        grids.append(grid_of(toml, DEVICES, InlineExecutor(app, RUN_ID, DEVICES), clock=True))
        return Federation(grids[-1])

    threads = threading.active_count()
    yield make
    assert threading.active_count() <= threads + len(grids), "none stays but those that write results"


def strategy(**options: Any) -> FedAvg:
    options = {"fraction_fit": 0.5, "fraction_evaluate": 0.0, **options}
    return FedAvg(initial_parameters=ndarrays_to_parameters(MODEL), **options)


def test_a_round_asks_its_devices_at_once(federation_of: FederationOf) -> None:
    """Twenty of them, though the server may use two threads: they run here, and time passes there."""
    federation = federation_of()
    federation.run(strategy())
    counts, grid = federation.grid.counts, federation.grid
    assert (counts.received, counts.failed) == (60, 0)
    down = counts.bytes_down / 60
    assert grid.now() == pytest.approx(3 * (2 * LATENCY + down * (1 / DOWN + 1 / UP) + 10 * STEP), rel=1e-9)
    assert set(grid.trace.columns()["sent_seconds"].tolist()) == {0.0, *np.unique(grid.trace.columns()["seconds"])[:2]}


def test_evaluation_comes_after(federation_of: FederationOf) -> None:
    federation = federation_of()
    server = federation.run(strategy(fraction_evaluate=0.25), rounds=2)
    sent = federation.grid.trace.columns()["sent_seconds"]
    assert federation.grid.counts.received == 60 and len(np.unique(sent)) == 4
    assert [number for number, _ in server.history.losses_distributed] == [1, 2]


def test_the_same_run_again_gives_the_same_bits(federation_of: FederationOf) -> None:
    found = []
    for _ in range(2):
        random.seed(1)
        federation = federation_of("[compute]\njitter = 0.5\n" + SESSIONS)
        server = federation.run(strategy(min_fit_clients=4, fraction_evaluate=0.2))
        found.append((federation.grid.trace.sha256(), server.parameters.tensors, federation.grid.now()))
    assert found[0] == found[1]


def test_devices_that_fail_are_failures(federation_of: FederationOf) -> None:
    federation = federation_of()
    federation.run(strategy(fraction_fit=1.0, on_fit_config_fn=lambda server_round: {"fails": True}), rounds=1)
    assert (federation.grid.counts.received, federation.grid.counts.failed) == (26, 14)


def test_a_round_has_its_time_out(federation_of: FederationOf) -> None:
    slow = EVEN.replace(f"seconds_per_step = {STEP}", 'model = "classes"')
    slow += "[[compute.classes]]\nname = 'a'\nseconds_per_step = 0.1\n[[compute.classes]]\nname = 'b'\nseconds_per_step = 9.0\n"
    federation = federation_of(slow)
    federation.run(strategy(fraction_fit=1.0), rounds=1, timeout=5.0)
    counts = federation.grid.counts
    assert federation.grid.now() == 5.0
    assert counts.received + counts.expired == DEVICES and counts.received > 5 and counts.expired > 5


def test_waiting_for_devices_takes_virtual_time(federation_of: FederationOf) -> None:
    federation = federation_of(SESSIONS)
    there = len(list(federation.grid.get_node_ids()))
    federation.run(strategy(fraction_fit=0.1, min_available_clients=there + 3), rounds=1)
    assert federation.grid.now() > 1.0 and federation.grid.counts.sent >= 2


def test_waiting_for_devices_that_never_come_ends(federation_of: FederationOf) -> None:
    """Flower waits for a day, and then goes on without."""
    federation = federation_of()
    federation.run(strategy(fraction_fit=1.0, min_fit_clients=DEVICES + 1, min_available_clients=DEVICES + 1), rounds=1)
    assert 86_400 <= federation.grid.now() < 86_500 and federation.grid.counts.sent == 0


def test_a_run_that_is_stopped_ends(federation_of: FederationOf) -> None:
    federation = federation_of()

    def config(server_round: int) -> dict[str, Any]:
        if server_round == 2:
            federation.grid.stop()
        return {}

    with pytest.raises(RunNotRunningException):
        federation.run(strategy(on_fit_config_fn=config))
    assert federation.grid.counts.received == 20


def test_all_is_put_back(federation_of: FederationOf) -> None:
    grid = federation_of().grid
    before = legacy_server.concurrent.futures.ThreadPoolExecutor  # type: ignore[attr-defined]
    with pytest.raises(ZeroDivisionError), in_turns(grid):
        assert legacy_server.concurrent.futures.ThreadPoolExecutor is not before  # type: ignore[attr-defined]
        raise ZeroDivisionError
    assert legacy_server.concurrent is concurrent  # type: ignore[attr-defined]
    assert before is concurrent.futures.ThreadPoolExecutor
