"""Whole runs beside a few lines from the papers: random updates, durations and orders of arrival, many versions.

Every reference reads the grid's log, what went out and what came back in order, and keeps its own books: which version
a task began with, and when it is time to fold. It also checks that devices were sent the versions it has made itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpace.clients.mods import control_variates
from fedpace.clients.mods.control import correction, report_steps
from fedpace.strategies.compensators import DelayCompensation
from fedpace.strategies.gates import Arrivals
from fedpace.strategies.planners import Split
from fedpace.strategies.presets import (
    CA2FL,
    REFL,
    SCAFFOLD,
    Compass,
    FedAsync,
    FedAvg,
    FedBuff,
    FedNova,
    Paced,
    Preset,
)
from tests.inline_grid import InlineGrid
from tests.strategies.scripted import Arrays, Arrived, Metrics, ScriptedGrid, Sent

Floats = Any
SIZE = 6

cases = settings(deadline=None, max_examples=12)
seeds = st.integers(0, 2**32 - 1)


def initial() -> ArrayRecord:
    start = np.random.default_rng(42).normal(size=SIZE)
    return ArrayRecord({"a": Array(start[:4].reshape(2, 2)), "b": Array(start[4:])})


def flat(arrays: Mapping[str, Any]) -> Floats:
    return np.concatenate([np.asarray(arrays[name], dtype=np.float64).ravel() for name in ("a", "b")])


def shaped(vector: Floats) -> Arrays:
    return {"a": vector[:4].reshape(2, 2).copy(), "b": vector[4:].copy()}


def random_devices(seed: int, spread: float = 1.0) -> Callable[[int, Arrays, Mapping[str, Any]], Any]:
    """Devices that answer with anything, after any time; some are always slower."""
    rng = np.random.default_rng(seed)

    def answer(device: int, arrays: Arrays, config: Mapping[str, Any]) -> tuple[Arrays, Metrics, float]:
        model = shaped(flat(arrays) + rng.normal(size=SIZE))
        metrics: Metrics = {"num-examples": int(rng.integers(1, 50)), "local-steps": int(rng.integers(1, 9))}
        return model, metrics, float(rng.exponential() * spread**device)

    return answer


def run(strategy: Preset, grid: ScriptedGrid, rounds: int, start: ArrayRecord | None = None) -> list[Floats]:
    """Every version, the first one being what the run began with."""
    versions: list[Floats] = []

    def keep(number: int, arrays: ArrayRecord) -> None:
        versions.append(flat({name: array.numpy() for name, array in arrays.items()}))

    strategy.start(grid, start or initial(), num_rounds=rounds, evaluate_fn=keep)
    return versions


class Books:
    """A reference's own: the version and model that every task began with."""

    def __init__(self, grid: ScriptedGrid) -> None:
        self.x = flat({name: array.numpy() for name, array in initial().items()})
        self.version = 0
        self.versions = [self.x]
        self.log = grid.log
        self.began: dict[str, tuple[int, int, Floats]] = {}

    def arrivals(self) -> Any:
        """device, staleness now, base, model, metrics of every reply, in order of arrival; tasks sent are noted."""
        for entry in self.log:
            if isinstance(entry, Sent):
                np.testing.assert_allclose(flat(entry.arrays), self.x, atol=1e-9)
                self.began[entry.task] = (entry.device, self.version, self.x)
            else:
                yield entry

    def update(self, entry: Arrived) -> tuple[int, int, Floats, Metrics]:
        """device, staleness, delta and metrics of a reply, as of now."""
        device, version, base = self.began[entry.task]
        return device, self.version - version, flat(entry.arrays) - base, entry.metrics

    def step(self, by: Floats) -> None:
        self.x = self.x + by
        self.version += 1
        self.versions.append(self.x)

    def agree(self, versions: list[Floats]) -> None:
        assert len(versions) > 1
        np.testing.assert_allclose(versions, self.versions[: len(versions)], rtol=1e-9, atol=1e-9)


