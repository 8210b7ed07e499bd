"""The order of a device's samples: a function of its task's seed, the epoch and the number of samples alone.

A hash of a counter gives every sample a key, and the order is that of the keys. Nothing is drawn one after the other,
so the orders of many devices are computed at once, and any epoch without those before it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fedpace.errors import ConfigError

_INDEX_BITS = 24
MAX_SAMPLES = (1 << _INDEX_BITS) - 1
"""The most samples that one device may have."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def splitmix64(counters: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijective hash of 64 bits (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", 2014)."""
    z = counters + _GOLDEN
    z ^= z >> _SHIFTS[0]
    z *= _FACTORS[0]
    z ^= z >> _SHIFTS[1]
    z *= _FACTORS[1]
    z ^= z >> _SHIFTS[2]
    return z


def sample_orders(seeds: NDArray[np.uint64], epochs: NDArray[np.int64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The order in which each of k devices takes its samples in an epoch.

    All arguments of shape (k,). Returns int64 of shape (k, max(sizes)): row i begins with a permutation of
    range(sizes[i]); what follows names no sample of the device. Raises ConfigError for more than `MAX_SAMPLES`.
    """
    if (most := int(sizes.max(initial=0))) > MAX_SAMPLES:
        raise ConfigError(f"a device has {most} samples; {MAX_SAMPLES} is the most that one can train on")
    index = np.arange(most, dtype=np.uint64)
    streams = splitmix64(seeds ^ splitmix64(epochs.astype(np.uint64)))
    keys = splitmix64(streams[:, np.newaxis] + index * _GOLDEN)
    # The low bits of a key make room for the sample's number: keys then differ, and sorting them sorts the samples.
    keys >>= np.uint64(_INDEX_BITS)
    keys[index >= sizes[:, np.newaxis]] = np.uint64((1 << (64 - _INDEX_BITS)) - 1)
    keys <<= np.uint64(_INDEX_BITS)
    keys |= index
    keys.sort(axis=1)
    keys &= np.uint64(MAX_SAMPLES)
    return keys.view(np.int64)


def local_batches(seed: int, samples: int, batch_size: int, steps: int) -> Iterator[tuple[bool, NDArray[np.int64]]]:
    """The batches of one device's local run: whether a pass over the samples begins, and the samples' numbers."""
    seeds, sizes = np.array([seed], np.uint64), np.array([samples], np.int64)
    a_pass = -(-samples // batch_size)
    for step in range(steps):
        epoch, batch = divmod(step, a_pass)
        if batch == 0:
            order = sample_orders(seeds, np.array([epoch], np.int64), sizes)[0]
        yield batch == 0, order[batch * batch_size : (batch + 1) * batch_size]


def next_seed(seed: int) -> int:
    """Another seed, for the task after this one."""
    return int(splitmix64(np.array([seed], np.uint64))[0])
