"""Randomness derived from what is known: (run seed, purpose, node, task)."""

from __future__ import annotations

import functools
import hashlib
import random
import sys
from typing import Any

import numpy as np


def derive_seed(seed: int, purpose: str, *ids: int) -> int:
    """A 64-bit seed of its own for every purpose, node and task of a run."""
    text = "/".join([str(seed), purpose, *map(str, ids)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


class Seeds:
    """`derive_seed` of one purpose, for many ids."""

    def __init__(self, seed: int, purpose: str) -> None:
        self._prefix = hashlib.sha256(f"{seed}/{purpose}/".encode())

    def of(self, first: int, second: int) -> int:
        """`derive_seed(seed, purpose, first, second)`."""
        found = self._prefix.copy()
        found.update(f"{first}/{second}".encode())
        return int.from_bytes(found.digest()[:8], "big")


def seed_globals(seed: int) -> None:
    """Seeds the global generators of `random`, numpy and, where it is loaded, torch."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    if (torch := sys.modules.get("torch")) is not None:
        if _accelerated(torch):
            torch.manual_seed(seed)
        else:  # the same without a hundred microseconds for accelerators that are not there
            torch.default_generator.manual_seed(seed)


@functools.cache
def _accelerated(torch: Any) -> bool:
    return bool(torch.cuda.is_available() or torch.backends.mps.is_available() or torch.xpu.is_available())
