"""Flower mods: what surrounds a ClientApp's work, given as `ClientApp(mods=[...])`, the first one outermost."""

from fedpace.clients.mods.control import control_variates
from fedpace.clients.mods.measure import measure
from fedpace.clients.mods.proximal import proximal

__all__ = ["control_variates", "measure", "proximal"]
