"""Client mods: what they add to a reply, and that the gradients they correct are those of the papers."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

from fedpace.clients.mods import control_variates, measure, proximal
from fedpace.clients.mods.clock import use_task_clock
from fedpace.clients.mods.control import RECORD, STATE, correction, report_steps
from fedpace.errors import ConfigError
from fedpace.hosting.flower import become, make_context
from tests.inline_grid import RUN_ID, InlineGrid

App = Callable[[Message, Context], Message]
State = dict[str, Any]

STEPS, LR, MU = 7, 0.05, 0.3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of torch's own only wait for each other on models so small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Net(nn.Module):
    """Two normalisations in a row, of equal size: their statistics look like parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.norm1 = nn.BatchNorm1d(3)
        self.norm2 = nn.BatchNorm1d(3)
        self.second = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(torch.relu(self.norm2(self.norm1(self.first(x)))))
        return out


def initial(seed: int = 0) -> State:
    torch.manual_seed(seed)
    return Net().double().state_dict()


def batches(device: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(100 + device)
    return [
        (torch.randn(8, 4, generator=generator, dtype=torch.float64), torch.randint(0, 2, (8,), generator=generator))
        for _ in range(STEPS)
    ]


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=LR)


def train(
    state: State,
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer] = sgd,
    term: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
    device: int = 0,
) -> State:
    """Trains as any app does; `term`, if there is one, is the reference: what is added to each gradient, written out."""
    net = Net().double()
    net.load_state_dict(state)
    optimizer = optimizer_of(net)
    for x, y in batches(device):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()  # type: ignore[no-untyped-call]
        if term is not None:
            for name, parameter in net.named_parameters():
                assert parameter.grad is not None
                parameter.grad += term(name, parameter.detach())
        optimizer.step()
    return net.state_dict()


def trainer(optimizer_of: Callable[[nn.Module], torch.optim.Optimizer] = sgd, device: int = 0) -> App:
    """An app that knows nothing of mods."""

    def call(message: Message, context: Context) -> Message:
        assert list(message.content.array_records) == ["arrays"]
        state = message.content.array_records["arrays"].to_torch_state_dict()
        arrays = ArrayRecord(OrderedDict(train(state, optimizer_of, device=device)))
        return Message(
            RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 8 * STEPS})}), reply_to=message
        )

    return call


def request(records: dict[str, ArrayRecord] | None = None, kind: str = "train", **config: float) -> Message:
    become(RUN_ID, 1)
    content = RecordDict(dict(records or {}))
    content["config"] = ConfigRecord({name.replace("_", "-"): value for name, value in config.items()})
    return Message(content, 100, kind)


def model(state: State) -> dict[str, ArrayRecord]:
    return {"arrays": ArrayRecord(OrderedDict(state))}


def context() -> Context:
    return make_context(RUN_ID, 100, {}, {}, RecordDict())


def arrays_of(reply: Message, record: str = "arrays") -> dict[str, np.ndarray[Any, Any]]:
    return {name: array.numpy() for name, array in reply.content.array_records[record].items()}


def assert_same(found: dict[str, np.ndarray[Any, Any]], expected: State) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == np.asarray(value).dtype
        np.testing.assert_allclose(found[name], np.asarray(value), rtol=1e-12, atol=1e-12, err_msg=name)


# ---------------------------------------------------------------- proximal


def two_groups(net: nn.Module) -> torch.optim.Optimizer:
    weights = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim == 1][::-1]
    groups: list[dict[str, Any]] = [{"params": others}, {"params": weights, "weight_decay": 0.01}]
    return torch.optim.SGD(groups, lr=LR, momentum=0.9)


def adam(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.parameters(), lr=LR)


