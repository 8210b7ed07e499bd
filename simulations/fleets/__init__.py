"""Fleet models: how fast, how connected and how present simulated devices are."""

from __future__ import annotations

from fedpace.simulations.fleets.describe import describe
from fedpace.simulations.fleets.ends import OUTCOMES, REASONS, End, Ends
from fedpace.simulations.fleets.fleet import SimulatedFleet, load_fleet
from fedpace.simulations.fleets.reading import preset_names

__all__ = ["OUTCOMES", "REASONS", "End", "Ends", "SimulatedFleet", "describe", "load_fleet", "preset_names"]