@cases
@given(seed=seeds, alpha=st.floats(0.05, 1.0), a=st.floats(0.0, 3.0))
def test_fedasync_mixes_each_arrival_in(seed: int, alpha: float, a: float) -> None:
    """Xie et al. 2019, algorithm 1 and section 5.2: x <- (1 - alpha_t) x + alpha_t x_new,
    alpha_t = alpha (t - tau + 1)^-a."""
    grid = ScriptedGrid(random_devices(seed), 5)
    versions = run(FedAsync(alpha, a), grid, 20)
    books = Books(grid)
    for entry in books.arrivals():
        _, staleness, _, _ = books.update(entry)
        mixed = alpha * (staleness + 1.0) ** -a
        books.step((1 - mixed) * books.x + mixed * flat(entry.arrays) - books.x)
    books.agree(versions)
    assert len(versions) == 21


@cases
@given(seed=seeds, k=st.integers(1, 7), lr=st.floats(0.1, 2.0), a=st.floats(0.0, 2.0))
def test_fedbuff_steps_by_the_mean_of_its_buffer(seed: int, k: int, lr: float, a: float) -> None:
    """Nguyen et al. 2022, algorithm 1: w <- w + eta_g / K * sum of s(staleness) * delta_i, every K arrivals;
    s(staleness) = 1 / (1 + staleness)^a, staleness as the model is when the buffer is folded."""
    grid = ScriptedGrid(random_devices(seed, 1.5), 5)
    versions = run(FedBuff(k, lr, a), grid, 12)
    books, buffer = Books(grid), []
    for entry in books.arrivals():
        buffer.append(entry)
        if len(buffer) == k:
            found = [books.update(each) for each in buffer]
            books.step(lr / k * sum((1.0 + staleness) ** -a * delta for _, staleness, delta, _ in found))
            buffer = []
    books.agree(versions)


@cases
@given(seed=seeds, k=st.integers(1, 6), lr=st.floats(0.1, 1.5))
def test_ca2fl_calibrates_with_the_cache(seed: int, k: int, lr: float) -> None:
    """Wang et al. 2024, algorithm 2: v = h + 1/K sum of (delta_i - h_i), where h is the mean over all N devices of what
    the cache held when the version began; h_i <- delta_i, all of them 0 at first."""
    nodes = 6
    grid = ScriptedGrid(random_devices(seed, 1.4), nodes)
    versions = run(CA2FL(k, lr), grid, 15)
    books, h, buffer = Books(grid), np.zeros((nodes, SIZE)), []
    for entry in books.arrivals():
        buffer.append(entry)
        if len(buffer) == k:
            v = h.mean(axis=0)
            for device, _, delta, _ in [books.update(each) for each in buffer]:
                v = v + (delta - h[device]) / k
                h[device] = delta
            books.step(lr * v)
            buffer = []
    books.agree(versions)


@cases
@given(seed=seeds, strength=st.floats(0.0, 3.0), adaptive=st.booleans())
def test_delay_compensation_of_each_arrival(seed: int, strength: float, adaptive: bool) -> None:
    """Zheng et al. 2017, algorithm 2 and eq. 10, each arrival being a gradient g = -delta and the step 1:
    w <- w - (g + lambda g g (w - w_bak)); with DC-ASGD-a lambda = lambda_0 / sqrt(MeanSquare), section 5,
    MeanSquare <- m MeanSquare + (1 - m) g g."""
    grid = ScriptedGrid(random_devices(seed, 1.4), 5)
    part = DelayCompensation(strength, adaptive, momentum=0.9, bound=np.inf)
    versions = run(FedBuff(k=1, weighers=(), compensators=(part,)), grid, 8)
    books = Books(grid)
    mean_square, stale = None, 0
    for entry in books.arrivals():
        _, staleness, delta, _ = books.update(entry)
        g, w_bak = -delta, flat(entry.arrays) - delta
        mean_square = 0.9 * (g * g if mean_square is None else mean_square) + 0.1 * g * g
        lambda_t = strength / np.sqrt(mean_square) if adaptive else strength
        books.step(-(g + lambda_t * g * g * (books.x - w_bak)))
        stale += staleness > 0
    books.agree(versions)
    assert stale


