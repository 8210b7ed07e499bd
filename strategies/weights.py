"""From updates to the weight of each: relative factors that share out one whole, absolute ones that scale it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fedpace.errors import RunError
from fedpace.protocol.downlink import VERSION
from fedpace.strategies.composition import name_of, weigh
from fedpace.strategies.fleet import Floats
from fedpace.strategies.parts import Context, Updates
from fedpace.strategies.weighers.samples import MOST


def combine(
    weighers: Sequence[Any], updates: Updates, context_of: Callable[[Any], Context]
) -> tuple[Floats, dict[int, str]]:
    """The weight of every update, and why some have none.

    Weight i is p_i * a_i: p the products of the relative factors over their sum, a the products of the absolute ones.
    Where all relative factors are 0, all weights are. Raises RunError for a factor that is negative or not finite, and for
    absolute ones that are too large together.
    """
    relative = np.ones(len(updates))
    reasons: dict[int, str] = {}
    for weigher in weighers:
        if hasattr(weigher, "scale"):
            continue
        factor = _checked(weigher, weigh(weigher, updates, context_of(weigher)), len(updates))
        for i in np.flatnonzero(factor == 0):
            reasons.setdefault(int(i), f"{name_of(weigher)} gives it no weight")
        relative *= _proportions(factor)  # only proportions count, and so nothing overflows
        relative = _proportions(relative)
    if not relative.any():
        return relative, reasons
    relative /= relative.sum()
    weights = relative.copy()
    for weigher in weighers:
        if hasattr(weigher, "scale"):
            factor = _checked(weigher, weigher.scale(updates, relative, context_of(weigher)), len(updates))
            with np.errstate(over="ignore", invalid="ignore"):
                weights *= factor
    if not np.isfinite(weights).all():
        raise RunError("a weight is not finite: absolute weighers' factors are too large together")
    return weights, reasons


def _proportions(factor: Floats) -> Floats:
    """The same proportions, with 1 for the largest."""
    largest = float(factor.max(initial=0.0))
    return factor / largest if largest > 0.0 else factor


def _checked(weigher: Any, factor: Any, count: int) -> Floats:
    try:
        found: Floats = np.asarray(factor, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise RunError(f"weigher {name_of(weigher)} returned no numbers for {count} updates: {error}") from None
    if found.ndim == 0:
        found = np.full(count, float(found))
    if found.shape != (count,) or not np.isfinite(found).all() or (found < 0).any():
        raise RunError(
            f"weigher {name_of(weigher)} returned {np.array2string(found, threshold=8)} for {count} updates: "
            "it must return one finite factor of 0 or more for each"
        )
    return found


def combine_metrics(replies: Sequence[tuple[float, Mapping[str, Any]]], samples_key: str) -> dict[str, Any]:
    """Metrics of several replies as one set: the mean weighted by samples, as Flower does it, of what they all report.

    Values that are not finite are left out of the mean of their metric.
    """
    common = set.intersection(*(set(found) for _, found in replies)) if replies else set()
    names = [
        name for name in (replies[0][1] if replies else ()) if name in common and name not in (samples_key, VERSION)
    ]
    samples = np.array([min(float(held), MOST) for held, _ in replies])
    result: dict[str, Any] = {}
    for name in names:
        values = _columns([found[name] for _, found in replies])
        if values is None:
            continue
        kept = np.isfinite(values).reshape(len(values), -1).all(axis=1)
        if not kept.any():
            continue
        held = samples[kept]
        total = held.sum()
        shares = held / total if total > 0 else np.full(len(held), 1.0 / len(held))
        result[name] = np.tensordot(shares, values[kept], axes=1).tolist()
    return result


def _columns(values: Sequence[Any]) -> Floats | None:
    """Values of one metric as numbers, one a row; NaN for what is none. None where they are of different shapes."""
    if all(type(value) is float or type(value) is int for value in values):
        with contextlib.suppress(OverflowError):
            return np.array(values, dtype=np.float64)
    columns = [_numbers(value) for value in values]
    return np.array(columns) if len({column.shape for column in columns}) == 1 else None


def _numbers(value: Any) -> Floats:
    """A metric as floating-point numbers; NaN for what is none."""
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):  # an integer may be larger than any of them
        return np.array(np.nan)
