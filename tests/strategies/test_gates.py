from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpace.errors import ConfigError
from fedpace.strategies.fleet import Fleet
from fedpace.strategies.gates import LONGEST_STRETCH, All, Arrivals, Deadline, EachArrival
from fedpace.strategies.parts import Context, Gate, Standing, Verdict
from fedpace.strategies.planners import Together

GATES: list[Gate] = [All(), Deadline(5.0), Deadline(quantile=0.5, minimum=3), Deadline(), Arrivals(3), Together()]


def context(round: int = 1, devices: int = 4, memory: dict[str, Any] | None = None) -> Context:
    fleet = Fleet()
    fleet.join_all(range(10, 10 + devices))
    return Context(fleet, np.random.default_rng(0), round=round, memory={} if memory is None else memory)


def standing(now: float = 0.0, **given: Any) -> Standing:
    defaults: dict[str, Any] = {
        "version": 0,
        "opened_at": 0.0,
        "target": 4,
        "sent": 6,
        "out": 6,
        "late": 0,
        "waiting": (),
    }
    values = {**defaults, **given}
    values.setdefault("waiting_groups", (None,) * len(values["waiting"]))
    return Standing(now=now, **values)


def test_all_waits_for_the_last_and_folds_in_order() -> None:
    gate = All()
    assert gate.decide(standing(out=1, waiting=(3, 1)), context()) == Verdict()
    assert gate.decide(standing(out=0, waiting=(3, 1)), context()).fold == (3, 1)
    empty = gate.decide(standing(out=0), context())
    assert not empty.fold and "empty" in empty.why
    assert gate.sends(7) == 7


@pytest.mark.parametrize(
    ("target", "factor", "expected"), [(100, 1.3, 130), (100, 1.1, 110), (3, 1.3, 4), (1, 1.3, 2), (5, 1.0, 5)]
)
def test_deadline_asks_more_than_it_wants(target: int, factor: float, expected: int) -> None:
    assert Deadline(1.0, over_selection=factor).sends(target) == expected


def test_deadline_closes_at_the_target_or_at_its_time() -> None:
    gate, memory = Deadline(5.0), context()
    assert gate.decide(standing(0.0), memory).until == 5.0
    assert gate.decide(standing(2.0, out=3, waiting=(1, 2, 3)), memory).until == 5.0
    assert gate.decide(standing(2.5, out=2, waiting=(1, 2, 3, 4)), memory).fold == (1, 2, 3, 4)
    assert gate.decide(standing(4.9, out=4, waiting=(1, 2)), memory) == Verdict(until=5.0)
    assert gate.decide(standing(5.0, out=4, waiting=(1, 2)), memory).fold == (1, 2)
    assert memory.memory.get("stretch", 1.0) == 1.0


def test_deadline_without_a_time_is_for_the_fastest() -> None:
    gate, memory = Deadline(), context()
    assert gate.decide(standing(1e9, out=3, waiting=(1, 2, 3)), memory) == Verdict()
    assert gate.decide(standing(1e9, out=2, waiting=(1, 2, 3, 4)), memory).fold == (1, 2, 3, 4)


def test_deadline_at_a_quantile_of_what_was_predicted_when_the_round_opened() -> None:
    predicted = (1.0, 2.0, 3.0, 4.0, 100.0, math.nan)
    gate, memory = Deadline(quantile=0.75), context()
    assert gate.decide(standing(0.0, predicted_seconds=predicted), memory).until == np.quantile(predicted[:5], 0.75)
    assert gate.decide(standing(1.0, predicted_seconds=(math.nan,) * 6), memory).until == 4.0
    unknown = gate.decide(standing(7.0, opened_at=7.0, predicted_seconds=(math.nan,) * 6), memory)
    assert unknown == Verdict()


