"""From updates to the weight of each: relative factors that share out one whole, absolute ones that scale it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fedpace.errors import RunError
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
    names = [name for name in (replies[0][1] if replies else ()) if name in common and name != samples_key]
    result: dict[str, Any] = {}
    for name in names:
        values = [_numbers(found[name]) for _, found in replies]
        if len({value.shape for value in values}) > 1:
            continue
        kept = [
            (min(samples, MOST), value)
            for (samples, _), value in zip(replies, values, strict=True)
            if np.isfinite(value).all()
        ]
        if not kept:
            continue
        total = sum(samples for samples, _ in kept)
        mean = sum((samples / total if total > 0 else 1.0 / len(kept)) * value for samples, value in kept)
        result[name] = np.asarray(mean).tolist()
    return result


def _numbers(value: Any) -> Floats:
    """A metric as floating-point numbers; NaN for what is none."""
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):  # an integer may be larger than any of them
        return np.array(np.nan)
