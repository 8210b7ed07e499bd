"""The parts of the benchmarks that measure or start processes: what they see is there, and nothing is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.flower_engine import stop_all
from benchmarks.grpc_floor import echo_ms, fan_out_seconds, make_certificates
from benchmarks.memory import AnonymousMemory

HOLD_64_MB = "input('ready\\n'); block = b'x' * 64_000_000; input('held\\n')"


def test_memory_sampler_sees_what_another_process_takes() -> None:
    command = [sys.executable, "-u", "-c", HOLD_64_MB]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        with AnonymousMemory(process.pid, interval=0.01) as memory:
            process.stdin.write(b"\n")
            process.stdin.flush()
            assert process.stdout.readline() == b"held\n"
            time.sleep(0.2)
        process.stdin.write(b"\n")
        process.stdin.close()
    assert 60e6 < memory.peak_above_start < 80e6


def test_memory_sampler_refuses_a_process_that_is_not_there() -> None:
    with subprocess.Popen(["true"]) as process:
        pass
    with pytest.raises(OSError), AnonymousMemory(process.pid):
        pass


def test_floor_measures_every_repetition_and_leaves_no_process(tmp_path: Path) -> None:
    certs = tmp_path / "certs"
    make_certificates(certs, peers=2)
    assert all(duration > 0 for duration in echo_ms(certs, rounds=3, peers=2, model_bytes=1000))
    assert len(fan_out_seconds(certs, repetitions=2, peers=2, model_bytes=2_500_000)) == 2
    assert psutil.Process().children() == []


def test_stop_all_ends_orphans_of_its_home_and_nobody_else(tmp_path: Path) -> None:
    def sleeper(home: str) -> psutil.Process:
        environment = {**os.environ, "FLWR_HOME": home}
        orphan = "sleep 60 >/dev/null & echo $!"
        return psutil.Process(int(subprocess.check_output(["sh", "-c", orphan], env=environment)))

    ours, other = sleeper(str(tmp_path)), sleeper(str(tmp_path / "other"))
    try:
        stop_all(tmp_path)
        assert not ours.is_running() or ours.status() == psutil.STATUS_ZOMBIE
        assert other.status() != psutil.STATUS_ZOMBIE
    finally:
        other.kill()