def test_all_slower_than_the_deadline_waits_for_the_minimum_and_moves_it() -> None:
    gate, memory = Deadline(5.0, minimum=2), context()
    assert gate.decide(standing(0.0), memory).until == 5.0
    missed = gate.decide(standing(5.0, out=5, waiting=(1,)), memory)
    assert not missed.fold and "waiting until 2" in missed.why
    assert gate.decide(standing(6.0, out=5, waiting=(1,)), memory) == Verdict(), "it is said once"
    late = gate.decide(standing(33.0, out=4, waiting=(1, 2)), memory)
    assert late.fold == (1, 2) and "missed" in late.why
    # 5 s doubled until 33 s would have met it: 40 s
    following = context(round=2, memory=memory.memory)
    assert gate.decide(standing(33.0, opened_at=33.0), following).until == 33.0 + 40.0
    # and back by halves, where half of it would have done
    assert gate.decide(standing(50.0, opened_at=33.0, out=2, waiting=(1, 2, 3, 4)), following).fold
    third = context(round=3, memory=memory.memory)
    assert gate.decide(standing(50.0, opened_at=50.0), third).until == 50.0 + 20.0
    json.dumps(memory.memory, allow_nan=False)


@given(elapsed=st.lists(st.floats(0.0, 1e5), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_deadlines_follow_what_rounds_take_within_bounds(elapsed: list[float]) -> None:
    gate, memory, now, longest = Deadline(5.0), {}, 0.0, 5.0 * LONGEST_STRETCH  # type: ignore[var-annotated]
    took, before = 0.0, 0.0
    for round, seconds in enumerate(elapsed):
        here = context(round, memory=memory)
        length = gate.decide(standing(now, opened_at=now), here).until - now
        assert 4.999 < length < longest + 0.001
        assert length > min(took, longest) - 0.001, "the deadline would have been met"
        assert length > before / 2.0 - 0.001
        if missed := seconds >= length:
            assert not gate.decide(standing(now + length, opened_at=now), here).fold
        assert gate.decide(standing(now + seconds, opened_at=now, waiting=(1, 2, 3, 4), out=2), here).fold
        now, took, before = now + seconds, seconds if missed else 0.0, length


def test_a_round_where_all_failed_is_empty_and_moves_nothing() -> None:
    gate, memory = Deadline(5.0), context()
    gate.decide(standing(0.0), memory)
    gate.decide(standing(5.0, out=1), memory)
    empty = gate.decide(standing(80.0, out=0), memory)
    assert not empty.fold and "empty" in empty.why
    assert gate.decide(standing(80.0, opened_at=80.0), context(2, memory=memory.memory)).until == 85.0


def test_fewer_than_the_minimum_are_folded_if_nobody_else_is_out() -> None:
    assert Deadline(5.0, minimum=3).decide(standing(1.0, out=0, waiting=(7, 9)), context()).fold == (7, 9)


def test_arrivals_folds_the_oldest_k_and_leaves_the_rest() -> None:
    gate = Arrivals(3)
    assert gate.decide(standing(out=5, waiting=(4, 2)), context()) == Verdict()
    assert gate.decide(standing(out=5, waiting=(4, 2, 8, 9)), context()).fold == (4, 2, 8)
    assert EachArrival().decide(standing(out=5, waiting=(4, 2)), context()).fold == (4,)


def test_arrivals_waits_for_idle_devices_but_not_for_none() -> None:
    few = standing(out=0, waiting=(4, 2))
    assert Arrivals(3).decide(few, context()) == Verdict(), "who is idle gets the next task"
    assert Arrivals(3).decide(few, context(devices=0)).fold == (4, 2)


def groups(**latest: float) -> dict[str, Any]:
    found = {name[1:]: {"expected": at - 1.0, "latest": at, "again": 1.0} for name, at in latest.items()}
    return {"groups": found, "next": 9}


def test_a_group_is_folded_once_all_who_are_out_for_it_arrived() -> None:
    gate, here = Together(), context(memory=groups(g1=20.0, g2=12.0))
    waiting = {"waiting": (5, 6, 7), "waiting_groups": (1, 2, 1)}
    assert gate.decide(standing(8.0, out_groups=(1, 2), **waiting), here) == Verdict(until=12.0)
    verdict = gate.decide(standing(9.0, out_groups=(2,), **waiting), here)
    assert verdict.fold == (5, 7) and verdict.until == 12.0 and "group 1" in verdict.why
    assert list(here.memory["groups"]) == ["2"]


def test_a_group_is_folded_at_its_latest_time_and_who_comes_after_at_once() -> None:
    gate, here = Together(), context(memory=groups(g1=20.0, g2=50.0))
    verdict = gate.decide(standing(20.0, out_groups=(1, 2), waiting=(5, 6), waiting_groups=(1, 2)), here)
    assert verdict.fold == (5,) and verdict.until == 50.0
    late = gate.decide(standing(21.0, out_groups=(2,), waiting=(6, 7), waiting_groups=(2, 1)), here)
    assert late.fold == (7,) and "after its group" in late.why


def test_first_updates_are_of_no_group_and_folded_at_once() -> None:
    verdict = Together().decide(standing(out_groups=(3,), waiting=(1, 2)), context())
    assert verdict.fold == (1, 2) and verdict.until == math.inf


def test_together_is_planner_and_gate_or_refused() -> None:
    together = Together()
    assert together.refuse(SimpleNamespace(planner=together, gate=Together())) is None
    assert "planner and gate" in str(together.refuse(SimpleNamespace(planner=together, gate=All())))
    assert "planner and gate" in str(together.refuse(SimpleNamespace(planner=object(), gate=together)))


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: type(gate).__name__)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_no_gate_waits_for_what_cannot_come(gate: Gate, data: st.DataObject) -> None:
    """Through any history: only what waits is folded, once; `until` lies ahead; and where nothing is out (and, without
    rounds, no device is left to be asked) all that waits is folded, or the round is said to be empty."""
    number = st.none() | st.integers(0, 4)
    memory = groups(g0=3.0, g1=6.0, g2=6.0, g3=40.0) if isinstance(gate, Together) else {}
    now, opened, round = 0.0, 0.0, 1
    waiting: list[tuple[int, int | None]] = []
    for task in range(data.draw(st.integers(1, 12))):
        now += data.draw(st.floats(0.0, 20.0))
        if data.draw(st.booleans()):
            waiting.append((task, data.draw(number)))
        out = data.draw(st.integers(0, 3))
        devices = data.draw(st.integers(0, 2)) if out else 0
        asked = standing(
            now,
            opened_at=opened,
            out=out,
            waiting=tuple(task for task, _ in waiting),
            waiting_groups=tuple(group for _, group in waiting),
            out_groups=tuple({data.draw(st.integers(0, 4)) for _ in range(out)}),
            predicted_seconds=(4.0, math.nan, 9.0),
        )
        verdict = gate.decide(asked, context(round, devices, memory))
        assert set(verdict.fold) <= set(asked.waiting) and len(set(verdict.fold)) == len(verdict.fold)
        assert verdict.fold or verdict.until > now
        if not out:
            expected = asked.waiting[: gate.k] if isinstance(gate, Arrivals) else asked.waiting
            assert verdict.fold == expected
            assert verdict.fold or not gate.rounds or "empty" in verdict.why
        waiting = [pair for pair in waiting if pair[0] not in verdict.fold]
        if gate.rounds and (verdict.fold or not out):
            assert not waiting, "a round that closes leaves nothing behind"
            opened, round = now, round + 1
    json.dumps(memory, allow_nan=False)


@pytest.mark.parametrize("gate", [All(), Deadline(5.0), Arrivals(10**6)], ids=lambda gate: type(gate).__name__)
def test_an_event_does_not_look_at_every_update_that_waits(gate: Gate) -> None:
    class Counted(tuple[int, ...]):
        looked = 0

        def __iter__(self) -> Any:
            Counted.looked += 1
            return super().__iter__()

    many = Counted(range(1000))
    asked = standing(1.0, out=3, target=2000, waiting=many, waiting_groups=Counted())
    assert not gate.decide(asked, context()).fold
    assert Counted.looked == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: Deadline(0.0),
        lambda: Deadline(math.nan),
        lambda: Deadline(math.inf),
        lambda: Deadline(1.0, 0.5),
        lambda: Deadline(quantile=0.0),
        lambda: Deadline(quantile=1.1),
        lambda: Deadline(1.0, over_selection=0.9),
        lambda: Deadline(1.0, over_selection=math.nan),
        lambda: Deadline(1.0, late="keep"),
        lambda: Deadline(1.0, minimum=0),
        lambda: Arrivals(0),
        lambda: Together(0, 5),
        lambda: Together(6, 5),
        lambda: Together(slack=0.9),
        lambda: Together(slack=math.nan),
    ],
)
def test_numbers_out_of_range_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match=r"choose|not both"):
        make()
