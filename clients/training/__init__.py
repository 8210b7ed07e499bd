"""Local training that an app declares once: run on real devices, and by simulations together for many of them."""

from __future__ import annotations

from fedpace.clients.training.data import FeatureShift, FederatedData, Partitions
from fedpace.clients.training.declaration import SGD, Adam, LocalTraining, declared_training
from fedpace.clients.training.partition import (
    by_key,
    dirichlet,
    dirichlet_drawn,
    feature_shift,
    iid,
    iid_drawn,
    quantity_skew,
)

__all__ = [
    "SGD",
    "Adam",
    "FeatureShift",
    "FederatedData",
    "LocalTraining",
    "Partitions",
    "by_key",
    "declared_training",
    "dirichlet",
    "dirichlet_drawn",
    "feature_shift",
    "iid",
    "iid_drawn",
    "quantity_skew",
]
