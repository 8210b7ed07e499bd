"""From updates to weights, from replies to metrics, and from arrays to one vector and back: laws, whatever comes in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpace.errors import ConfigError, PayloadError, RunError
from fedpace.protocol.received import RecordsUpdate
from fedpace.strategies.composition import Composition
from fedpace.strategies.events import Fold
from fedpace.strategies.fleet import Fleet
from fedpace.strategies.layout import Layout, Model
from fedpace.strategies.ledger import Ledger
from fedpace.strategies.parts import Context, Updates
from fedpace.strategies.presets import CA2FL, SCAFFOLD, FedAdam, FedAvg, FedBuff, Paced
from fedpace.strategies.weights import combine, combine_metrics

law = settings(deadline=None, max_examples=60)
factors = st.sampled_from([0.0, 5e-324, 1e-300, 1.7e308]) | st.floats(0.0, 1.7e308) | st.floats(0.0, 1.0)


class Relative:
    """A weigher that gives what it was told."""

    def __init__(self, found: Any) -> None:
        self.found = found

    def weigh(self, updates: Updates, context: Context) -> Any:
        return self.found


class Absolute:
    def __init__(self, found: Any) -> None:
        self.found = found

    def scale(self, updates: Updates, relative: Any, context: Context) -> Any:
        assert relative.sum() == pytest.approx(1.0)
        return self.found


def combined(count: int, *weighers: Any) -> tuple[Any, dict[int, str]]:
    fleet = Fleet()
    fleet.join_all(range(count))
    context = Context(fleet, np.random.default_rng(0))
    return combine(weighers, Updates(fleet, range(count), range(count)), lambda part: context)


@st.composite
def tables(draw: st.DrawFn) -> tuple[int, list[list[float]]]:
    count = draw(st.integers(1, 5))
    rows = st.lists(factors, min_size=count, max_size=count)
    return count, draw(st.lists(rows, max_size=4))


# ---------------------------------------------------------------- weights


@law
@given(tables())
def test_relative_weights_share_out_one_whole(table: tuple[int, list[list[float]]]) -> None:
    count, rows = table
    weights, reasons = combined(count, *map(Relative, rows))
    assert np.isfinite(weights).all() and (weights >= 0).all()
    assert weights.sum() == pytest.approx(1.0) or not weights.any()
    zero = {i for i in range(count) if any(row[i] == 0 for row in rows)}
    assert zero <= set(np.flatnonzero(weights == 0).tolist()) and set(reasons) == zero


@law
@given(st.data(), st.integers(1, 6), st.floats(1e-3, 1e3))
def test_weights_are_the_products_in_proportion(data: st.DataObject, count: int, times: float) -> None:
    row = st.lists(st.floats(0.1, 10.0), min_size=count, max_size=count)
    first, second, scale = (np.array(data.draw(row)) for _ in range(3))
    shares, _ = combined(count, Relative(first), Relative(second))
    np.testing.assert_allclose(shares, first * second / (first * second).sum())
    np.testing.assert_allclose(combined(count, Relative(times * first), Relative(second))[0], shares)
    weights, _ = combined(count, Relative(first), Absolute(scale), Relative(second), Absolute(0.5))
    np.testing.assert_allclose(weights, shares * scale * 0.5)


def test_all_zero_weights_say_who_gave_none() -> None:
    weights, reasons = combined(3, Relative([1.0, 0.0, 2.0]), Relative([0.0, 1.0, 0.0]))
    assert not weights.any()
    assert reasons == dict.fromkeys(range(3), "Relative gives it no weight")


@pytest.mark.parametrize("kind", [Relative, Absolute])
@pytest.mark.parametrize(
    "found",
    [
        [1.0, 2.0],
        [[1.0, 1.0, 1.0]],
        [],
        [1.0, np.nan, 1.0],
        [1.0, np.inf, 1.0],
        [1.0, -1e-9, 1.0],
        -1.0,
        None,
        "much",
        [[1.0], [1.0, 2.0], []],
        [10**400, 1, 1],
        {"a": 1.0},
    ],
)
def test_a_weigher_that_answers_nonsense_is_named(kind: Any, found: Any) -> None:
    with pytest.raises(RunError, match=f"weigher {kind.__name__} returned .*for 3 updates"):
        combined(3, kind(found))


def test_absolute_factors_too_large_together_are_an_error() -> None:
    with pytest.raises(RunError, match="not finite"):
        combined(2, Absolute([1e200, 1.0]), Absolute([1e200, 1.0]))
    with pytest.raises(RunError, match="not finite"):  # infinity times 0
        combined(2, Absolute([1e200, 1.0]), Absolute([1e200, 1.0]), Absolute([0.0, 1.0]))


# ---------------------------------------------------------------- metrics

numbers = st.floats(allow_nan=True, allow_infinity=True) | st.integers(-(10**320), 10**320)
metric_values = numbers | st.lists(numbers, max_size=3) | st.text(max_size=3)
replies = st.lists(
    st.tuples(st.floats(0.0, 1e308), st.dictionaries(st.sampled_from("abcn"), metric_values)), max_size=5
)


@law
@given(replies)
def test_combined_metrics_are_finite_and_lie_between_those_of_the_devices(
    found: list[tuple[float, dict[str, Any]]],
) -> None:
    result = combine_metrics(found, "n")
    assert set(result) <= set.intersection(*(set(metrics) for _, metrics in found)) - {"n"} if found else not result
    for name, value in result.items():
        plain = [metrics[name] for _, metrics in found if isinstance(metrics[name], int | float)]
        finite = [float(x) for x in plain if abs(x) < 1e308]
        if isinstance(value, float) and len(finite) == len(found):
            span = max(map(abs, finite))
            assert min(finite) - 1e-9 * span <= value <= max(finite) + 1e-9 * span


def test_combined_metrics_are_means_weighted_by_samples() -> None:
    found = [
        (1.0, {"n": 1, "loss": 4.0, "rate": [0.0, 1.0], "mine": 1}),
        (3.0, {"n": 3, "loss": 0, "rate": [1.0, 1.0]}),
    ]
    assert combine_metrics(found, "n") == {"loss": 1.0, "rate": [0.75, 1.0]}
    broken = [*found, (4.0, {"n": 4, "loss": float("nan"), "rate": [1.0]})]
    assert combine_metrics(broken, "n") == {"loss": 1.0}
    assert combine_metrics([(0.0, {"loss": 1.0}), (0.0, {"loss": 2.0})], "n") == {"loss": 1.5}
    assert combine_metrics([(1e308, {"loss": 1.0}), (1e308, {"loss": 2.0})], "n") == {"loss": 1.5}


# ---------------------------------------------------------------- the order of a fold


@pytest.mark.parametrize("preset", [FedAvg, FedAdam, FedBuff, CA2FL, SCAFFOLD, Paced])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_order_of_a_fold_does_not_matter(preset: Any, dtype: Any) -> None:
    """Beyond float tolerance: several folds of the same updates, each in another order."""
    rng = np.random.default_rng(3)
    count, rounds = 7, 3
    start = ArrayRecord({"w": Array(rng.normal(size=(5, 3)).astype(dtype)), "seen": Array(np.array(3, np.int64))})
    updates = rng.normal(size=(rounds, count, 5, 3)).astype(dtype)
    weights = rng.dirichlet(np.ones(count), rounds)
    composition: Composition = preset().composition
    ends = []
    for seed in range(3):
        ledger = Ledger(composition, start, "arrays")
        order = np.random.default_rng(seed)
        for number in range(rounds):
            tasks = [count * number + i for i in range(count)]
            for task, update in zip(tasks, updates[number], strict=True):
                arrays = ArrayRecord({"w": Array(update), "seen": Array(np.array(task, np.int64))})
                records: Any = {"arrays": arrays, "control": arrays}
                ledger.receive(task, number, RecordsUpdate(RecordDict(records)), checked=False)
            chosen = order.permutation(count).tolist()
            ledger.fold(
                Fold(
                    "test",
                    [tasks[i] for i in chosen],
                    [float(weights[number, i]) for i in chosen],
                    chosen,
                    [0] * count,
                    [1.0] * count,
                    count,
                )
            )
            assert np.isfinite(ledger.step(number + 1))
        ends.append(ledger.current.arrays)
    tolerance = 1e-4 if dtype == np.float32 else 1e-9
    for end in ends[1:]:
        np.testing.assert_allclose(end["w"], ends[0]["w"], rtol=tolerance, atol=tolerance)
        assert (
            end["w"].dtype == dtype and abs(int(end["seen"]) - int(ends[0]["seen"])) <= 1
        )  # a half may round either way


# ---------------------------------------------------------------- layout

DTYPES = [np.float16, np.float32, np.float64, np.int8, np.uint8, np.int32, np.int64, np.uint64, np.bool_]
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@st.composite
def models(draw: st.DrawFn) -> dict[str, Any]:
    """Arrays of any kind and shape, 0-d and empty ones among them."""
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    kinds = draw(st.lists(st.tuples(st.sampled_from(DTYPES), shapes), min_size=1, max_size=5))
    return {
        f"array {i}": np.asarray(
            100 * rng.random(shape) if np.dtype(dtype).kind != "b" else rng.random(shape) < 0.5, dtype
        )
        for i, (dtype, shape) in enumerate(kinds)
    }


def record(arrays: dict[str, Any]) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


@law
@given(models())
def test_a_model_that_is_not_moved_keeps_every_bit(arrays: dict[str, Any]) -> None:
    layout = Layout(record(arrays))
    model = Model.of(layout, record(arrays))
    assert layout.size == sum(array.size for array in arrays.values())
    assert model.flat.shape == (layout.size,) and model.flat.dtype == layout.dtype
    for moved in (model, model.moved(layout.zeros()), model.moved(layout.zeros()).moved(layout.zeros())):
        found = {name: array.numpy() for name, array in moved.record.items()}
        assert list(found) == list(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array, strict=True)
    back = layout.record(model.flat)
    assert {name: array.numpy().shape for name, array in back.items()} == layout.shapes


@law
@given(models(), st.integers(0, 99))
def test_a_model_moved_by_a_change_is_the_device_s(arrays: dict[str, Any], seed: int) -> None:
    """For every kind of number: unsigned ones and booleans, whose differences may be negative, too."""
    rng = np.random.default_rng(seed)
    theirs = {name: np.asarray(rng.permuted(array.reshape(-1)).reshape(array.shape)) for name, array in arrays.items()}
    layout = Layout(record(arrays))
    model = Model.of(layout, record(arrays))
    layout.check(theirs, finite=True)
    moved = model.moved(layout.change(theirs, model, layout.zeros()))
    for name, array in theirs.items():
        assert moved.arrays[name].dtype == array.dtype
        np.testing.assert_allclose(moved.arrays[name].astype(float), array.astype(float), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "before", "theirs", "middle"),
    [
        (np.uint8, [200, 7], [100, 9], [150, 8]),
        (np.bool_, [True, False], [False, False], [True, False]),  # halves are rounded to even: no step
        (np.int64, [2**60, -5], [2**60, 5], [2**60, 0]),
        (np.float16, [60000.0, 1.0], [-60000.0, 3.0], [0.0, 2.0]),
    ],
)
def test_a_mean_of_two_lies_in_the_middle(dtype: Any, before: Any, theirs: Any, middle: Any) -> None:
    start = record({"a": np.array(before, dtype)})
    layout = Layout(start)
    model = Model.of(layout, start)
    half = 0.5 * layout.change({"a": np.array(theirs, dtype)}, model, layout.zeros())
    np.testing.assert_array_equal(model.moved(half).arrays["a"], np.array(middle, dtype), strict=True)


@pytest.mark.filterwarnings("error")
def test_integers_do_not_wrap_around() -> None:
    start = record({"u": np.array([250, 3], np.uint8), "b": np.array([True, False]), "i": np.array([1, 1], np.int64)})
    layout = Layout(start)
    by = np.array([100.0, -100.0, 3.0, -3.0, 1e30, np.nan], np.float32)
    found = Model.of(layout, start).moved(by).arrays
    assert found["u"].tolist() == [255, 0] and found["b"].tolist() == [True, False]
    assert found["i"].tolist() == [2**62 + 1, 1]


def test_arrays_that_do_not_fit_are_named() -> None:
    layout = Layout(record({"w": np.zeros((2, 2), np.float32)}))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "'w' is missing; there are none"),
        ({"w": np.zeros(4, np.float32)}, "shape"),
        ({"w": np.full((2, 2), np.inf, np.float32)}, "NaN or infinite"),
        ({"w": np.zeros((2, 2), "U1")}, "holds no numbers"),
    ]
    for arrays, reason in wrong:
        with pytest.raises(PayloadError, match=reason):
            layout.check(arrays, finite=True)
    for start, reason in [({}, "is empty"), ({"w": np.zeros(2, complex)}, "no number")]:
        with pytest.raises(ConfigError, match=reason):
            Layout(record(start))
