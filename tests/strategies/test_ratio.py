"""A codec for each device: by the bandwidth that was seen, over whatever work is planned."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fedpace.errors import ConfigError
from fedpace.protocol.codecs import Quantise, TopK
from fedpace.protocol.encoded import CODEC
from fedpace.strategies import FedBuff
from fedpace.strategies.fleet import Fleet
from fedpace.strategies.pace import observe_task
from fedpace.strategies.parts import Context, Devices, Work
from fedpace.strategies.planners import CodecByBandwidth, Fixed, Split, StepsForDeadline, Together

SLOW, FAST = TopK(0.01) >> Quantise(bits=4), "quantise( 8 )"


def fleet_of(speeds: list[float]) -> Fleet:
    """Devices whose transfers are seen to move so many bytes a second (NaN: never seen)."""
    fleet = Fleet()
    fleet.join_all(range(100, 100 + len(speeds)))
    for size in (1e6, 3e6, 2e6) * 6:
        for row, speed in enumerate(speeds):
            if not math.isnan(speed):
                seconds = 1.0 + size / speed
                observe_task(fleet, row, seconds=seconds, compute_seconds=1.0, steps=10.0, bytes_moved=size)
    return fleet


def planned(planner: Any, fleet: Fleet) -> list[Work]:
    here = Context(fleet, np.random.default_rng(0), now=0.0, memory={})
    return list(planner.plan(Devices(fleet, np.arange(fleet.size, dtype=np.intp)), here))


def test_the_highest_bound_that_is_reached() -> None:
    fleet = fleet_of([1e4, 3e5, 1e7, math.nan])
    planner = CodecByBandwidth({1e5: SLOW, 1e6: FAST}, Fixed(7))
    told = [work.config.get(CODEC) for work in planned(planner, fleet)]
    assert told == [None, "topk(0.01) >> quantise(4)", "quantise(8)", None]
    assert {work.steps for work in planned(planner, fleet)} == {7}


def test_with_a_bound_of_0_every_known_device_has_one() -> None:
    fleet = fleet_of([10.0, 1e9, math.nan])
    assert [CODEC in work.config for work in planned(CodecByBandwidth({0: SLOW}), fleet)] == [True, True, False]


def test_what_the_planner_is_asked_for_is_still_there() -> None:
    """All but `same`, which says that nobody need ask."""
    inner = Together(5, 50)
    planner = CodecByBandwidth({0.0: SLOW}, inner)
    assert planner.same is None and planner.reads_pace
    for name in ("observe", "remembers", "shares", "refuse"):
        assert hasattr(planner, name) == hasattr(inner, name)
    strategy = FedBuff(planner=CodecByBandwidth({0.0: SLOW}))
    assert strategy.composition.planner.plan is not None
    for other in (Split(samples=100), StepsForDeadline(1.0)):
        assert repr(CodecByBandwidth({0.0: SLOW}, other))


@pytest.mark.parametrize(
    ("codecs", "message"),
    [
        ({}, "codecs is empty"),
        ({-1.0: SLOW}, "-1.0 bytes a second"),
        ({math.nan: SLOW}, "nan bytes a second"),
        ({0.0: "topkk"}, "'topkk' is no codec"),
    ],
)
def test_what_makes_no_sense_is_refused(codecs: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CodecByBandwidth(codecs)