@pytest.mark.parametrize("optimizer_of", [sgd, two_groups, adam])
def test_proximal_is_the_explicit_term(optimizer_of: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
    state = initial()
    expected = train(state, optimizer_of, lambda name, w: MU * (w - state[name]))
    sent = request(model(state), proximal_mu=MU)
    assert_same(arrays_of(proximal(sent, context(), trainer(optimizer_of))), expected)
    plain = proximal(request(model(state)), context(), trainer(optimizer_of))
    assert_same(arrays_of(plain), train(state, optimizer_of))  # no mu, no term; and no trace of the call before
    assert not np.allclose(arrays_of(plain)["second.weight"], expected["second.weight"])


def test_proximal_is_the_gradient_of_the_term_in_the_loss() -> None:
    """Also where a closure computes the gradients, and for a model received as a list, in float32."""

    def closure_app(message: Message, context: Context) -> Message:
        weight, bias = message.content.array_records["arrays"].to_numpy_ndarrays()
        net = nn.Linear(4, 2).double()
        with torch.no_grad():
            net.weight.copy_(torch.from_numpy(weight))
            net.bias.copy_(torch.from_numpy(bias))
        start = [p.detach().clone() for p in net.parameters()]
        optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.5)
        for x, y in batches():

            def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(net(x), y)
                if mu_in_loss:
                    pairs = zip(net.parameters(), start, strict=True)
                    loss = loss + mu_in_loss / 2 * torch.stack([((w - r) ** 2).sum() for w, r in pairs]).sum()
                loss.backward()  # type: ignore[no-untyped-call]
                return loss

            if mu_in_loss:
                optimizer.step(closure)
            else:
                optimizer.step(closure=closure)
        return Message(
            RecordDict({"arrays": ArrayRecord([p.detach().numpy() for p in net.parameters()])}), reply_to=message
        )

    received = {"arrays": ArrayRecord([np.ones((2, 4), np.float32), np.zeros(2, np.float32)])}
    mu_in_loss = MU
    expected = arrays_of(closure_app(request(received), context()))
    mu_in_loss = 0.0
    found = arrays_of(proximal(request(received, proximal_mu=MU), context(), closure_app))
    assert_same(found, expected)


def test_proximal_says_where_it_cannot_work() -> None:
    state = initial()
    sent = request(model(state), proximal_mu=MU)

    def with_a_head_of_its_own(net: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(chain(net.parameters(), [nn.Parameter(torch.zeros(5))]), lr=LR)

    with pytest.raises(ConfigError, match=r"of shape \[5\], is none of the arrays received"):
        proximal(sent, context(), trainer(with_a_head_of_its_own))

    def by_hand(message: Message, context: Context) -> Message:
        doubled = {
            name: Array(np.asarray(2 * array.numpy()))
            for name, array in message.content.array_records["arrays"].items()
        }
        return Message(RecordDict({"arrays": ArrayRecord(doubled)}), reply_to=message)

    with pytest.raises(ConfigError, match=r"without a step of torch's optimisers"):
        proximal(sent, context(), by_hand)

    def idle(message: Message, context: Context) -> Message:
        return Message(RecordDict({"arrays": message.content.array_records["arrays"]}), reply_to=message)

    assert_same(arrays_of(proximal(sent, context(), idle)), state)  # a device without samples is no error


def test_an_app_that_starts_elsewhere_is_matched_by_order() -> None:
    state, start = initial(0), initial(1)

    def app(message: Message, context: Context) -> Message:
        return Message(RecordDict({"arrays": ArrayRecord(OrderedDict(train(start)))}), reply_to=message)

    with torch.no_grad():
        for tensors in (state, start):
            for tensor in tensors.values():
                if tensor.is_floating_point():
                    tensor.add_(0.01 if tensors is start else 0.02)  # norms and biases would be equal
    expected = train(start, sgd, lambda name, w: MU * (w - state[name]))
    sent = request(model(state), proximal_mu=MU)
    assert_same(arrays_of(proximal(sent, context(), app)), expected)


def test_gradients_that_a_scaler_has_scaled() -> None:
    """With a fused optimiser the scaler leaves the gradients scaled until the step itself."""

    def scaled(message: Message, context: Context) -> Message:
        net = nn.Linear(4, 2)
        net.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
        optimizer = torch.optim.SGD(net.parameters(), lr=LR, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaling)
        for x, y in batches():
            optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(net(x.float()), y)).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            scaler.update()
        return Message(RecordDict({"arrays": ArrayRecord(net.state_dict())}), reply_to=message)

    torch.manual_seed(0)
    received = {"arrays": ArrayRecord(nn.Linear(4, 2).state_dict())}
    scaling = False
    expected = arrays_of(proximal(request(received, proximal_mu=2.0), context(), scaled))
    scaling = True
    found = arrays_of(proximal(request(received, proximal_mu=2.0), context(), scaled))
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6)


