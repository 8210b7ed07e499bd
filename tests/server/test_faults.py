"""Devices that freeze, die, leave, or are there twice: the run goes on without them, and says what it lost."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.fleets import QUICK_DEVICE, QUICK_SERVER, PuppetFleet, copy_app, wait_for
from tests.raw_device import SECONDS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hall(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PuppetFleet]:
    with PuppetFleet(tmp_path_factory.mktemp("hall"), server=QUICK_SERVER, device=QUICK_DEVICE) as fleet:
        fleet.start().join("bystander")
        yield fleet


@pytest.fixture
def fleet(hall: PuppetFleet) -> Iterator[PuppetFleet]:
    """A fleet whose server goes on from test to test; the bystander's worker and connection do too."""
    before = hall.ask("bystander")["metrics"]["pid"]
    yield hall
    assert hall.ask("bystander")["metrics"]["pid"] == before
    assert hall.log("server").count("bystander joined") == 1
    for name in [name for name in hall.devices if name != "bystander"]:
        hall.stop_device(name)


def test_a_frozen_device_is_let_go_and_returns(fleet: PuppetFleet) -> None:
    """A half-open connection: the system answers for it, the device does not."""
    fleet.join("frozen")
    agent = fleet.devices["frozen"]
    message = fleet.push("frozen", "sleep", seconds=600)
    started = time.monotonic()
    agent.send_signal(signal.SIGSTOP)
    try:
        answer = fleet.pull(message)
        assert answer["code"] == 5 and answer["reason"] == "frozen: its device is gone"
        assert time.monotonic() - started < 10
        fleet.wait_log("server", "frozen left: silent for")
        fleet.wait_node("frozen", there=False)
    finally:
        agent.send_signal(signal.SIGCONT)
    fleet.wait_node("frozen")
    assert fleet.ask("frozen")["code"] is None


def test_a_device_that_reads_nothing_is_let_go(fleet: PuppetFleet) -> None:
    """What is still to be written to it must not keep the server from seeing that it is silent."""
    with fleet.raw("stuffed") as raw:
        raw.connect(raw.hello(slots=8))
        messages = [fleet.push("stuffed", records=8, size=60_000 + number) for number in range(8)]
        for message in messages:
            assert fleet.pull(message)["reason"] == "stuffed: its device is gone"
    assert "stuffed left: silent for" in fleet.log("server")


@pytest.mark.parametrize("which", ["agent", "agent and worker"])
def test_a_device_killed_in_the_middle_of_a_task(fleet: PuppetFleet, which: str) -> None:
    fleet.join("killed")
    worker = psutil.Process(fleet.ask("killed")["metrics"]["pid"])
    message = fleet.push("killed", "sleep", seconds=600)
    time.sleep(0.2)
    if which == "agent and worker":
        worker.kill()
    fleet.devices["killed"].kill()
    answer = fleet.pull(message)
    assert answer["code"] == 5 and answer["reason"] == "killed: its device is gone"
    assert f"killed: task {message} (train) is lost: its device is gone" in fleet.log("server")
    assert "killed left: its connection" in fleet.log("server")
    wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, "the worker ends too")
    fleet.devices.pop("killed").wait()


def test_a_device_told_to_stop_brings_its_task_home(fleet: PuppetFleet) -> None:
    fleet.join("leaver")
    message = fleet.push("leaver", "sleep", seconds=1.5)
    time.sleep(0.3)
    fleet.devices["leaver"].send_signal(signal.SIGTERM)
    fleet.wait_log("leaver", "leaving: 1 tasks in hand have 20 s")
    late = fleet.push("leaver")
    assert fleet.pull(late)["reason"] in ("the device is leaving", "leaver: its device is gone")
    assert fleet.pull(message)["code"] is None
    assert fleet.devices["leaver"].wait(SECONDS) == 0
    fleet.wait_log("server", "leaver left: it was stopped")
    fleet.wait_node("leaver", there=False)


def test_a_device_told_twice_to_stop_stops(fleet: PuppetFleet) -> None:
    fleet.join("leaver")
    message = fleet.push("leaver", "sleep", seconds=600)
    time.sleep(0.3)
    for _ in range(2):
        fleet.devices["leaver"].send_signal(signal.SIGTERM)
        time.sleep(0.2)
    assert fleet.devices["leaver"].wait(5) == 0
    assert fleet.pull(message)["code"] == 5


def test_the_newer_of_two_processes_with_one_identity_stays(fleet: PuppetFleet) -> None:
    fleet.join("twin")
    older = fleet.devices["twin"]
    message = fleet.push("twin", "sleep", seconds=1)
    fleet.start_device("twin", "--state", str(fleet.directory / "state" / "twin-2"))
    assert older.wait(SECONDS) == 1
    assert "another connection with this device's identity has replaced this one" in fleet.log("twin")
    assert "twin connected from elsewhere too; the newer connection replaces the older" in fleet.log("server")
    assert fleet.pull(message)["code"] is None and fleet.ask("twin")["code"] is None


def test_devices_come_and_go(fleet: PuppetFleet) -> None:
    for _ in range(2):
        fleet.join("tourist")
        assert fleet.ask("tourist")["code"] is None
        assert fleet.stop_device("tourist") == 0
        fleet.wait_node("tourist", there=False)
        answer = fleet.ask("tourist")
        assert answer["code"] == 5 and "its device is gone" in answer["reason"]


def test_a_device_with_another_app(fleet: PuppetFleet, tmp_path: Path) -> None:
    app = copy_app(tmp_path / "app", change=("misconduct.py", "app = ClientApp()", "app = ClientApp()  # mine"))
    device = fleet.start_device("modified", app=app)
    assert device.wait(SECONDS) == 1
    for name in ("modified", "server"):
        assert "modified has the app misbehaving 1.0.0 (" in fleet.log(name)
        assert "this server runs misbehaving 1.0.0 (" in fleet.log(name) and "install the same app" in fleet.log(name)
