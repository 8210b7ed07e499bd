"""What benchmarks/slow_devices.py makes of curves, on curves whose figures are known."""

from __future__ import annotations

import math

import pytest

from benchmarks.slow_devices import Curve, figures_of, rows_of

T = 3000.0


def rising(end: float, seconds_to_it: float) -> Curve:
    """A slow-class accuracy that rises evenly to `end`, and stays there."""
    seconds = [T * step / 150 for step in range(151)]
    slow = [end * min(1.0, at / seconds_to_it) for at in seconds]
    return Curve(seconds, [value / 2 + 0.4 for value in slow], slow)


def curves(ours: Curve) -> dict[str, list[Curve]]:
    return {"FedAvg": [rising(0.6, 1500), rising(0.64, 1500)], "FedBuff": [rising(0.5, 500)] * 2, "Paced": [ours] * 2}


def test_gaps_are_of_the_same_seed_and_in_points() -> None:
    figures = figures_of(curves(rising(0.65, 500)), T)
    assert figures["slow_class_gap_points"] == pytest.approx(100 * (0.62 - 0.65))
    assert figures["fedbuff_slow_class_gap_points"] == pytest.approx(100 * (0.62 - 0.5))
    assert figures["sync_gain_in_last_third_points"] == pytest.approx(0)
    assert figures["paced_slow_accuracy_third"] == pytest.approx(0.65)
    assert figures["fedavg_accuracy_end"] == pytest.approx(0.71)


def test_the_speedup_is_of_the_time_to_what_waiting_for_all_reaches() -> None:
    same = figures_of(curves(rising(0.64, 1500)) | {"FedAvg": [rising(0.64, 1500)] * 2}, T)
    assert same["speedup_vs_sync"] == pytest.approx(1)
    thrice = figures_of(curves(rising(0.64, 500)) | {"FedAvg": [rising(0.64, 1500)] * 2}, T)
    assert thrice["speedup_vs_sync"] == pytest.approx(3, rel=0.05)


def test_who_never_arrives_counts_with_all_of_the_time() -> None:
    never = curves(rising(0.3, 500))
    assert figures_of(never, T)["speedup_vs_sync"] < 1
    assert never["Paced"][0].reaches(0.6) == math.inf
    rows = rows_of(never, T)
    assert rows[3][0] == "Paced" and rows[3][-1] == "never" and rows[1][-1].endswith(" s")
