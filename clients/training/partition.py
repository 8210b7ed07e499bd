"""Which samples each device has: pure functions of their arguments and a seed.

`iid`, `dirichlet`, `by_key` and `quantity_skew` share out a data set: every sample is on exactly one device.
`iid_drawn` and `dirichlet_drawn` let each device draw its own samples, so that a fleet may be larger than the data set.
All raise ConfigError for arguments that cannot be.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpace.clients.training.data import FeatureShift, Partitions
from fedpace.errors import ConfigError

_CHUNK = 1 << 16
"""Devices whose draws are made at once: bounds the memory that a fleet of a million takes meanwhile."""


def iid(samples: int, devices: int, *, seed: int) -> Partitions:
    """Samples dealt out at random, the same number to each device, or one more."""
    _check(samples, devices)
    sizes = np.full(devices, samples // devices)
    sizes[: samples % devices] += 1
    return _deal(np.random.default_rng(seed).permutation(samples), sizes)


def iid_drawn(samples: int, devices: int, *, size: int, seed: int) -> Partitions:
    """Each device draws `size` of the samples, independently and with repetition."""
    _check_drawn(samples, devices, size)
    indices = np.random.default_rng(seed).integers(0, samples, devices * size, dtype=np.int32)
    return Partitions(indices, np.arange(devices + 1, dtype=np.int64) * size)


def dirichlet(labels: NDArray[Any], devices: int, *, alpha: float, seed: int, at_least: int = 1) -> Partitions:
    """Label skew: each label is shared out over the devices in proportions drawn from Dirichlet(alpha) (Yurochkin et
    al., "Bayesian Nonparametric Federated Learning of Neural Networks", ICML 2019, section 4).

    Devices left with fewer than `at_least` samples (or an even share, if that is less) take some of the largest ones.
    """
    _check(len(labels), devices)
    _check_alpha(alpha)
    rng = np.random.default_rng(seed)
    owner = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        samples = rng.permutation(np.flatnonzero(labels == label))
        limits = np.cumsum(rng.dirichlet(np.full(devices, alpha)))[:-1]
        owner[samples] = np.searchsorted(limits, (np.arange(len(samples)) + 0.5) / len(samples))
    _fill_up(owner, devices, min(at_least, len(labels) // devices), rng)
    shuffled = rng.permutation(len(labels))
    return _group(owner[shuffled], devices, shuffled)


def dirichlet_drawn(labels: NDArray[Any], devices: int, *, alpha: float, size: int, seed: int) -> Partitions:
    """Label skew: each device has a mix of labels of its own, drawn from Dirichlet(alpha x the whole set's mix), and
    draws `size` samples from it, with repetition (Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data
    Distribution for Federated Visual Classification", 2019, section 3; `alpha` is the sum over all labels).
    """
    _check_drawn(len(labels), devices, size)
    _check_alpha(alpha)
    rng = np.random.default_rng(seed)
    _, numbers, counts = np.unique(labels, return_inverse=True, return_counts=True)
    by_label = np.argsort(numbers, kind="stable").astype(np.int32)
    starts = np.cumsum(counts) - counts
    indices = np.empty((devices, size), np.int32)
    for first in range(0, devices, _CHUNK):
        part = indices[first : first + _CHUNK]
        limits = np.cumsum(rng.dirichlet(alpha * counts / len(labels), len(part)), axis=1)
        draws = rng.random(part.shape)
        label = np.zeros(part.shape, np.int64)
        for limit in limits[:, :-1].T:
            label += draws >= limit[:, np.newaxis]
        part[:] = by_label[starts[label] + (rng.random(part.shape) * counts[label]).astype(np.int64)]
    return Partitions(indices.reshape(-1), np.arange(devices + 1, dtype=np.int64) * size)


def by_key(keys: NDArray[Any], devices: int | None = None, *, seed: int = 0) -> Partitions:
    """Samples of one natural key (a writer, a role, a subject) are on one device. `keys`: of shape (n,), any dtype.

    A device a key, in the keys' order; with fewer `devices`, keys are dealt out to them in an order drawn from `seed`.
    """
    names, numbers = np.unique(keys, return_inverse=True)
    if devices is None or devices == len(names):
        return _group(numbers, len(names))
    _check(len(names), devices, "keys")
    place = np.random.default_rng(seed).permutation(len(names)) % devices
    return _group(place[numbers], devices)


def quantity_skew(samples: int, devices: int, *, seed: int, sigma: float = 1.0, at_least: int = 1) -> Partitions:
    """Samples dealt out at random in numbers that follow a log-normal law: `sigma` is the standard deviation of their
    logarithm. No device gets fewer than `at_least`, or than an even share, if that is less."""
    _check(samples, devices)
    if not 0 <= sigma < np.inf:
        raise ConfigError(f"sigma is {sigma}: choose 0 or more")
    rng = np.random.default_rng(seed)
    weights = np.exp(sigma * rng.standard_normal(devices))
    least = min(at_least, samples // devices)
    limits = np.rint(np.cumsum(weights) / weights.sum() * (samples - least * devices)).astype(np.int64)
    return _deal(rng.permutation(samples), np.diff(limits, prepend=0) + least)


def feature_shift(
    devices: int, *, seed: int, contrast: float = 0.0, brightness: float = 0.0, rotate: bool = False
) -> FeatureShift:
    """Sensors that differ: gains log-normal with `contrast` as the standard deviation of their logarithm, biases normal
    with the standard deviation `brightness` (in units of the inputs), and, with `rotate`, quarter turns."""
    if devices < 1 or contrast < 0 or brightness < 0:
        raise ConfigError(
            f"{devices} devices, contrast {contrast}, brightness {brightness}: choose 1 device or more, and spreads of "
            "0 or more"
        )
    rng = np.random.default_rng(seed)
    gain = np.exp(contrast * rng.standard_normal(devices)).astype(np.float32)
    bias = (brightness * rng.standard_normal(devices)).astype(np.float32)
    turns = rng.integers(0, 4 if rotate else 1, devices, dtype=np.int8)
    return FeatureShift(gain, bias, turns)


def _check(samples: int, devices: int, what: str = "samples") -> None:
    if not 1 <= devices <= samples:
        raise ConfigError(f"{devices} devices cannot share {samples} {what}: choose from 1 to {samples}")


def _check_drawn(samples: int, devices: int, size: int) -> None:
    if devices < 1 or size < 1 or not 1 <= samples < 1 << 31:
        raise ConfigError(f"{devices} devices cannot draw {size} of {samples} samples: choose 1 or more of each")


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < np.inf:
        raise ConfigError(f"alpha is {alpha}: choose more than 0")


def _fill_up(owner: NDArray[np.int64], devices: int, least: int, rng: np.random.Generator) -> None:
    """Moves samples, drawn at random, from the devices that have most to those that have fewer than `least`."""
    sizes = np.bincount(owner, minlength=devices)
    takers = np.repeat(np.arange(devices), np.maximum(least - sizes, 0))
    if not len(takers):
        return
    shuffled = rng.permutation(len(owner))
    holders = owner[shuffled]
    by_holder = np.argsort(holders, kind="stable")
    left = np.empty(len(owner), np.int64)  # what a sample's device has left if it gives this one and those before it
    left[by_holder] = np.repeat(np.cumsum(sizes), sizes) - np.arange(len(owner)) - 1
    owner[shuffled[np.argsort(-left, kind="stable")[: len(takers)]]] = takers


def _group(owner: NDArray[np.int64], devices: int, samples: NDArray[np.int64] | None = None) -> Partitions:
    """Samples by their device, in the order given."""
    order = np.argsort(owner, kind="stable")
    return _deal(order if samples is None else samples[order], np.bincount(owner, minlength=devices))


def _deal(indices: NDArray[np.int64], sizes: NDArray[np.int64]) -> Partitions:
    offsets = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return Partitions(indices.astype(np.int32 if len(indices) < 1 << 31 else np.int64), offsets)
