"""Devices that come back, after a broken line or a restart: nothing is lost, and nothing counts twice."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.bad_line import BadLine
from tests.fleets import QUICK_DEVICE, PuppetFleet, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PuppetFleet]:
    """A fleet whose server waits long for a device to return."""
    patience = {"heartbeat-seconds": 0.3, "lost-after-seconds": 20, "reconnect-grace-seconds": 20}
    with PuppetFleet(tmp_path_factory.mktemp("hall"), server=patience, device=QUICK_DEVICE) as fleet:
        yield fleet.start()


def test_a_killed_device_that_is_back_in_time_does_its_task_again(fleet: PuppetFleet) -> None:
    fleet.join("phoenix")
    calls = fleet.ask("phoenix")["metrics"]["calls"]
    message = fleet.push("phoenix", "sleep", seconds=1)
    time.sleep(0.2)
    fleet.devices["phoenix"].kill()
    fleet.start_device("phoenix")
    answer = fleet.pull(message)
    assert answer["code"] is None and answer["metrics"]["calls"] == calls + 1


def test_state_is_kept_across_restarts(fleet: PuppetFleet) -> None:
    fleet.join("elephant")
    calls = [fleet.ask("elephant")["metrics"]["calls"] for _ in range(2)]
    fleet.stop_device("elephant")
    fleet.join("elephant")
    calls.append(fleet.ask("elephant")["metrics"]["calls"])
    fleet.devices["elephant"].kill()
    fleet.devices["elephant"].wait()
    fleet.wait_node("elephant", there=False)
    fleet.join("elephant")
    calls.append(fleet.ask("elephant")["metrics"]["calls"])
    assert calls == [1, 2, 3, 4]


@pytest.fixture
def line(fleet: PuppetFleet) -> Iterator[BadLine]:
    with BadLine(fleet.address) as line:
        yield line


def join_through(fleet: PuppetFleet, line: BadLine, name: str) -> None:
    direct, fleet.address = fleet.address, line.address
    try:
        fleet.start_device(name)
    finally:
        fleet.address = direct
    fleet.wait_node(name)


def test_a_line_cut_in_the_middle_of_a_task(fleet: PuppetFleet, line: BadLine) -> None:
    """The task goes on; its reply comes over the next connection."""
    join_through(fleet, line, "cut")
    message = fleet.push("cut", "sleep", seconds=1)
    time.sleep(0.2)
    line.cut()
    answer = fleet.pull(message)
    assert answer["code"] is None and answer["metrics"]["calls"] == 1
    assert "cut joined with 1 tasks in hand" in fleet.log("server")
    fleet.check_log("cut")


@pytest.mark.parametrize("way", ["down", "up"])
def test_a_line_cut_in_the_middle_of_a_transfer(fleet: PuppetFleet, line: BadLine, way: str) -> None:
    """A model of 12 MB on its way to the device, or an update on its way back: it goes on where it stopped."""
    name = f"cut-{way}"
    join_through(fleet, line, name)
    line.cut_after(**{way: 6 << 20})
    answer = fleet.ask(name, size=3_000_000)
    assert line.cuts == 1
    assert answer["code"] is None and answer["sums"] == {"model/w": 6_000_000} and answer["metrics"]["calls"] == 1
    assert line.passed[way] < 22 << 20, "it was sent twice"
    fleet.check_log(name)


def test_a_line_that_is_cut_again_and_again(fleet: PuppetFleet, line: BadLine) -> None:
    """The server gives a task out three times, then it is lost."""
    join_through(fleet, line, "unlucky")
    line.cut_after(times=3, down=2 << 20)
    message = fleet.push("unlucky", size=5_000_000)
    answer = fleet.pull(message)
    assert answer["code"] == 5 and answer["reason"] == "unlucky: its device vanished 3 times while it had the task"
    assert line.cuts == 3
    assert fleet.ask("unlucky")["code"] is None
    fleet.check_log("unlucky")


def test_an_agent_killed_before_its_reply_was_acknowledged(fleet: PuppetFleet, line: BadLine) -> None:
    """The reply waits on disk; the next agent of that device brings it home, once, and nothing is computed again."""
    join_through(fleet, line, "courier")
    fleet.ask("courier")
    state = fleet.directory / "state" / "courier"
    message = fleet.push("courier", "sleep", seconds=1, size=200_000)
    time.sleep(0.3)
    line.hold()
    wait_for(lambda: list(state.glob(f"outbox/{message}/*")), "the reply is on disk")
    time.sleep(0.2)
    fleet.devices["courier"].kill()
    line.cut()
    fleet.start_device("courier")
    answer = fleet.pull(message)
    assert answer["code"] is None and answer["metrics"]["calls"] == 2
    assert fleet.ask("courier")["metrics"]["calls"] == 3
    assert "courier joined with 1 tasks in hand" in fleet.log("server")
    wait_for(lambda: not list(state.glob("outbox/*")), "its bytes are gone from the device's disk")