def test_threads_do_not_see_each_other() -> None:
    """Devices trained at the same time in one process, some with the mod, some without."""
    state = initial()
    with_term = train(state, sgd, lambda name, w: MU * (w - state[name]))
    without = train(state)
    failures: list[str] = []

    def one(mu: float) -> None:
        try:
            for _ in range(15):
                become(RUN_ID, 1)
                sent = request(model(state), proximal_mu=mu)
                reply = measure(sent, context(), lambda m, c: proximal(m, c, trainer()))
                assert_same(arrays_of(reply), with_term if mu else without)
                assert reply.content.metric_records["metrics"]["local-steps"] == STEPS
        except BaseException as error:  # noqa: BLE001 - pytest does not see other threads
            failures.append(repr(error))

    threads = [threading.Thread(target=one, args=(mu,)) for mu in (MU, 0.0, MU, 0.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert not failures and not any(thread.is_alive() for thread in threads)


# ---------------------------------------------------------------- SCAFFOLD


def zeros(state: State) -> State:
    """A control variate: of one kind of number, whatever the arrays of the model are."""
    return {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in state.items()}


def is_parameter(name: str) -> bool:
    return dict(Net().named_parameters()).get(name) is not None


def test_scaffold_is_algorithm_1() -> None:
    """Three rounds with two devices against the algorithm written out (lines 7 to 17, option II)."""
    x, c = initial(), zeros(initial())
    own = [zeros(x), zeros(x)]
    contexts = [context(), context()]
    for _ in range(3):
        sent = {**model(x), RECORD: ArrayRecord(OrderedDict(c))}
        sums, changes = zeros(x), zeros(x)
        for device in range(2):
            c_i = own[device]
            y = train(x, sgd, lambda name, w, c=c, c_i=c_i: c[name] - c_i[name], device=device)  # type: ignore[misc]
            new = {
                n: c_i[n] - c[n] + (x[n] - y[n]) / (STEPS * LR) if is_parameter(n) else torch.zeros_like(c[n])
                for n in x
            }
            message = request(sent)
            reply = control_variates(message, contexts[device], trainer(device=device))
            assert list(message.content) == ["arrays", RECORD, "config"]  # as it was
            assert_same(arrays_of(reply), y)
            assert_same(arrays_of(reply, RECORD), {n: new[n] - c_i[n] for n in x})
            kept = contexts[device].state.array_records[STATE]
            assert_same({name: array.numpy() for name, array in kept.items()}, new)
            own[device] = new
            for n in x:
                sums[n] = sums[n] + y[n] / 2
                changes[n] = changes[n] + (new[n] - c_i[n]) / 2
        x = {n: sums[n].to(x[n].dtype) for n in x}
        c = {n: c[n] + changes[n] for n in x}
    assert all(c[name].abs().max() > 0.01 for name in ("first.weight", "norm2.bias", "second.weight"))


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.8, "dampening": 0.5},
    ],
)
def test_a_constant_gradient_is_found_again(options: dict[str, Any]) -> None:
    """Whatever SGD does with its gradients, c_i+ is a mean of them: of equal ones, the same; the rate may change."""
    gradient = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def app(message: Message, context: Context) -> Message:
        w = nn.Parameter(message.content.array_records["arrays"].to_torch_state_dict()["w"])
        optimizer = torch.optim.SGD([w], lr=0.1, **options)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        for _ in range(STEPS):
            optimizer.zero_grad()
            (w @ gradient).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        return Message(RecordDict({"arrays": ArrayRecord({"w": Array(w.detach().numpy())})}), reply_to=message)

    def record(values: list[float]) -> ArrayRecord:
        return ArrayRecord({"w": Array(np.array(values))})

    device, c = context(), [0.3, 0.3, 0.3]
    for _ in range(2):  # the second time with a c_i
        control_variates(request({"arrays": record([1.0, 2.0, 3.0]), RECORD: record(c)}), device, app)
        np.testing.assert_allclose(device.state.array_records[STATE]["w"].numpy(), gradient.numpy(), rtol=1e-12)