@cases
@given(seed=seeds)
def test_fednova_normalises_by_local_steps(seed: int) -> None:
    """Wang et al. 2020, eq. 8, for plain SGD: x <- x - tau_eff sum of p_i eta d_i, where eta d_i = (x - x_i) / tau_i is
    the mean step of device i and tau_eff = sum of p_i tau_i."""
    grid = ScriptedGrid(random_devices(seed), 4)
    versions = run(FedNova(fraction_evaluate=0.0), grid, 6)
    books, buffer = Books(grid), []
    for entry in books.arrivals():
        buffer.append(books.update(entry))
        if len(buffer) == 4:
            n = np.array([metrics["num-examples"] for *_, metrics in buffer])
            tau = np.array([metrics["local-steps"] for *_, metrics in buffer])
            p = n / n.sum()
            books.step(sum(p * tau) * sum(p[i] * delta / tau[i] for i, (_, _, delta, _) in enumerate(buffer)))
            buffer = []
    books.agree(versions)


@cases
@given(seed=seeds, a=st.floats(0.0, 2.0))
def test_refl_folds_late_updates_with_less_weight(seed: int, a: float) -> None:
    """Abdelmoniem et al. 2023, section 4.2: the mean of fresh and late updates, late ones weighted by their staleness
    (with a = 1 the damping 1 / (1 + staleness) that the paper begins with). A round ends when as many arrived as it
    wants, of whatever round, or when none of its own is out."""
    wanted = 4
    grid = ScriptedGrid(random_devices(seed, 1.3), 9)
    versions = run(REFL(1.5, a, train_nodes=wanted, fraction_evaluate=0.0), grid, 10)
    books = Books(grid)
    buffer: list[Arrived] = []
    was_late = False
    for entry in books.arrivals():
        buffer.append(entry)
        arrived = {each.task for each in buffer}
        own = {task for task, (_, version, _) in books.began.items() if version == books.version}
        if len(buffer) >= min(wanted, len(own)) or own <= arrived:
            found = [books.update(each) for each in buffer]
            was_late |= any(staleness for _, staleness, _, _ in found)
            weights = [metrics["num-examples"] * (1.0 + staleness) ** -a for _, staleness, _, metrics in found]
            books.step(sum(w * delta for w, (_, _, delta, _) in zip(weights, found, strict=True)) / sum(weights))
            buffer = []
    books.agree(versions)
    assert was_late


# ---------------------------------------------------------------- SCAFFOLD, with the mod at the devices

ETA, STEPS, NODES = 0.1, 3, 5


def pull(device: int, y: Floats, step: int) -> Floats:
    """The gradient of device's own loss at y: another quadratic each, and the noise of its batch."""
    rng = np.random.default_rng(device)
    curvature, centre = rng.uniform(0.5, 2.0, SIZE), rng.normal(size=SIZE)
    return curvature * (y - centre) + 0.1 * np.random.default_rng((device, step)).normal(size=SIZE)


