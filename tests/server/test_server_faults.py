"""Servers that die, are stopped, or run a ServerApp that fails; servers and devices whose certificates do not fit."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from concurrent import futures
from pathlib import Path

import grpc
import psutil
import pytest

from fedpace.certs.authority import init_authority, issue_device
from tests.certs.conftest import Forger
from tests.conftest import StartFleet
from tests.fleets import QUICK_DEVICE, QUICK_SERVER, PuppetFleet, copy_app, wait_for
from tests.raw_device import SECONDS

pytestmark = pytest.mark.slow


# The server


def test_a_server_that_dies_and_one_that_follows(tmp_path: Path) -> None:
    """The device reconnects by itself, drops what the first one had given it, and works for the other."""
    with PuppetFleet(tmp_path / "fleet", server=QUICK_SERVER, device=QUICK_DEVICE) as fleet:
        fleet.start().join("faithful")
        message = fleet.push("faithful", "sleep", seconds=600)
        assert message == "1"
        time.sleep(0.3)
        assert fleet.server is not None
        app = next(p for p in psutil.Process(fleet.server.pid).children() if "fedpace.server.appprocess" in p.cmdline())
        fleet.server.kill()
        fleet.server.wait()
        wait_for(lambda: not app.is_running() or app.status() == psutil.STATUS_ZOMBIE, "the ServerApp's process ends")
        fleet.wait_log("faithful", "nothing listens at")
        address, first = fleet.address, fleet.log("server")
        (fleet.directory / "logs" / "server.log").write_text("")
        fleet.start(address=address)
        fleet.wait_node("faithful")
        for _ in range(2):
            answer = fleet.ask("faithful")
            assert answer["code"] is None and answer["sums"] == {"model/w": 6}
        assert fleet.log("faithful").count("connected to") == 2 and first
        fleet.check_log("faithful")
        assert fleet.end()["updates"]["received"] == 2


def test_a_server_told_to_stop_drains(start_fleet: StartFleet) -> None:
    fleet = start_fleet(server=QUICK_SERVER, device=QUICK_DEVICE)
    fleet.join("worker")
    fleet.push("worker", "sleep", seconds=600)
    fleet.send_order("pull", message_id="1", seconds=600)
    time.sleep(0.2)
    assert fleet.server is not None
    fleet.server.send_signal(signal.SIGTERM)
    assert fleet.server.wait(SECONDS) == 130
    result = fleet.result()
    assert result["status"] == "interrupted" and result["reason"] == "the server was told to stop"
    assert "stopping: work under way has 3 s to end" in fleet.log("server")
    fleet.wait_log("worker", "the server is going: the server is stopping")
    assert fleet.devices["worker"].poll() is None, "the device waits for the next server"


def test_a_server_told_to_stop_while_its_app_hangs(start_fleet: StartFleet) -> None:
    fleet = start_fleet(server={**QUICK_SERVER, "drain-seconds": 1})
    fleet.send_order("die", how="hang")
    time.sleep(0.2)
    assert fleet.server is not None
    fleet.server.send_signal(signal.SIGTERM)
    assert fleet.server.wait(10) == 130
    assert fleet.result()["status"] == "interrupted"


@pytest.mark.parametrize(
    ("how", "reason", "logged"),
    [
        ("raise", "RuntimeError: the puppet's strings broke", 'raise RuntimeError("the puppet'),
        ("exit", "the ServerApp's process ended with exit status 3", "exit status 3"),
        ("leave children", "the ServerApp's process ended with exit status 3", "exit status 3"),
        ("segfault", "the ServerApp's process ended with signal SIGSEGV", "signal SIGSEGV"),
    ],
)
def test_a_server_app_that_fails(start_fleet: StartFleet, how: str, reason: str, logged: str) -> None:
    """The run is over with exit code 1, and the reason is where it is looked for."""
    fleet = start_fleet(server=QUICK_SERVER, device=QUICK_DEVICE)
    fleet.join("worker")
    fleet.push("worker", "sleep", seconds=600)
    fleet.send_order("die", how=how)
    assert fleet.wait(SECONDS) == 1
    assert f"the run failed: {reason}" in fleet.log("server") and logged in fleet.log("server")
    result = fleet.result()
    assert (result["status"], result["reason"]) == ("failed", reason)
    assert fleet.devices["worker"].poll() is None
    assert fleet.stop_device("worker") == 0


def test_a_server_app_without_a_strategy(start_fleet: StartFleet) -> None:
    fleet = start_fleet(server=QUICK_SERVER)
    fleet.join("worker")
    fleet.ask("worker")
    result = fleet.end()
    assert result["status"] == "finished" and result["final"] is None and result["model_sha256"] is None
    assert fleet.log("server").count("used no Flower strategy") == 1
    assert not (fleet.out / "model.safetensors").exists()


def test_what_was_lost_is_in_the_result(start_fleet: StartFleet) -> None:
    """FedAvg over two devices of which one is killed: the round ends, and says what it lost."""
    fleet = start_fleet(server=QUICK_SERVER, device=QUICK_DEVICE)
    fleet.join("lasting")
    fleet.join("brief")
    worker = psutil.Process(fleet.ask("brief")["metrics"]["pid"])
    worker.suspend()
    fleet.send_order("fedavg", rounds=1, clients=2, size=3)
    time.sleep(0.5)
    fleet.devices["brief"].kill()
    assert fleet.read_answer() == {"sum": 3.0}
    result = fleet.end()
    (lost,) = result["lost"]
    assert lost.startswith("brief: task ") and lost.endswith("(train): its device is gone")
    assert result["updates"]["folded"] == 1
    assert "lost on the way: 1 tasks" in fleet.log("server")


# Certificates


@pytest.fixture
def forger(tmp_path: Path) -> Forger:
    return Forger.make(tmp_path / "forged")


@pytest.mark.parametrize(
    ("days", "reason"), [((-10.0, -1.0), "expired on"), ((1.0, 10.0), "may be wrong; set it")], ids=["expired", "early"]
)
def test_a_server_with_a_certificate_out_of_its_time(
    forger: Forger, tmp_path: Path, days: tuple[float, float], reason: str
) -> None:
    """gRPC tells neither side why: the device finds out for itself, says it once, and tries on."""
    server = forger.write(
        "server", uris=["fedpace://server/s"], hosts=["127.0.0.1"], starts=days[0], ends=days[1], server=True
    )
    device = forger.write("device", uris=["fedpace://device/punctual"])
    listening = grpc.server(futures.ThreadPoolExecutor(1))
    credentials = grpc.ssl_server_credentials(
        [((server / "key.pem").read_bytes(), (server / "cert.pem").read_bytes())],
        (server / "ca.pem").read_bytes(),
        True,
    )
    port = listening.add_secure_port("127.0.0.1:0", credentials)
    listening.start()
    try:
        log = run_device(tmp_path, device, port, reason)
    finally:
        listening.stop(None).wait(SECONDS)
    assert f"not connected: the certificate of 127.0.0.1:{port}" in log and log.count(reason) == 1


def test_a_server_of_another_authority(fleet: PuppetFleet, tmp_path: Path) -> None:
    init_authority(tmp_path / "other")
    certs = issue_device(tmp_path / "other", "stranger")
    port = int(fleet.address.rpartition(":")[2])
    log = run_device(tmp_path, certs, port, "is of another authority")
    assert f"not connected: the certificate of 127.0.0.1:{port} is of another authority" in log


def test_a_server_that_does_not_know_the_devices_authority(fleet: PuppetFleet, forger: Forger, tmp_path: Path) -> None:
    """Both authorities call themselves the same, so the device's own checks pass until the server looks."""
    port = int(fleet.address.rpartition(":")[2])
    certs = forger.write("device", uris=["fedpace://device/stranger"])
    log = run_device(tmp_path, certs, port, "not connected: ")
    assert "authority" in log
    assert "stranger" not in fleet.log("server")


def run_device(tmp_path: Path, certs: Path, port: int, until: str) -> str:
    """Runs a device until it has logged something. Returns its log."""
    app = copy_app(tmp_path / "device-app", device=QUICK_DEVICE)
    log = tmp_path / "device.log"
    command = ["-m", "fedpace", "client", "--app", str(app), "--server", f"127.0.0.1:{port}", "--certs", str(certs)]
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, *command, "--state", str(tmp_path / "state")], stderr=file)
    try:
        wait_for(lambda: until in log.read_text(), until)
        time.sleep(1.5)  # a second and third try
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
    finally:
        process.kill()
        process.wait()
    return log.read_text()
