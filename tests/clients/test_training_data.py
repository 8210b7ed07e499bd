"""Data of a federation: partitions, orders of samples, what devices see."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedpace.clients.training import (
    FeatureShift,
    FederatedData,
    Partitions,
    by_key,
    dirichlet,
    dirichlet_drawn,
    feature_shift,
    iid,
    iid_drawn,
    quantity_skew,
)
from fedpace.clients.training.order import local_batches, sample_orders
from fedpace.errors import ConfigError

LABELS = np.random.default_rng(5).integers(0, 10, 2000)
SHARING: dict[str, Callable[[int, int], Partitions]] = {
    "iid": lambda devices, seed: iid(2000, devices, seed=seed),
    "dirichlet": lambda devices, seed: dirichlet(LABELS, devices, alpha=0.3, seed=seed),
    "quantity_skew": lambda devices, seed: quantity_skew(2000, devices, seed=seed),
    "by_key": lambda devices, seed: by_key(np.arange(2000) // 20, devices, seed=seed),
}
DRAWING: dict[str, Callable[[int, int], Partitions]] = {
    "iid_drawn": lambda devices, seed: iid_drawn(2000, devices, size=7, seed=seed),
    "dirichlet_drawn": lambda devices, seed: dirichlet_drawn(LABELS, devices, alpha=0.5, size=7, seed=seed),
}


@pytest.mark.parametrize("name", SHARING)
@given(devices=st.integers(1, 100), seed=st.integers(0, 9))
def test_every_sample_is_on_exactly_one_device(name: str, devices: int, seed: int) -> None:
    partitions = SHARING[name](devices, seed)
    assert len(partitions) == devices
    assert (partitions.sizes >= 1).all()
    assert sorted(np.concatenate(list(partitions)).tolist()) == list(range(2000))


@pytest.mark.parametrize("name", [*SHARING, *DRAWING])
def test_a_seed_says_everything(name: str) -> None:
    make = {**SHARING, **DRAWING}[name]
    one, same, other = make(50, 1), make(50, 1), make(50, 2)
    assert (one.indices == same.indices).all()
    assert (one.offsets == same.offsets).all()
    assert one.indices.tolist() != other.indices.tolist()


@pytest.mark.parametrize("name", DRAWING)
def test_a_fleet_may_be_larger_than_the_data(name: str) -> None:
    partitions = DRAWING[name](5000, 0)
    assert (partitions.sizes == 7).all()
    assert 0 <= partitions.indices.min() <= partitions.indices.max() < 2000


def labels_a_device(partitions: Partitions) -> float:
    return float(np.mean([len(np.unique(LABELS[samples])) for samples in partitions if len(samples)]))


def test_a_smaller_alpha_means_fewer_labels_a_device() -> None:
    alphas = (0.1, 1.0, 100.0)
    for kind in (
        [dirichlet(LABELS, 40, alpha=alpha, seed=3) for alpha in alphas],
        [dirichlet_drawn(LABELS, 40, alpha=alpha, size=50, seed=3) for alpha in alphas],
    ):
        found = list(map(labels_a_device, kind))
        assert found == sorted(found)
        assert found[0] < 6
        assert found[2] > 9


def test_shares_follow_the_law_they_are_drawn_from() -> None:
    drawn = dirichlet_drawn(LABELS, 4000, alpha=2.0, size=20, seed=1)
    shares = np.stack([np.bincount(LABELS[samples], minlength=10) / 20 for samples in drawn])
    mix = np.bincount(LABELS) / len(LABELS)
    np.testing.assert_allclose(shares.mean(axis=0), mix, atol=0.01)
    # A share is p ~ Beta(alpha m, alpha (1 - m)), then a mean of 20 draws of it.
    variance = mix * (1 - mix) / 3
    expected = variance + (mix * (1 - mix) - variance) / 20
    np.testing.assert_allclose(shares.var(axis=0), expected, rtol=0.1)
    sizes = quantity_skew(200_000, 500, seed=2, sigma=0.7).sizes
    assert np.log(sizes).std() == pytest.approx(0.7, rel=0.1)


def test_at_least_so_many_samples() -> None:
    assert dirichlet(LABELS, 100, alpha=0.05, seed=0, at_least=10).sizes.min() == 10
    assert quantity_skew(2000, 100, seed=0, sigma=3.0, at_least=5).sizes.min() >= 5
    assert dirichlet(LABELS, 2000, alpha=0.05, seed=0, at_least=10).sizes.min() == 1  # an even share is less


def test_a_key_is_on_one_device() -> None:
    keys = np.array(["b", "a", "b", "c", "a"])
    assert [samples.tolist() for samples in by_key(keys)] == [[1, 4], [0, 2], [3]]
    owners = by_key(np.arange(600) // 6, 10, seed=4)
    for samples in owners:
        assert len({sample // 6 for sample in samples.tolist()}) * 6 == len(samples)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: iid(5, 6, seed=0), "6 devices cannot share 5 samples"),
        (lambda: iid(5, 0, seed=0), "0 devices"),
        (lambda: dirichlet(LABELS, 5, alpha=0.0, seed=0), "alpha"),
        (lambda: dirichlet_drawn(LABELS, 5, alpha=-1, size=3, seed=0), "alpha"),
        (lambda: iid_drawn(10, 5, size=0, seed=0), "choose 1 or more of each"),
        (lambda: quantity_skew(10, 5, seed=0, sigma=-1), "sigma is -1"),
        (lambda: by_key(np.arange(3), 4), "4 devices cannot share 3 keys"),
        (lambda: feature_shift(3, seed=0, contrast=-1), "spreads"),
        (lambda: Partitions(np.arange(3.0), np.array([0, 3])), "indices are float64"),
        (lambda: Partitions(np.arange(3), np.array([0, 2, 1, 3])), "rise from 0"),
        (lambda: Partitions(np.arange(3), np.array([0, 2])), "rise from 0"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], object], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        make()


def test_data_that_does_not_fit_together_is_refused() -> None:
    images, labels = np.zeros((4, 1, 2, 3), np.float32), np.zeros(4, np.int64)
    two = iid(4, 2, seed=0)
    good = (images, labels, two, images, labels)
    FederatedData(*good)
    with pytest.raises(ConfigError, match="float64"):
        FederatedData(images.astype(np.float64), *good[1:])
    with pytest.raises(ConfigError, match="4 inputs, but 3 targets"):
        FederatedData(images, labels[:3], *good[2:])
    with pytest.raises(ConfigError, match="there are 4"):
        FederatedData(images, labels, iid(5, 2, seed=0), images, labels)
    with pytest.raises(ConfigError, match="2 devices train, but 3 evaluate"):
        FederatedData(*good, test_partitions=iid(4, 3, seed=0))
    with pytest.raises(ConfigError, match="for 2 devices"):
        FederatedData(*good, shift=feature_shift(3, seed=0))
    turned = FeatureShift(np.ones(2, np.float32), np.zeros(2, np.float32), np.ones(2, np.int8))
    with pytest.raises(ConfigError, match="only square images"):
        FederatedData(*good, shift=turned)


def test_devices_see_what_their_sensors_make_of_it() -> None:
    images = np.random.default_rng(0).random((6, 1, 3, 3), np.float32)
    shift = feature_shift(2, seed=1, contrast=0.3, brightness=0.2)
    shift = FeatureShift(shift.gain, shift.bias, np.array([0, 3], np.int8))
    data = FederatedData(images, np.arange(6), iid(6, 2, seed=0), images, np.arange(6), shift=shift)
    for device in range(2):
        seen, labels = data.samples(device, data.training)
        plain = images[data.partitions[device]] * shift.gain[device] + shift.bias[device]
        np.testing.assert_allclose(seen, np.rot90(plain, int(shift.turns[device]), axes=(-2, -1)), rtol=1e-6)
        assert labels.tolist() == data.partitions[device].tolist()
    assert data.testing.partitions is data.partitions
    with pytest.raises(IndexError):
        data.samples(2, data.training)


@given(
    seeds=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5),
    epoch=st.integers(0, 1000),
    data=st.data(),
)
def test_orders_are_permutations_of_each_device_alone(seeds: list[int], epoch: int, data: st.DataObject) -> None:
    sizes = [data.draw(st.integers(0, 40)) for _ in seeds]
    epochs = np.full(len(seeds), epoch)
    together = sample_orders(np.array(seeds, np.uint64), epochs, np.array(sizes))
    for seed, size, order in zip(seeds, sizes, together, strict=True):
        assert sorted(order[:size].tolist()) == list(range(size))
        alone = sample_orders(np.array([seed], np.uint64), epochs[:1], np.array([size]))
        assert alone[0].tolist() == order[:size].tolist()


def test_orders_are_even() -> None:
    """Each sample is as often at each place: chi-squared with 81 degrees of freedom, 5 standard deviations."""
    orders = sample_orders(np.arange(9000, dtype=np.uint64), np.zeros(9000, np.int64), np.full(9000, 10))
    counts = np.stack([np.bincount(place, minlength=10) for place in orders.T])
    assert ((counts - 900) ** 2 / 900).sum() < 81 + 5 * np.sqrt(2 * 81)


@given(samples=st.integers(1, 20), batch_size=st.integers(1, 7), steps=st.integers(1, 30))
def test_batches_go_through_all_samples_again_and_again(samples: int, batch_size: int, steps: int) -> None:
    batches = list(local_batches(3, samples, batch_size, steps))
    assert len(batches) == steps
    passes: list[list[int]] = []
    for first, batch in batches:
        assert 1 <= len(batch) <= batch_size
        if first:
            passes.append([])
        passes[-1] += batch.tolist()
    for whole in passes[:-1]:
        assert sorted(whole) == list(range(samples))
    assert len(passes) == -(-steps // -(-samples // batch_size))


def test_importing_it_does_not_import_torch() -> None:
    code = "import sys, fedpace.clients.training; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