def scaffold_app() -> ClientApp:
    app = ClientApp(mods=[control_variates])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        device = int(context.node_config["partition-id"])
        y = flat({name: array.numpy() for name, array in message.content.array_records["arrays"].items()})
        offset = flat(correction())
        for step in range(STEPS):
            y = y - ETA * (pull(device, y, step) + offset)
        report_steps(STEPS, ETA)
        record = ArrayRecord({name: Array(array) for name, array in shaped(y).items()})
        return Message(RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": 10})}), reply_to=message)

    return app


@pytest.mark.parametrize(("asked", "server_lr"), [(NODES, 1.0), (2, 1.0), (3, 0.7)])
def test_scaffold_with_its_mod(asked: int, server_lr: float) -> None:
    """Karimireddy et al. 2020, algorithm 1 with option II: y_i <- y_i - eta (g_i(y_i) + c - c_i), K times;
    c_i+ = c_i - c + (x - y_i) / (K eta); x <- x + eta_g / |S| sum of (y_i - x); c <- c + 1 / N sum of (c_i+ - c_i)."""
    grid, rounds = InlineGrid(scaffold_app(), NODES), 6
    result = SCAFFOLD(server_lr, train_nodes=asked, fraction_evaluate=0.0, seed=1).start(
        grid, initial(), num_rounds=rounds
    )
    chosen = [message.metadata.dst_node_id - 100 for message in grid.sent]
    assert len(chosen) == rounds * asked

    x = flat({name: array.numpy() for name, array in initial().items()})
    c, own = np.zeros(SIZE), np.zeros((NODES, SIZE))
    for number in range(rounds):
        moved, changed = np.zeros(SIZE), np.zeros(SIZE)
        for device in chosen[number * asked : (number + 1) * asked]:
            y = x
            for step in range(STEPS):
                y = y - ETA * (pull(device, y, step) + c - own[device])
            after = own[device] - c + (x - y) / (STEPS * ETA)
            moved, changed = moved + (y - x), changed + (after - own[device])
            own[device] = after
        x, c = x + server_lr * moved / asked, c + changed / NODES
    np.testing.assert_allclose(flat({name: array.numpy() for name, array in result.arrays.items()}), x, atol=1e-9)


# ---------------------------------------------------------------- what becomes the same as what


def steady_devices(device: int, arrays: Arrays, config: Mapping[str, Any]) -> tuple[Arrays, Metrics, float]:
    """All of one speed; every local step goes a tenth of the way to the device's own optimum."""
    centre = np.random.default_rng(device).normal(size=SIZE)
    steps = int(config.get("local-steps", 2))
    model = centre + 0.9**steps * (flat(arrays) - centre)
    return shaped(model), {"num-examples": 5 * (device + 1), "local-steps": steps}, 1.0 * steps


def alike(device: int, arrays: Arrays, config: Mapping[str, Any]) -> tuple[Arrays, Metrics, float]:
    """The same, with as many samples each."""
    model, metrics, seconds = steady_devices(device, arrays, config)
    return model, {**metrics, "num-examples": 20}, seconds


class Buffer(Arrivals):
    """A buffer whose devices wait until their updates are folded."""

    holds = True


@pytest.mark.parametrize("strategy", [FedBuff, CA2FL, partial(Paced, server_lr=1.0)])
def test_a_buffer_of_everybody_is_fedavg(strategy: Callable[..., Preset]) -> None:
    """FedBuff and its like send a device off again at once, so this is so for the first version, and for all of them
    where devices wait for the version that they have a part in. What calibration takes off and adds is then the same."""
    average = run(FedAvg(fraction_evaluate=0.0), ScriptedGrid(alike, 4), 5)
    first = run(strategy(k=4), ScriptedGrid(alike, 4), 5)[:2]
    np.testing.assert_allclose(first, average[:2], rtol=1e-12, atol=1e-12)
    held = run(strategy(gate=Buffer(4)), ScriptedGrid(alike, 4), 5)
    np.testing.assert_allclose(held, average, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "strategy",
    [
        FedAsync(alpha=1.0, min_train_nodes=1, min_available_nodes=1),
        FedBuff(k=1, min_train_nodes=1, min_available_nodes=1),
        CA2FL(k=1, min_train_nodes=1, min_available_nodes=1),
        Paced(k=1, server_lr=1.0, min_train_nodes=1, min_available_nodes=1),
        Compass(q_min=2, q_max=2, min_train_nodes=1, min_available_nodes=1),
    ],
)
def test_with_one_device_all_are_fedavg(strategy: Preset) -> None:
    one = FedAvg(min_train_nodes=1, min_available_nodes=1, fraction_evaluate=0.0)
    expected = run(one, ScriptedGrid(steady_devices, 1), 6)
    np.testing.assert_allclose(run(strategy, ScriptedGrid(steady_devices, 1), 6), expected, rtol=1e-12)


def test_compass_with_equal_speeds_becomes_fedavg() -> None:
    """First each device is met alone, then all are one group; from its arrival on, all begin and arrive together with
    `q_max` steps, and their samples are all there are."""
    nodes, q_max, rounds = 4, 7, 4
    grid = ScriptedGrid(steady_devices, nodes)
    versions = run(Compass(q_min=2, q_max=q_max), grid, nodes + 1 + rounds)
    together = shaped(versions[nodes + 1])
    start = ArrayRecord({name: Array(array) for name, array in together.items()})
    average = FedAvg(local_steps=q_max, fraction_evaluate=0.0)
    expected = run(average, ScriptedGrid(steady_devices, nodes), rounds, start)
    np.testing.assert_allclose(versions[nodes + 1 :], expected, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- a task in parts

INPUTS = np.random.default_rng(5).normal(size=(101, 3))
TARGETS = INPUTS @ np.array([1.0, -2.0, 0.5]) + 0.1


def shares_app(flaky: int | None = None) -> ClientApp:
    """One full-batch gradient step of least squares on the samples asked for; all of them where none are named."""
    app = ClientApp()
    failed: list[int] = []

    @app.train()
    def train(message: Message, context: Context) -> Message:
        device = int(context.node_config["partition-id"])
        if device == flaky and not failed:
            failed.append(device)
            raise RuntimeError("this time only")
        config: Any = message.content.config_records["config"]
        inputs, targets = (
            x[config.get("sample-from", 0) : config.get("sample-to", len(INPUTS))] for x in (INPUTS, TARGETS)
        )
        weight = message.content.array_records["arrays"]["w"].numpy()
        error = inputs @ weight - targets
        record = ArrayRecord({"w": Array(weight - 0.3 * inputs.T @ error / len(targets))})
        metrics = MetricRecord({"num-examples": len(targets), "loss": float((error**2).mean())})
        return Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message)

    return app


@pytest.mark.parametrize(
    ("nodes", "options"), [(4, {}), (4, {"broken": [1]}), (4, {"flaky": 2}), (3, {"minimum": 40}), (7, {})]
)
def test_a_task_in_parts_is_the_whole_task(nodes: int, options: dict[str, Any]) -> None:
    """Merged shares equal the undivided step, in model and metrics, also where a device fails and another one gets its
    share."""
    start, rounds = ArrayRecord({"w": Array(np.zeros(3))}), 5
    one: Any = {"min_train_nodes": 1, "min_available_nodes": 1, "fraction_evaluate": 0.0}
    whole = FedAvg(**one).start(InlineGrid(shares_app(), 1), start, num_rounds=rounds)
    split = Split(len(TARGETS), options.get("minimum", 1))
    grid = InlineGrid(shares_app(options.get("flaky")), nodes, options.get("broken", ()))
    parts = FedAvg(planner=split, **one).start(grid, start, num_rounds=rounds)
    np.testing.assert_allclose(parts.arrays["w"].numpy(), whole.arrays["w"].numpy(), rtol=1e-12)
    for number, metrics in whole.train_metrics_clientapp.items():
        assert parts.train_metrics_clientapp[number]["loss"] == pytest.approx(metrics["loss"], rel=1e-12)
    ranges = [(c["sample-from"], c["sample-to"]) for c in map(config_of, grid.sent) if c["server-round"] == 1]
    assert len(set(ranges)) == (2 if "minimum" in options else nodes)
    assert (len(ranges) > len(set(ranges))) == bool(options.keys() & {"broken", "flaky"}), "a lost share is sent again"


def config_of(message: Message) -> ConfigRecord:
    return message.content.config_records["config"]
