"""What a device keeps: whole or not at all, of the last run, and never less than what is in use."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from flwr.app import ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedpace.clients import memory as memory_module
from fedpace.clients.memory import DeviceMemory
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.records import encode
from tests.generators import keep_inline, law


def record(run_id: int, number: int = 0) -> pb.SlotRecord:
    """A record whose state and reply both say `number`."""
    state = encode(RecordDict({"state": ConfigRecord({"number": number})}), keep_inline)
    return pb.SlotRecord(run_id=run_id, state=state, reply=pb.Result(task_id=number, payload=state))


def files(memory: DeviceMemory, run_id: int) -> list[Path]:
    return sorted((memory.directory / "runs" / str(run_id)).iterdir())


def age(memory: DeviceMemory, run_id: int, seconds: int) -> None:
    os.utime(memory.directory / "runs" / str(run_id), (seconds, seconds))


# ---------------------------------------------------------------- records


@law
@given(st.lists(st.tuples(st.integers(1, 2), st.integers(0, 1), st.booleans()), max_size=12))
def test_the_last_record_of_a_run_and_slot_is_there(steps: list[tuple[int, int, bool]]) -> None:
    with TemporaryDirectory() as folder:
        memory = DeviceMemory(Path(folder))
        last: dict[tuple[int, int], pb.SlotRecord] = {}
        for number, (run_id, slot, fresh) in enumerate(steps, start=1):
            if fresh:  # a worker replaced, an agent restarted
                memory = DeviceMemory(Path(folder))
            last[run_id, slot] = record(run_id, number)
            memory.keep(last[run_id, slot], slot)
        for reader in (memory, DeviceMemory(Path(folder))):
            for run_id in (1, 2):
                for slot in (0, 1):
                    assert reader.load(run_id, slot) == last.get((run_id, slot))
        for run_id in {run_id for run_id, _ in last}:
            assert len(files(memory, run_id)) == len([slot for run, slot in last if run == run_id])


def truncate(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    return bytes([*data[:-1], data[-1] ^ 1])


@pytest.mark.parametrize("spoil", [lambda data: b"", truncate, flip, lambda data: data[:4], lambda data: b"noise"])
def test_a_record_that_is_not_whole_counts_as_none(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    """After a power cut a file may be there without its content: records are not synced."""
    memory = DeviceMemory(tmp_path)
    memory.keep(record(1, 5), 0)
    [path] = files(memory, 1)
    whole = path.read_bytes()
    path.write_bytes(spoil(whole))
    assert memory.load(1, 0) is None and memory.last_run() == []
    memory.keep(record(1, 6), 0)
    assert memory.load(1, 0) == record(1, 6)


def test_where_the_newest_record_is_not_whole_the_one_before_counts(tmp_path: Path) -> None:
    """Two are there only where a process ended after it wrote the new one and before it removed the old one."""
    memory = DeviceMemory(tmp_path)
    memory.keep(record(1, 5), 0)
    [old] = files(memory, 1)
    data = old.read_bytes()
    memory.keep(record(1, 6), 0)
    old.write_bytes(data)
    assert DeviceMemory(tmp_path).load(1, 0) == record(1, 6)
    files(memory, 1)[1].write_bytes(b"")
    assert DeviceMemory(tmp_path).load(1, 0) == record(1, 5)


def test_a_write_that_fails_leaves_the_record_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = DeviceMemory(tmp_path)
    memory.keep(record(1, 5), 0)

    def full(path: Path, *args: object) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="No space"):
        memory.keep(record(1, 6), 0)
    assert memory.load(1, 0) == record(1, 5) and len(files(memory, 1)) == 1


def test_only_the_newest_run_is_recalled(tmp_path: Path) -> None:
    memory = DeviceMemory(tmp_path)
    assert memory.last_run() == []
    for run_id in (7, 99, 8):
        for slot in (0, 1):
            memory.keep(record(run_id, 10 * run_id + slot), slot)
    for seconds, run_id in enumerate((8, 7, 99)):
        age(memory, run_id, seconds)
    assert memory.last_run() == [record(99, 990), record(99, 991)]
    age(memory, 7, 1000)
    assert memory.last_run() == [record(7, 70), record(7, 71)]
    assert memory.load(99, 1) == record(99, 991), "the others are still there, for a server that returns"


def test_runs_long_past_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "_RUNS_KEPT", 3)
    memory = DeviceMemory(tmp_path)
    for run_id in range(1, 7):
        memory.keep(record(run_id), 0)
        age(memory, run_id, run_id)
    assert memory.last_run() == [record(6)]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["4", "5", "6"]


def test_what_else_lies_in_the_folder_is_left_alone(tmp_path: Path) -> None:
    memory = DeviceMemory(tmp_path)
    memory.keep(record(1, 5), 0)
    (tmp_path / "runs" / "notes").mkdir()
    (tmp_path / "runs" / "notes.txt").touch()
    for name in ("x.0.record", "0.x.record", "0.record", ".0.9.record.123.tmp"):
        (tmp_path / "runs" / "1" / name).touch()
    assert memory.last_run() == [record(1, 5)]
    memory.keep(record(1, 6), 0)
    assert DeviceMemory(tmp_path).load(1, 0) == record(1, 6)


# ---------------------------------------------------------------- the outbox


def test_blobs_of_a_reply_go_once_its_fate_is_known(tmp_path: Path) -> None:
    memory = DeviceMemory(tmp_path)
    memory.settle(1)
    memory.empty_outbox(but=[])
    for task_id in (1, 2, 12, 3):
        memory.outbox(task_id).mkdir(parents=True)
        (memory.outbox(task_id) / "blob").write_bytes(b"x")
    memory.settle(3)
    memory.empty_outbox(but={2: "in hand"})
    assert [path.name for path in (tmp_path / "outbox").iterdir()] == ["2"]
    assert (memory.outbox(2) / "blob").read_bytes() == b"x"


# ---------------------------------------------------------------- models fetched


@law
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=8),
    st.integers(0, 200),
    st.sets(st.integers(0, 7)),
    st.permutations(range(8)),
)
def test_models_used_last_stay_and_those_in_use_always(
    sizes: list[int], limit: int, used: set[int], order: list[int]
) -> None:
    with TemporaryDirectory() as folder:
        memory = DeviceMemory(Path(folder))
        blobs = [memory.blobs.put([bytes([index]) * size]) for index, size in enumerate(sizes)]
        for index, blob in enumerate(blobs):
            os.utime(memory.blobs.path(blob.name), (order[index], order[index]))
        memory.trim_blobs(limit, {blob.name for index, blob in enumerate(blobs) if index in used})
        left = [index for index, blob in enumerate(blobs) if memory.blobs.has(blob)]
        expected, total = set(range(len(sizes))), sum(sizes)
        for index in sorted(range(len(sizes)), key=lambda index: order[index]):
            if total > limit and index not in used:
                expected.remove(index)
                total -= sizes[index]
        assert set(left) == expected
        assert total <= limit or expected <= used


def test_a_model_read_again_is_used_again(tmp_path: Path) -> None:
    memory = DeviceMemory(tmp_path)
    old, new = (memory.blobs.put([text * 10]) for text in (b"a", b"b"))
    for seconds, blob in ((1, old), (2, new)):
        os.utime(memory.blobs.path(blob.name), (seconds, seconds))
    memory.blobs.get(old)
    memory.trim_blobs(10, [])
    assert memory.blobs.has(old) and not memory.blobs.has(new)


def test_transfers_under_way_are_in_use(tmp_path: Path) -> None:
    memory = DeviceMemory(tmp_path)
    name = bytes(range(32))
    first, second = (memory.blobs.incoming(name, 10) for _ in range(2))
    for transfer in (first, second):
        transfer.write(b"12345")
    memory.trim_blobs(0, [name])
    assert len(list(memory.blobs.directory.iterdir())) == 2
    second.close()
    first.close()
    memory.trim_blobs(0, [])
    assert list(memory.blobs.directory.iterdir()) == []