def numpy_app(steps: int, *, report: bool = True) -> App:
    """Minimises |w - 1|^2 / 2 by hand, with the correction handed out."""

    def call(message: Message, context: Context) -> Message:
        [w] = message.content.array_records["arrays"].to_numpy_ndarrays()
        [offset] = correction().values() or [0.0]
        for _ in range(steps):
            w = w - LR * (w - 1.0 + offset)
        if report:
            report_steps(steps, LR)
        return Message(RecordDict({"arrays": ArrayRecord([w])}), reply_to=message)

    return call


def test_an_app_without_torch_is_handed_the_correction() -> None:
    x, c = np.array([3.0, -2.0]), np.array([0.5, 0.25])
    sent = {"arrays": ArrayRecord([x]), RECORD: ArrayRecord([c])}
    device = context()
    own = np.zeros(2)
    for _ in range(2):
        y = x
        for _ in range(4):
            y = y - LR * (y - 1.0 + c - own)
        new = own - c + (x - y) / (4 * LR)
        reply = control_variates(request(sent), device, numpy_app(4))
        np.testing.assert_allclose(arrays_of(reply)["0"], y, rtol=1e-12)
        np.testing.assert_allclose(arrays_of(reply, RECORD)["0"], new - own, rtol=1e-12)
        own = new
    assert not correction()
    plain = control_variates(request({"arrays": ArrayRecord([x])}), device, numpy_app(4))
    assert list(plain.content) == ["arrays"]  # without a control variate there is nothing to do
    report_steps(3, LR)


@pytest.mark.parametrize("by_hand", [False, True])
def test_parameters_without_a_gradient_and_apps_that_correct_by_hand(by_hand: bool) -> None:
    """Along c - c_i every parameter moves, used or not, and once: who asks for the correction applies it alone."""

    def app(message: Message, context: Context) -> Message:
        state = message.content.array_records["arrays"].to_torch_state_dict()
        used, unused = nn.Parameter(state["used"]), nn.Parameter(state["unused"])
        optimizer = torch.optim.SGD([used, unused], lr=LR)
        for _ in range(STEPS):
            optimizer.zero_grad()
            used.sum().backward()  # type: ignore[no-untyped-call]
            if by_hand:
                used.grad, unused.grad = (torch.from_numpy(each).clone() for each in correction().values())
                used.grad += 1.0
            optimizer.step()
        if by_hand:
            report_steps(STEPS, LR)
        arrays = ArrayRecord(OrderedDict(used=used.detach(), unused=unused.detach()))
        return Message(RecordDict({"arrays": arrays}), reply_to=message)

    start = {"used": torch.ones(2, dtype=torch.float64), "unused": torch.zeros(3, dtype=torch.float64)}
    c = ArrayRecord(OrderedDict({name: torch.full_like(tensor, 0.5) for name, tensor in start.items()}))
    device = context()
    reply = control_variates(request({**model(start), RECORD: c}), device, app)
    assert_same(
        arrays_of(reply), {"used": start["used"] - STEPS * LR * 1.5, "unused": -STEPS * LR * 0.5 + start["unused"]}
    )
    own = {name: array.numpy() for name, array in device.state.array_records[STATE].items()}
    assert_same(own, {"used": torch.ones_like(start["used"]), "unused": torch.zeros_like(start["unused"])})


