"""Whatever a ClientApp does costs one task: never the agent, never another device, and the next task goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import StartFleet
from tests.fleets import PuppetFleet, copy_app, wait_for
from tests.raw_device import SECONDS

SETTINGS = {"first-task-seconds": 5, "deadline-min-seconds": 5, "deadline-factor": 1, "log-lines-per-second": 100}


@pytest.fixture(scope="module")
def hall(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PuppetFleet]:
    with PuppetFleet(tmp_path_factory.mktemp("hall"), server=SETTINGS) as fleet:
        fleet.start().start_device("bystander")
        fleet.join("victim")
        fleet.wait_node("bystander")
        yield fleet


@pytest.fixture
def fleet(hall: PuppetFleet) -> Iterator[PuppetFleet]:
    """Afterwards the victim's next task succeeds, on the connection it had, and the bystander's worker is the same."""
    before = hall.ask("bystander")["metrics"]["pid"]
    yield hall
    answer = hall.ask("victim")
    assert answer["sums"] == {"model/w": 6}, answer
    assert hall.ask("bystander")["metrics"]["pid"] == before
    assert hall.log("server").count("victim joined") == 1


@pytest.mark.parametrize(
    ("do", "code", "reason", "logged"),
    [
        ("fail", 2, "ValueError: bad luck", "ValueError: bad luck"),
        ("leave", 2, "SystemExit: the app has had enough", "in leave"),
        ("reply with a number", 2, "the ClientApp returned a int, not a Message", "a int, not a Message"),
        ("vanish", 8, "the worker process died: exit status 7", "exit status 7"),
        ("segfault", 8, "the worker process died: killed by SIGSEGV", "Segmentation fault"),
        ("break the wire", 8, "the worker process died", "the worker process died"),
    ],
)
def test_code_that_fails(fleet: PuppetFleet, do: str, code: int, reason: str, logged: str) -> None:
    """The ServerApp gets an error reply; the server's log names the device and says why, the device's log too."""
    answer = fleet.ask("victim", do, text="bad luck")
    assert answer["code"] == code and reason in answer["reason"]
    for name in ("server", "victim"):
        assert logged in fleet.wait_log(name, logged)
    assert "victim failed task" in fleet.log("server")


def test_a_traceback_comes_with_its_failure(fleet: PuppetFleet) -> None:
    """Not some time after it: the run may be over by then."""
    fleet.ask("victim", "fail", text="in good time")
    assert "victim | ValueError: in good time" in fleet.log("server")


def test_what_is_printed_comes_with_the_reply(fleet: PuppetFleet) -> None:
    fleet.ask("victim", "say", lines=3, text="and done")
    assert fleet.log("server").count("and done") == 3


def test_state_is_as_before_after_a_failure(fleet: PuppetFleet) -> None:
    before = fleet.ask("victim")["metrics"]["calls"]
    for do in ("fail", "vanish", "reply with a number"):
        assert fleet.ask("victim", do, text="x")["code"] is not None
    assert fleet.ask("victim")["metrics"]["calls"] == before + 1


def test_code_that_never_returns(fleet: PuppetFleet) -> None:
    """Its deadline ends it, with its worker; what waited behind it is done."""
    stuck, following = fleet.push("victim", "sleep", seconds=3600), fleet.push("victim")
    answer = fleet.pull(stuck)
    assert answer["code"] == 3 and answer["reason"] == "victim: the task's deadline passed"
    assert fleet.pull(following)["code"] is None
    assert "is called off: the task's deadline passed" in fleet.wait_log("victim", "is called off")


def test_a_worker_killed_from_outside(fleet: PuppetFleet) -> None:
    pid = fleet.ask("victim")["metrics"]["pid"]
    message = fleet.push("victim", "sleep", seconds=3600)
    time.sleep(0.2)
    psutil.Process(pid).send_signal(signal.SIGKILL)
    answer = fleet.pull(message)
    assert answer["code"] == 8 and answer["reason"] == "the worker process died: killed by SIGKILL"


def test_a_worker_that_leaves_children_behind(fleet: PuppetFleet) -> None:
    """They hold its end of the socket: its death is seen all the same, at once, and they go with it."""
    group = fleet.ask("victim")["metrics"]["pid"]
    answer = fleet.ask("victim", "vanish from children")
    assert answer["code"] == 8 and answer["reason"] == "the worker process died: exit status 7"
    wait_for(lambda: not is_there(group), "its children are gone")


def is_there(group: int) -> bool:
    """Whether a process group has members."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("count", [20_000])
def test_a_flood_of_output_is_counted_and_cut(fleet: PuppetFleet, count: int) -> None:
    assert fleet.ask("victim", "say", lines=count, text="flood")["code"] is None
    assert fleet.ask("victim")["code"] is None

    def seen() -> int:
        log = fleet.log("server").splitlines()
        left_out = [int(line.partition("victim | (")[2].split()[0]) for line in log if "victim | (" in line]
        return sum(left_out) + sum("victim | line" in line and "flood" in line for line in log)

    wait_for(lambda: seen() >= count, "every line is shown or counted")
    shown = sum("flood" in line for line in fleet.log("server").splitlines())
    assert 100 <= shown <= 3000


