from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from hypothesis import HealthCheck, given, settings

from fedpace.errors import AppError
from fedpace.simulations.executors.inline import InlineExecutor
from fedpace.simulations.executors.pool import PoolExecutor
from fedpace.simulations.executors.segments import SEGMENT_BYTES
from fedpace.simulations.work import Answer, Content
from tests.generators import records
from tests.simulations.batches import (
    APPS,
    CONDUCT,
    DEVICES,
    RUN_CONFIG,
    RUN_ID,
    computation,
    content,
    outcomes,
)

ROOT = Path(__file__).parents[2]
DIED = "the process that ran the ClientApp was ended by SIGKILL, and so did another one before"


@pytest.fixture(scope="module")
def pool() -> Iterator[PoolExecutor]:
    pool = PoolExecutor(CONDUCT, RUN_ID, DEVICES, RUN_CONFIG, workers=2)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def inline() -> InlineExecutor:
    return InlineExecutor(CONDUCT, RUN_ID, DEVICES, RUN_CONFIG)


def one(executor: PoolExecutor, *arguments: Any, **options: Any) -> Answer:
    (answer,) = executor.run([computation(*arguments, **options)])
    return answer


def wait_until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it does not come true"
        time.sleep(0.02)


# ---------------------------------------------------------------- the same as inline


def test_the_answers_are_those_of_inline_in_order(pool: PoolExecutor, inline: InlineExecutor) -> None:
    sent, other = content(3, 1000), content(7)
    state = RecordDict({"old": ArrayRecord([np.zeros(3)])})
    batch = [
        computation(each, do, task=task, device=task, seed=task, then="add", size=2, state=state if task % 2 else None)
        for task, (each, do) in enumerate(
            [
                (sent, do)
                for do in ("add", "fail", "draw", "infinite", "count", "text", "leave", "refuse", "tell", "odd")
            ]
            + [(other, "add"), (sent, "count"), (other, "reshape")]
        )
    ] + [computation(sent, "add", task=99, bad=np.float32(1))]
    batch += [computation(sent, "add", task=100 + device, device=device) for device in range(50)]
    found = outcomes(pool.run(batch))
    assert found == outcomes(inline.run(batch))
    assert found == outcomes(pool.run(batch[::-1]))[::-1]
    assert pool.run([]) == []


