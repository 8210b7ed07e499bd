"""Strategies that follow each device's pace, composed of small parts, with presets by name."""

from fedpace.strategies.presets import (
    CA2FL,
    PRESETS,
    REFL,
    SCAFFOLD,
    Compass,
    FedAdam,
    FedAsync,
    FedAvg,
    FedBuff,
    FedNova,
    FedProx,
    Oort,
    Paced,
    QScheduler,
    TiFL,
)

__all__ = [
    "CA2FL",
    "PRESETS",
    "REFL",
    "SCAFFOLD",
    "Compass",
    "FedAdam",
    "FedAsync",
    "FedAvg",
    "FedBuff",
    "FedNova",
    "FedProx",
    "Oort",
    "Paced",
    "QScheduler",
    "TiFL",
]
