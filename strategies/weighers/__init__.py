"""Weighers: one factor each of an update's weight."""

from fedpace.strategies.weighers.error import ErrorWeight
from fedpace.strategies.weighers.mixing import Absolute, Mixing
from fedpace.strategies.weighers.samples import FleetShare, Samples
from fedpace.strategies.weighers.speed import Speed
from fedpace.strategies.weighers.staleness import Constant, Hinge, Polynomial
from fedpace.strategies.weighers.steps import NormalisedSteps

__all__ = [
    "Absolute",
    "Constant",
    "ErrorWeight",
    "FleetShare",
    "Hinge",
    "Mixing",
    "NormalisedSteps",
    "Polynomial",
    "Samples",
    "Speed",
]
