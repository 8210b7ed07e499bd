"""Compensators: what staleness, drift and absence did to updates, corrected."""

from fedpace.strategies.compensators.cached import CachedCalibration
from fedpace.strategies.compensators.control import ControlVariates
from fedpace.strategies.compensators.delay import DelayCompensation
from fedpace.strategies.compensators.overlap import Overlap

__all__ = ["CachedCalibration", "ControlVariates", "DelayCompensation", "Overlap"]
