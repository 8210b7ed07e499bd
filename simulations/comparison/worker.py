"""The processes that make runs. One, the nursery, imports what all need, and forks a worker for each app and seed; that
prepares the app once, and forks for each run.

So no run pays for imports, data and compilers, and none sees what another did to Flower, to torch or to the app's
modules. The nursery is started by `workers`, and sent two file descriptors for each worker that it is to fork: one from
which that reads a run a line, one on which it answers. First it says {"pid": its process}; then for each run
{"ended": ""}, or what ended the run's process, or {"refused": why} if the app cannot be prepared for any run. What user
code prints goes to `log.txt` of the run.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from fedpace.errors import FedpaceError
from fedpace.hosting.processes import die_with_parent
from fedpace.simulations.comparison.runs import Outcome, RunSpec, write_run
from fedpace.simulations.run import Prepared

_IMPORTED = (
    "fedpace.simulations.comparison.running",
    "fedpace.simulations.executors.inline",
    "fedpace.simulations.executors.fused",
    "torch._dynamo",
    "torch._inductor.codecache",
)


def main(number: int) -> None:
    """The nursery, until nobody is there to tell it anything."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _import()
    with socket.socket(fileno=number) as parent:
        while True:
            data, (*descriptors,), _, _ = socket.recv_fds(parent, 1, 2)
            if not data:
                return
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for workers
            if not os.fork():
                parent.close()
                _serve(*descriptors)
            for descriptor in descriptors:
                os.close(descriptor)


def _import() -> None:
    """What takes long to import, and is used by many runs; where there is no torch, apps have none."""
    for name in _IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)  # a run has one core, and sums depend on the number of threads
        with contextlib.suppress(Exception):  # without a compiler runs say so themselves
            sys.modules["fedpace.simulations.executors.mlp"]._library()
    gc.collect()
    gc.freeze()


def _serve(asks: int, answers: int) -> NoReturn:
    """A worker, until nobody asks for runs any more."""
    code = 1
    try:
        die_with_parent()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        _answer(answers, {"pid": os.getpid()})
        with os.fdopen(asks) as lines:
            _make_runs(lines, answers)
        code = 0
    except BrokenPipeError:
        pass  # nobody is there to tell
    except BaseException:  # noqa: BLE001 - a fork must not return
        traceback.print_exc()
    finally:
        os._exit(code)


def _answer(answers: int, told: dict[str, Any]) -> None:
    os.write(answers, json.dumps(told).encode() + b"\n")


def _make_runs(lines: Iterator[str], answers: int) -> None:
    prepared: Prepared | None = None
    broken = refused = ""
    for line in lines:
        asked = json.loads(line)
        spec, folder = RunSpec.from_plain(asked["spec"]), Path(asked["folder"])
        if prepared is None and not broken and not refused:
            prepared, broken, refused = _prepared(spec, folder)
        if refused:
            _answer(answers, {"refused": refused})
        elif prepared is None:
            write_run(folder, spec, Outcome("failed", broken))
            _answer(answers, {"ended": ""})
        else:
            _answer(answers, {"ended": _in_a_process(spec, prepared, folder)})


def _prepared(spec: RunSpec, folder: Path) -> tuple[Prepared | None, str, str]:
    """The app, or why it cannot be: what its own code raised, or what is wrong with the scenario."""
    from fedpace.simulations.comparison.running import prepare_app

    try:
        with _logged(folder):
            prepared = prepare_app(spec)
    except FedpaceError as error:
        return None, "", str(error)
    except BaseException as error:  # noqa: BLE001 - user code may raise anything, and exit
        (folder / "traceback.txt").write_text(traceback.format_exc())
        return None, f"the app cannot be loaded: {type(error).__name__}: {error}", ""
    gc.collect()
    gc.freeze()
    return prepared, "", ""


def _in_a_process(spec: RunSpec, prepared: Prepared, folder: Path) -> str:
    """Runs it in a fork of this process. Returns what ended that, empty if nothing did."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        _child(spec, prepared, folder)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return f"its process was ended by signal {-code} ({signal.Signals(-code).name})"
    return f"its process ended with exit code {code}" if code else ""


def _child(spec: RunSpec, prepared: Prepared, folder: Path) -> NoReturn:
    from fedpace.simulations.comparison.running import run_one

    code = 1
    try:
        die_with_parent()
        with _logged(folder):
            try:
                write_run(folder, spec, run_one(spec, prepared, folder))
                code = 0
            except FedpaceError as error:
                write_run(folder, spec, Outcome("failed", str(error)))
                code = 0
            except BaseException:  # noqa: BLE001 - it is to be read in the log
                traceback.print_exc()
    finally:
        os._exit(code)


@contextlib.contextmanager
def _logged(folder: Path) -> Iterator[None]:
    """What is printed in the block, by anybody, goes to `log.txt`; the file is left where something was."""
    path = folder / "log.txt"
    kept = os.dup(1), os.dup(2)
    with path.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, saved in enumerate(kept, 1):
            os.dup2(saved, number)
            os.close(saved)
        if not path.stat().st_size:
            path.unlink()


if __name__ == "__main__":
    main(int(sys.argv[1]))