def test_scaffold_says_where_it_cannot_work_and_keeps_its_state() -> None:
    state = initial()
    sent = {**model(state), RECORD: ArrayRecord(OrderedDict(zeros(state)))}
    device = context()
    control_variates(request(sent), device, trainer())
    before = arrays_of(Message(device.state, 1, "train"), STATE)
    small = {"arrays": ArrayRecord([np.ones(2)]), RECORD: ArrayRecord([np.ones(2)])}

    def failing(records: dict[str, ArrayRecord], app: App, match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            control_variates(request(records), device, app)
        assert_same(arrays_of(Message(device.state, 1, "train"), STATE), before)

    failing(sent, trainer(adam), "the app trains with Adam: use torch.optim.SGD, or apply")
    failing(sent, trainer(lambda net: torch.optim.SGD(net.parameters(), lr=1e200)), "is not finite: training diverged")
    failing({**sent, RECORD: ArrayRecord([np.ones(2)])}, trainer(), "server's control variate is not of the model's")
    failing(small, numpy_app(4), "this device's control variate is not of the model's names and shapes")
    device.state.clear()
    with pytest.raises(ConfigError, match="call report_steps"):
        control_variates(request(small), device, numpy_app(4, report=False))
    with pytest.raises(ConfigError, match="-1 steps"):
        report_steps(-1, LR)
    assert not device.state

    def error(message: Message, context: Context) -> Message:
        return Message(Error(2, "no"), reply_to=message)

    assert control_variates(request(sent), device, error).has_error() and not device.state


def test_both_corrections_at_once() -> None:
    state = initial()
    c = {name: torch.full_like(tensor, 0.1) if is_parameter(name) else tensor * 0 for name, tensor in state.items()}
    sent = {**model(state), RECORD: ArrayRecord(OrderedDict(c))}
    app = ClientApp(mods=[measure, control_variates, proximal])
    app.train()(trainer())
    grid_reply = app(request(sent, proximal_mu=MU), context())
    assert_same(arrays_of(grid_reply), train(state, sgd, lambda name, w: c[name] + MU * (w - state[name])))
    assert grid_reply.content.metric_records["metrics"]["local-steps"] == STEPS


# ---------------------------------------------------------------- measure


def test_measure_under_flowers_own_strategy() -> None:
    """FedAvg wants one MetricRecord with the same names from everybody."""
    app = ClientApp(mods=[measure])
    app.train()(trainer())

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1, "loss": 0.5})}), reply_to=message)

    state = initial()
    result = FedAvg(fraction_evaluate=1.0, min_available_nodes=3).start(
        grid=InlineGrid(app, nodes=3), initial_arrays=ArrayRecord(OrderedDict(state)), num_rounds=2
    )
    metrics = result.train_metrics_clientapp[2]
    size = sum(len(name) + len(array.data) for name, array in ArrayRecord(OrderedDict(state)).items())
    assert metrics["local-steps"] == pytest.approx(STEPS)
    assert size < float(str(metrics["bytes-in"])) < size + 100
    assert metrics["bytes-out"] == pytest.approx(size + len("num-examples") + 8)
    assert 0 < float(str(metrics["compute-seconds"])) < 10
    assert set(result.evaluate_metrics_clientapp[2]) == {"loss", "bytes-in", "compute-seconds", "bytes-out"}


def test_measure_keeps_what_the_app_reports_and_follows_the_task_clock() -> None:
    def reporting(message: Message, context: Context) -> Message:
        records = {
            "first": MetricRecord({"num-examples": 3}),
            "second": MetricRecord({"bytes-in": 1, "local-steps": 4}),
        }
        time.sleep(0.01)
        return Message(RecordDict(dict(records)), reply_to=message)

    with use_task_clock(iter([10.0, 12.5]).__next__):
        reply = measure(request(), context(), reporting)
    assert dict(reply.content.metric_records["first"]) == {"num-examples": 3, "compute-seconds": 2.5, "bytes-out": 55}
    assert dict(reply.content.metric_records["second"]) == {"bytes-in": 1, "local-steps": 4}
    assert float(str(measure(request(), context(), reporting).content["first"]["compute-seconds"])) >= 0.01

    def silent(message: Message, context: Context) -> Message:
        return Message(RecordDict({"arrays": ArrayRecord([np.ones(3)])}), reply_to=message)

    assert set(measure(request(kind="query"), context(), silent).content["metrics"]) == {
        "compute-seconds",
        "bytes-in",
        "bytes-out",
    }

    def error(message: Message, context: Context) -> Message:
        return Message(Error(2, "no"), reply_to=message)

    assert measure(request(), context(), error).error.reason == "no"


WITHOUT_TORCH = """
import sys
from flwr.app import Message, RecordDict
from fedpace.clients.mods import control_variates, measure, proximal
from fedpace.hosting.flower import become
assert "torch" not in sys.modules
become(1, 1)
def app(message, context):
    if imports:
        import torch
    return Message(RecordDict(), reply_to=message)
for imports in (False, True, True):
    print(measure(Message(RecordDict(), 1, "train"), None, app).content["metrics"].get("local-steps"))
"""


def test_mods_do_without_torch_until_the_app_imports_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], check=False, capture_output=True, text=True, timeout=100
    )
    assert done.stdout.split() == ["None", "nan", "0"], done.stderr
    assert math.isnan(float(done.stdout.split()[1]))