def test_a_line_without_an_end(fleet: PuppetFleet) -> None:
    assert fleet.ask("victim", "say", lines=1, text="x" * 3_000_000)["code"] is None
    log = fleet.wait_log("server", "victim | line 0 xxx")
    assert max(map(len, log.splitlines())) < 5000


def test_code_that_writes_into_what_it_received(fleet: PuppetFleet) -> None:
    """Two devices get the same model; what one writes into it, neither the other nor its own next task sees."""
    first, second = fleet.push("victim", "scribble"), fleet.push("bystander", "scribble")
    for message in (first, second, fleet.push("victim")):
        assert fleet.pull(message)["sums"] == {"model/w": 6}


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("nan", "holds NaN or infinite numbers"),
        ("infinite", "holds NaN or infinite numbers"),
        ("shape", "is float32[2], but float32[3] was sent out"),
        ("dtype", "is int64[3], but float32[3] was sent out"),
    ],
)
def test_an_update_nobody_can_use(fleet: PuppetFleet, what: str, reason: str) -> None:
    """The device's owner and the operator both read why."""
    answer = fleet.ask("victim", "spoil", what=what)
    assert answer["code"] == 4 and reason in answer["reason"]
    assert reason in fleet.log("server") and reason in fleet.wait_log("victim", reason)


def test_many_small_records_both_ways(fleet: PuppetFleet) -> None:
    """Each would ride along in one control message, all of them are more than such a message takes."""
    answer = fleet.ask("victim", records=30, size=50_000)
    assert list(answer["sums"].values()) == [100_000 + index for index in range(30)]


def test_a_failure_with_a_long_story(fleet: PuppetFleet) -> None:
    answer = fleet.ask("victim", "fail long", characters=6_000_000)
    assert answer["code"] == 2 and answer["reason"].startswith("ValueError: zzz") and len(answer["reason"]) < 5000


def test_a_reply_that_is_too_large(start_fleet: StartFleet) -> None:
    fleet = start_fleet(server={"max-reply-bytes": 1 << 20})
    fleet.join("victim")
    large = fleet.ask("victim", "grow", count=1, bytes=2 << 20)
    many = fleet.ask("victim", "grow", count=10, bytes=200 << 10)
    for answer in (large, many):
        assert answer["code"] == 4 and "at most 1048576" in answer["reason"]
    assert "at most 1048576" in fleet.wait_log("victim", "at most 1048576")
    assert fleet.ask("victim")["code"] is None


def test_a_worker_past_its_memory_or_its_tasks_is_replaced(tmp_path: Path, start_fleet: StartFleet) -> None:
    """Between tasks, and the state goes with it."""
    fleet = start_fleet(device={"tasks-per-worker": 2})
    fleet.join("victim")
    answers = [fleet.ask("victim")["metrics"] for _ in range(5)]
    assert [answer["calls"] for answer in answers] == [1, 2, 3, 4, 5]
    pids = [answer["pid"] for answer in answers]
    assert pids[0] == pids[1] != pids[2] == pids[3] != pids[4]


# Loading


def client(app: Path, tmp_path: Path, *options: str) -> list[str]:
    command = [sys.executable, "-m", "fedpace", "client", "--server", "127.0.0.1:1", "--app", str(app), "--insecure"]
    return [*command, "--name", "loader", "--state", str(tmp_path / "state"), *options]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            ("misconduct.py", "import numpy as np", "import numpy as np\nraise ImportError('no luck')"),
            "ImportError: no luck",
        ),
        (
            ("misconduct.py", "import numpy as np", "import numpy as np, no_such_module"),
            "No module named 'no_such_module'",
        ),
        (("misconduct.py", "import numpy as np", "import numpy as np\nos._exit(9)"), "died: exit status 9"),
        (("misconduct.py", "import numpy as np", "import numpy as np\nsys.exit('bye')"), "SystemExit: bye"),
        (("misconduct.py", "app = ClientApp()", "app = ClientApp() )"), "SyntaxError"),
        (("misconduct.py", "import numpy as np", "import numpy as np\ntime.sleep(600)"), "not loaded after 1 s"),
        (("pyproject.toml", "misconduct:app", "nowhere:app"), "has no module 'nowhere'"),
        (("pyproject.toml", "misconduct:app", "misconduct:nobody"), "attribute nobody"),
        (("pyproject.toml", "misconduct:app", "misconduct:sleep"), "is a function, not a ClientApp"),
    ],
)
def test_a_client_app_that_cannot_be_loaded(tmp_path: Path, change: tuple[str, str, str], reason: str) -> None:
    """The client ends at once, before it dials, and says why."""
    app = copy_app(tmp_path / "app", device={"load-seconds": 1 if "sleep(600)" in change[2] else 60}, change=change)
    done = subprocess.run(client(app, tmp_path), capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 2, done.stderr
    said = done.stderr[done.stderr.index("fedpace: ") :]
    assert said.startswith("fedpace: the ") and reason in said
    assert "not connected" not in done.stderr


def test_a_device_told_to_stop_while_it_loads(tmp_path: Path) -> None:
    change = (
        "misconduct.py",
        "import numpy as np",
        "import numpy as np\nprint('loading', flush=True)\ntime.sleep(600)",
    )
    app = copy_app(tmp_path / "app", change=change)
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(client(app, tmp_path), stderr=file)
        try:
            wait_for(lambda: "loading" in log.read_text(), "the app is being loaded")
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
        finally:
            process.kill()
            process.wait()