@pytest.mark.parametrize(
    ("app", "workers"), [("quickstart_numpy", 1), ("quickstart_numpy", 2), ("quickstart_torch", 2)]
)
def test_flowers_quickstarts_give_the_same_bits(app: str, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    config: dict[str, Any] = {"local-epochs": 2, "learning-rate": 0.5, "batch-size": 16}
    inline = InlineExecutor(APPS / app, RUN_ID, DEVICES, config)
    sent = torch_model() if app == "quickstart_torch" else legacy_model()
    batch = [
        computation(sent, message_type=kind, task=task, device=task, seed=task, lr=0.1)
        for task, kind in enumerate(["train"] * 8 + ["evaluate"] * 4)
    ]
    expected = outcomes(inline.run(batch))
    assert [code for _, _, code, _, _ in expected] == [0] * len(batch), expected
    pool = PoolExecutor(APPS / app, RUN_ID, DEVICES, config, workers=workers)
    try:
        assert outcomes(pool.run(batch)) == expected
    finally:
        pool.close()


def torch_model() -> Content:
    torch.manual_seed(1)
    model = torch.nn.Sequential(OrderedDict(fc1=torch.nn.Linear(64, 32), fc2=torch.nn.Linear(32, 10)))
    return Content(RecordDict({"arrays": ArrayRecord(model.state_dict()), "config": ConfigRecord({})}))


def legacy_model() -> Content:
    """As Flower's legacy strategies send it, to train and to evaluate at once."""
    model = ArrayRecord([np.zeros((64, 10), np.float32), np.zeros(10, np.float32)])
    records = {f"{kind}.parameters": model for kind in ("fitins", "evaluateins")}
    return Content(
        RecordDict({**records, **{f"{kind}.config": ConfigRecord({}) for kind in ("fitins", "evaluateins")}})
    )


@pytest.fixture(scope="module")
def unchecked() -> Iterator[PoolExecutor]:
    pool = PoolExecutor(CONDUCT, RUN_ID, DEVICES, workers=1, check_updates=False)
    yield pool
    pool.close()


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(sent=records)
def test_whatever_a_record_holds_goes_there_and_back(unchecked: PoolExecutor, sent: RecordDict) -> None:
    inline = InlineExecutor(CONDUCT, RUN_ID, DEVICES, check_updates=False)
    echo = [computation(Content(sent), message_type="query.echo")]
    assert outcomes(unchecked.run(echo)) == outcomes(inline.run(echo))


def test_torch_that_comes_late_is_seeded_all_the_same() -> None:
    pool = PoolExecutor(CONDUCT, RUN_ID, DEVICES, workers=1)
    try:
        first, second = (one(pool, content(), "late").metrics["draws"] for _ in range(2))
    finally:
        pool.close()
    assert first == second and first[1] == 1


# ---------------------------------------------------------------- shared memory


def mapped(pid: int | str = "self") -> int:
    """Bytes of shared memory that a process has mapped, and still uses."""
    gc.collect()
    lines = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "memfd:fedpace" in line]
    return sum(int(end, 16) - int(start, 16) for start, end in (line[0].split("-") for line in lines))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_model_is_written_once_and_goes_with_its_content(pool: PoolExecutor) -> None:
    pool.run([computation(content(1), "add")])  # a segment for what is small
    before, size = mapped(), 5 * SEGMENT_BYTES // 4
    sent = content(size // 4)
    for _ in range(2):
        answers = pool.run([computation(sent, "draw", task=task) for task in range(8)])
    assert all(answer.code == 0 for answer in answers)
    assert before + size < mapped() < before + size + 8192
    assert all(mapped(pid) >= size for pid in pool.pids)
    del sent, answers
    for _ in range(2):  # the one with which it is told, and the one after it
        pool.run([computation(content(1), "add", task=task) for task in range(8)])
    assert mapped() <= before + SEGMENT_BYTES
    assert all(mapped(pid) < 4 * SEGMENT_BYTES for pid in pool.pids)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_updates_stay_readable_when_the_pool_is_closed() -> None:
    before = mapped()
    pool = PoolExecutor(CONDUCT, RUN_ID, DEVICES, workers=2)
    sent = content(100, SEGMENT_BYTES // 2)
    answers = pool.run([computation(sent, "add", device=device, task=device) for device in range(6)])
    pool.close()
    pool.close()
    for device, answer in enumerate(answers):
        assert answer.update is not None
        arrays = answer.update.arrays()
        assert [array.shape for array in arrays.values()] == [(100,), (SEGMENT_BYTES // 2,)]
        assert all((array == device + 1).all() and not array.flags.writeable for array in arrays.values())
    assert mapped() > before
    for answer in answers:
        assert answer.update is not None
        answer.update.release()
    del answers, answer, arrays, sent, pool
    assert mapped() == before


def test_large_states_and_configs_go_there_and_back(pool: PoolExecutor) -> None:
    state = None
    for n in (1, 2):
        answer = one(pool, content(1), "count", then="add", size=1 << 20, state=state, ballast=b"x" * (1 << 20))
        state = answer.state
        assert state is not None and (state.array_records["array"]["0"].numpy() == n).all(), answer
    batch = [computation(content(1), "add", task=task, ballast=b"x" * (1 << 20)) for task in range(9)]
    assert all(answer.code == 0 for answer in pool.run(batch))


# ---------------------------------------------------------------- processes that die


def test_what_a_dead_worker_had_is_done_by_another(pool: PoolExecutor, tmp_path: Path) -> None:
    before = set(pool.pids)
    sent = content(2)
    batch = [computation(sent, "add", task=task, device=task) for task in range(20)]
    batch[6] = computation(sent, "die", mark=str(tmp_path / "died"))
    answers = pool.run(batch)
    assert [answer.code for answer in answers] == [0] * 20
    assert len(before & set(pool.pids)) == 1 and len(pool.pids) == 2
    assert answers[6].metrics["pid"] not in before


def test_a_computation_of_which_two_workers_died_fails(pool: PoolExecutor, caplog: pytest.LogCaptureFixture) -> None:
    sent = content(2)
    batch = [computation(sent, "add", task=task, device=task) for task in range(20)]
    batch[3] = computation(sent, "die", task=3)
    answers = pool.run(batch)
    assert [answer.code for answer in answers] == [0] * 3 + [8] + [0] * 16
    assert answers[3].reason == DIED and answers[3].update is None
    assert "was ended by SIGKILL during task 3 of device 4, which is run again" in caplog.text
    assert one(pool, sent, "add").code == 0


def test_workers_that_die_between_two_batches_are_replaced(pool: PoolExecutor) -> None:
    killed = set(pool.pids)
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    answers = pool.run([computation(content(1), "add", task=task) for task in range(8)])
    assert [answer.code for answer in answers] == [0] * 8
    assert not killed & set(pool.pids)


def test_ctrl_c_passes_through_and_the_pool_can_go_on(pool: PoolExecutor, tmp_path: Path) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before, previous = pool.pids, signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            pool.run([computation(content(), "sleep", seconds=60.0, mark=str(tmp_path / "at-work"))])
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert not any(psutil.pid_exists(pid) for pid in before)
    assert one(pool, content(1), "add").code == 0


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent_and_say_nothing(end: signal.Signals, tmp_path: Path) -> None:
    """A Ctrl-C in a terminal goes to all processes of its group."""
    mark, said = tmp_path / "at-work", tmp_path / "stderr"
    with said.open("w") as stderr:
        parent = subprocess.Popen(
            [sys.executable, "-m", "tests.simulations.pool_script", str(mark)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=ROOT,
            process_group=0,
        )
    assert parent.stdout is not None
    with parent.stdout:
        workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    wait_until(mark.exists)
    os.killpg(parent.pid, end)
    assert parent.wait(60) != 0
    wait_until(lambda: not any(worker.is_running() for worker in workers), seconds=30.0)
    assert len(workers) == 2
    assert said.read_text().count("Traceback") == (0 if end == signal.SIGKILL else 1)


def test_an_app_that_cannot_be_loaded_is_an_app_error(tmp_path: Path) -> None:
    folder = tmp_path / "app"
    folder.mkdir()
    (folder / "pyproject.toml").write_text((CONDUCT / "pyproject.toml").read_text())
    with pytest.raises(AppError, match="has no module 'conduct'"):
        PoolExecutor(folder, RUN_ID, DEVICES, workers=1)
    (folder / "conduct.py").write_text("1 / 0")
    with pytest.raises(AppError, match="cannot be loaded: ZeroDivisionError: division by zero"):
        PoolExecutor(folder, RUN_ID, DEVICES, workers=2)
