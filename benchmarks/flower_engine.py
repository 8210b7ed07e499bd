"""Flower's own deployment engine: a SuperLink and SuperNodes on this machine, running one app, offline."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from fedpace.errors import RunError

STOP_SECONDS = 10.0


def measure_flower(app_dir: Path, rounds: int, nodes: int, timeout: float) -> list[float]:
    """Milliseconds of each round of the echo app under Flower's own engine, in order.

    RunError when its commands are not installed, when a process of it ends early, or when the run takes longer than
    `timeout` seconds; no process is left in any case.
    """
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="flower-engine-") as folder:
        home = Path(folder)
        timings = home / "timings.json"
        with engine(home, nodes, deadline) as processes:
            config = f"nodes={nodes} rounds={rounds} timings={json.dumps(str(timings))}"
            run = launch(home, "flwr", "run", str(app_dir), "bench", "--run-config", config, "--stream")
            while run.poll() is None:
                check(home, processes, deadline)
                time.sleep(0.2)
            if run.returncode != 0 or not timings.exists():
                raise RunError(f"Flower's engine did not finish the run of {app_dir}.\n{tail(home, 'flwr')}")
        durations: list[float] = json.loads(timings.read_text())["round_ms"]
    return durations


@contextlib.contextmanager
def engine(home: Path, nodes: int, deadline: float) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """A SuperLink that listens and `nodes` SuperNodes that have been started; connection `bench` leads to it."""
    link_port, *node_ports = free_ports(nodes + 1)
    link = f"127.0.0.1:{link_port}"
    (home / "config.toml").write_text(f'[superlink.bench]\naddress = "{link}"\ninsecure = true\n')
    processes = {}
    try:
        listen = ("--insecure", "--host", "127.0.0.1", "--port")
        processes["flower-superlink"] = launch(home, "flower-superlink", *listen, str(link_port))
        while not answers(link_port):
            check(home, processes, deadline)
            time.sleep(0.1)
        for index, port in enumerate(node_ports):
            options = ("--superlink", link, "--node-config", f"partition-id={index} num-partitions={nodes}")
            name = f"flower-supernode-{index}"
            processes[name] = launch(home, "flower-supernode", *listen, str(port), *options, log=name)
        yield processes
    finally:
        stop_all(home)


def launch(home: Path, command: str, *arguments: str, log: str = "") -> subprocess.Popen[bytes]:
    """Start one of Flower's commands with its state and its log in `home`."""
    # Flower starts its own commands by name, so they must be on the path even when this environment is not activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    program = shutil.which(command, path=path)
    if program is None:
        raise RunError(f"{command} is not installed beside {sys.executable}: install flwr")
    environment = {
        **os.environ,
        "PATH": path,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }
    with (home / f"{log or command}.log").open("wb") as output:
        return subprocess.Popen(
            [program, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def check(home: Path, processes: dict[str, subprocess.Popen[bytes]], deadline: float) -> None:
    """RunError when a process that should be there has ended, or when it is past `deadline` (time.monotonic())."""
    for name, process in processes.items():
        if process.poll() is not None:
            raise RunError(f"{name} ended with exit code {process.returncode}.\n{tail(home, name)}")
    if time.monotonic() > deadline:
        raise RunError(f"Flower's engine was not done in time.\n{tail(home, 'flwr')}{tail(home, 'flower-superlink')}")


def stop_all(home: Path) -> None:
    """End every process whose FLWR_HOME is `home`: Flower's commands start others, which outlive them."""
    give_up = time.monotonic() + STOP_SECONDS
    while members := [process for process in psutil.process_iter() if belongs(process, home)]:
        for process in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                if time.monotonic() < give_up:
                    process.terminate()
                else:
                    process.kill()
        psutil.wait_procs(members, timeout=1.0)


def belongs(process: psutil.Process, home: Path) -> bool:
    try:
        return process.pid != os.getpid() and process.environ().get("FLWR_HOME") == str(home)
    except psutil.Error:
        return False


def free_ports(count: int) -> list[int]:
    """TCP ports of the loopback interface that nobody holds, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
        return True
    return False


def tail(home: Path, name: str, lines: int = 20) -> str:
    """The end of a log of `launch`, for an error message."""
    log = home / f"{name}.log"
    text = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "".join(f"  {name}: {line}\n" for line in text[-lines:])
