"""Randomness derived from what is known: (run seed, purpose, node, task)."""

from __future__ import annotations

import hashlib
import random
import sys

import numpy as np


def derive_seed(seed: int, purpose: str, *ids: int) -> int:
    """A 64-bit seed of its own for every purpose, node and task of a run."""
    text = "/".join([str(seed), purpose, *map(str, ids)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def seed_globals(seed: int) -> None:
    """Seeds the global generators of `random`, numpy and, where it is loaded, torch."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(seed)
