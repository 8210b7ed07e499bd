"""Flower mods: what surrounds a ClientApp's work, given as `ClientApp(mods=[...])`, the first one outermost."""

from fedpace.clients.mods.compress import compress
from fedpace.clients.mods.control import control_variates
from fedpace.clients.mods.measure import measure
from fedpace.clients.mods.proximal import proximal
from fedpace.clients.mods.replica import replica

__all__ = ["compress", "control_variates", "measure", "proximal", "replica"]
