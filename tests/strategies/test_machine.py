"""The machine, whatever happens to the fleet: laws, and named cases."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedpace.strategies.composition import Composition
from fedpace.strategies.events import Note, Send
from fedpace.strategies.gates import All, Deadline
from fedpace.strategies.planners import Split
from fedpace.strategies.presets import CA2FL, PRESETS, REFL, Compass, FedAsync, FedAvg, FedBuff, Oort, Paced
from tests.strategies.driver import Driver

ROUNDS = 4


def composition(name: str, **options: Any) -> Composition:
    return PRESETS[name](min_train_nodes=1, min_available_nodes=1, **options).composition


@given(
    name=st.sampled_from(sorted(PRESETS)),
    nodes=st.integers(0, 6),
    evaluate=st.sampled_from([0.0, 0.5, 1.0]),
    late=st.sampled_from([None, "discard", "fold"]),
    slots=st.sampled_from([1, 1, 2]),
    data=st.data(),
)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_laws_hold_whatever_happens(
    name: str, nodes: int, evaluate: float, late: str | None, slots: int, data: st.DataObject
) -> None:
    """No device has more tasks than slots, no task has two fates, the books agree after every event, and a run in which
    devices go on to answer comes to its end."""
    options: dict[str, Any] = {"fraction_evaluate": evaluate}
    if late is not None and composition(name).gate.rounds:
        options["gate"] = Deadline(seconds=5.0, late=late)
    elif isinstance(composition(name).gate, All) and data.draw(st.booleans(), label="in parts"):
        options["planner"] = Split(50)
    driver = Driver(composition(name, **options), nodes, ROUNDS, slots=slots)
    for _ in range(data.draw(st.integers(0, 60), label="events")):
        if driver.finish:
            break
        happening = data.draw(st.sampled_from("rrrrrfejlww"), label="happening")
        if happening in "rfe" and driver.out:
            task = data.draw(st.sampled_from(sorted(driver.out)), label="task")
            driver.now += data.draw(st.sampled_from([0.0, 0.1, 3.0]), label="seconds")
            if happening == "r":
                driver.reply(task, **data.draw(st.sampled_from(REPLIES), label="metrics"))
            else:
                driver.fail(task, expired=happening == "e")
        elif happening == "j":
            driver.join(data.draw(st.integers(100, 108), label="joins"))
        elif happening == "l" and driver.alive:
            driver.leave(data.draw(st.sampled_from(sorted(driver.alive)), label="leaves"))
        elif happening == "w":
            driver.wait(data.draw(st.sampled_from([0.1, 10.0, 1000.0]), label="seconds"))
    run_to_its_end(driver)
    assert driver.finish is not None
    assert set(driver.fates) == {order.task for send in driver.sent if send.kind == "train" for order in send.orders}


REPLIES: list[dict[str, Any]] = [
    {},
    {"num-examples": 0},
    {"num-examples": -3},
    {"num-examples": float("nan")},
    {"num-examples": "many"},
    {"loss": float("inf"), "local-steps": -1, "compute-seconds": float("nan")},
    {"local-steps": 7, "train-loss": 0.2},
]


def run_to_its_end(driver: Driver) -> None:
    """From here on every device answers, and time passes."""
    for _ in range(2000):
        if driver.finish:
            return
        if not driver.alive and not driver.out:
            driver.join(100)
        elif driver.out:
            driver.now += 1.0
            driver.reply(min(driver.out))
        else:
            assert driver.state.wake < float("inf"), "nothing is out, and nothing will wake the run: a deadlock"
            driver.wait(1e9)
    raise AssertionError("the run does not end")


def test_a_round_waits_for_all_and_weighs_by_samples() -> None:
    driver = Driver(FedAvg(fraction_evaluate=0.0).composition, 3, 1)
    assert [len(send.orders) for send in driver.sent] == [3]
    driver.reply(1, **{"num-examples": 10})
    driver.reply(2, **{"num-examples": 20})
    assert not driver.folds
    driver.reply(3, **{"num-examples": 70})
    assert driver.folds[0].weights == pytest.approx([0.1, 0.2, 0.7])
    assert driver.finish and driver.finish.status == "completed"


def test_a_buffer_folds_every_k_and_keeps_all_at_work() -> None:
    driver = Driver(FedBuff(k=2).composition, 3, 2)
    driver.reply(1)
    assert len(driver.out) == 3 and not driver.folds
    driver.reply(2)
    assert list(driver.folds[0].tasks) == [1, 2]
    assert driver.folds[0].weights == [0.5, 0.5]
    driver.reply(3)  # began with version 0
    driver.reply(4)  # so did the one sent before the first fold
    assert list(driver.folds[1].staleness) == [1, 1]
    assert driver.folds[1].weights == pytest.approx([0.5 * 2**-0.5] * 2)
    assert driver.finish and driver.finish.status == "completed"


def test_fedasync_folds_each_arrival() -> None:
    driver = Driver(FedAsync(alpha=0.5, a=1.0).composition, 2, 3)
    driver.reply(1)
    driver.reply(2)
    assert [fold.weights for fold in driver.folds] == [[0.5], [0.25]]


def test_late_updates_are_given_up_or_folded_stale() -> None:
    driver = Driver(
        Oort(over_selection=1.5, min_available_nodes=3, train_nodes=2, fraction_evaluate=0.0).composition, 3, 1
    )
    assert len(driver.out) == 3
    driver.reply(1)
    driver.reply(2)
    assert driver.fates == {1: "folded", 2: "folded", 3: "given up"}
    driver = Driver(
        REFL(over_selection=1.5, min_available_nodes=3, train_nodes=2, fraction_evaluate=0.0).composition, 3, 2
    )
    driver.reply(1)
    driver.reply(2)
    driver.reply(3)  # of the first round, in the second one
    driver.reply(4)
    assert 3 in driver.folds[1].tasks and driver.folds[1].staleness[list(driver.folds[1].tasks).index(3)] == 1


def test_all_devices_slower_than_the_deadline() -> None:
    gate = Deadline(seconds=1.0)
    driver = Driver(FedAvg(gate=gate, fraction_evaluate=0.0).composition, 3, 2)
    driver.wait(1e9)
    assert driver.now == 1.0 and not driver.folds and driver.finish is None
    assert any(isinstance(effect, Note) and "deadline" in effect.text for effect in driver.effects)
    driver.now = 7.0
    driver.reply(1)
    assert [list(fold.tasks) for fold in driver.folds] == [[1]]


def test_a_device_that_always_fails_rests_and_the_others_go_on() -> None:
    driver = Driver(FedAvg(fraction_evaluate=0.0, min_train_nodes=1).composition, 3, 6)
    asked = 0
    while driver.finish is None:
        for task, (node, _) in sorted(driver.out.items()):
            driver.now += 0.1
            asked += node == 100
            driver.fail(task) if node == 100 else driver.reply(task)
    assert driver.finish.status == "completed" and asked < 6
    assert all(len(fold.tasks) == 2 for fold in driver.folds)


@pytest.mark.parametrize("strategy", [FedAvg, FedBuff])
def test_a_fleet_in_which_every_task_fails_ends_the_run_with_a_sentence(strategy: Any) -> None:
    driver = Driver(strategy().composition, 2, 1000)
    while driver.finish is None:
        if driver.out:
            driver.fail(min(driver.out))
        else:
            driver.wait(1e9)
    assert driver.finish.status == "every task failed"
    assert "raised" in driver.finish.reason


def test_a_fleet_that_empties_and_returns() -> None:
    driver = Driver(FedBuff(k=2).composition, 2, 2)
    driver.reply(1)
    for node in (100, 101):
        driver.leave(node)
    for task in sorted(driver.out):
        driver.fail(task)
    assert driver.finish is None
    driver.now = 50.0
    driver.join(100)
    driver.join(101)
    run_to_its_end(driver)
    assert driver.finish and driver.finish.status == "completed"


def test_a_fleet_that_stays_empty_ends_the_run() -> None:
    driver = Driver(FedAvg(min_available_nodes=2).composition, 1, 3, patience=60.0)
    assert not driver.sent
    driver.wait(1e9)
    assert driver.finish and driver.finish.status == "no devices" and "60 s" in driver.finish.reason


def test_devices_evaluate_between_rounds_and_beside_asynchronous_training() -> None:
    driver = Driver(FedAvg().composition, 2, 1)
    driver.reply(1)
    driver.reply(2)
    assert {kind for _, kind in driver.out.values()} == {"evaluate"} and driver.finish is None
    run_to_its_end(driver)
    driver = Driver(FedBuff(k=1, fraction_evaluate=1.0).composition, 2, 1)
    driver.reply(1)
    run_to_its_end(driver)
    assert sum(len(send.orders) for send in driver.sent if send.kind == "evaluate") == 2


def test_a_lost_share_goes_to_another_device() -> None:
    driver = Driver(FedAvg(planner=Split(100), fraction_evaluate=0.0).composition, 3, 1)
    lost = driver.sent[0].orders[0]
    driver.reply(2, **{"num-examples": 33})
    driver.leave(lost.node_id)
    driver.fail(lost.task)
    again = driver.sent[-1].orders[0]
    assert again.config == lost.config and again.node_id != lost.node_id
    driver.reply(3, **{"num-examples": 33})
    assert not driver.folds
    driver.reply(again.task, **{"num-examples": 34})
    assert len(driver.folds[0].tasks) == 3


def test_updates_that_are_too_old_are_discarded() -> None:
    driver = Driver(FedBuff(k=1, max_staleness=0).composition, 2, 2)
    driver.reply(1)
    driver.reply(2)
    assert driver.fates[2] == "discarded"


def test_same_seed_same_decisions() -> None:
    def decisions(seed: int) -> list[Send]:
        driver = Driver(FedAvg(train_nodes=2, fraction_evaluate=0.0).composition, 6, 5, seed=seed)
        run_to_its_end(driver)
        return driver.sent

    assert decisions(1) == decisions(1)
    assert decisions(1) != decisions(2)


def test_compass_and_calibrated_buffers_run() -> None:
    for strategy in (Compass(), CA2FL(k=3), Paced()):
        driver = Driver(strategy.composition, 4, 5)
        run_to_its_end(driver)
        assert driver.finish and driver.finish.status == "completed"


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_later_run_takes_up_what_was_learned_and_no_times(name: str) -> None:
    before = Driver(composition(name), 4, 3)
    before.now = 5000.0
    for task in sorted(before.out)[:2]:
        before.fail(task)
    run_to_its_end(before)
    assert before.finish is not None and before.finish.status == "completed"
    saved = json.loads(json.dumps(before.state.to_plain()))
    after = Driver(composition(name), 4, 3, saved=saved)
    assert after.sent, "nobody rests because of another run's clock"
    np.testing.assert_array_equal(after.state.fleet["folded"], before.state.fleet["folded"])
    run_to_its_end(after)
    assert after.finish is not None and after.finish.status == "completed" and after.now < 1000.0
    assert all(order.node_id in after.known for sent in after.sent for order in sent.orders)


def test_a_learned_table_is_taken_up() -> None:
    before = Driver(composition("QScheduler"), 4, 3)
    run_to_its_end(before)
    saved = json.loads(json.dumps(before.state.to_plain()))
    after = Driver(composition("QScheduler"), 4, 1, saved=saved)
    assert np.any(saved["memory"]["selector"]["table"])
    assert after.state.memory["selector"]["table"] != [[0.0, 0.0]] * len(saved["memory"]["selector"]["table"])
