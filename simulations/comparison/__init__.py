"""Strategies compared: a scenario of apps, fleets, strategies and seeds, run over the cores, and what comes of it."""
