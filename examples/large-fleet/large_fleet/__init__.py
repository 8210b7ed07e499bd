"""Declared local work: the same on real devices and in simulations of large fleets."""
