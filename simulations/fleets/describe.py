"""A fleet in a short table for people."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedpace.simulations.fleets.devices import BYTES_PER_MB, BYTES_PER_MBIT
from fedpace.simulations.fleets.fleet import SimulatedFleet

_QUANTILES = (5, 25, 50, 75, 95)


def describe(fleet: SimulatedFleet) -> str:
    """Quantiles over devices of what is modelled, then what happens to tasks; lines of text."""
    devices = fleet.devices
    lines = [f"{fleet.name}: {fleet.size:,} devices", f"{'':22}" + "".join(f"{f'p{q}':>10}" for q in _QUANTILES)]
    for label, values in (
        ("seconds a step", devices.step_seconds),
        ("download Mbit/s", devices.down / BYTES_PER_MBIT),
        ("upload Mbit/s", devices.up / BYTES_PER_MBIT),
        ("latency ms", devices.latency * 1000.0),
        ("memory MB", devices.memory_bytes / BYTES_PER_MB),
    ):
        lines.append(f"{label:22}" + "".join(f"{value:>10.4g}" for value in np.percentile(values, _QUANTILES)))
    lines += [f"{label:22}{text}" for label, text in _facts(fleet)]
    return "\n".join(lines)


def _facts(fleet: SimulatedFleet) -> Iterator[tuple[str, str]]:
    settings = fleet.settings
    compute, availability, faults, battery = settings.compute, settings.availability, settings.faults, settings.battery
    if compute.classes:
        shares = np.bincount(fleet.devices.kind, minlength=len(compute.classes)) / fleet.size
        named = zip(compute.classes, shares, strict=True)
        yield "classes", ", ".join(f"{entry.name or '?'} {share:.2%}" for entry, share in named)
    there = f"{fleet.initially_present().mean():.1%} at the start ({availability.model})"
    if availability.model == "sessions":
        there += f", {availability.day_share:.0%} by day, {availability.night_share:.0%} by night"
    yield "present", "always" if availability.model == "always" else there
    yield "a task", f"{faults.dropout:.1%} dropped, {faults.failure:.1%} failed"
    if np.isfinite(fleet.server_bytes_per_second):
        yield "server's link", f"{settings.network.server_mbit:g} Mbit/s, shared by the transfers under way"
    if np.isfinite(battery.hours_of_compute):
        yield "battery", f"{battery.hours_of_compute:g} h of compute, {battery.hours_to_charge:g} h to charge"
    if np.isfinite(compute.throttle_after_seconds):
        after = compute.throttle_after_seconds
        yield "throttling", f"{compute.throttle_factor:g} times slower after {after:g} s of work"
    if compute.drift_per_hour:
        limit = compute.drift_limit
        yield "drift", f"up to {compute.drift_per_hour:.0%} slower an hour, at most {limit:g} times"
    if settings.misreport.share:
        lies = settings.misreport
        claims = f"compute time x {lies.compute_factor:g}, profile x {lies.profile_factor:g}"
        yield "misreporting", f"{fleet.devices.liar.mean():.1%} of devices: {claims}"
