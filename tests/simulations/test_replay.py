"""What a grid returned is recorded and replayed: stories told to a real grid by a coordinator that the test plays."""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpace.errors import ConfigError, RunError
from fedpace.hosting.app import load_app_folder
from fedpace.hosting.flower import SUPERLINK_NODE_ID, RunNotRunningException, become, identity_kept, make_run
from fedpace.hosting.outputs import Outputs
from fedpace.hosting.recording import FORMAT, Recorder, Recording, load_recording
from fedpace.protocol import fleet_pb2 as pb
from fedpace.protocol.blobs import BlobStore, inline_blob
from fedpace.protocol.failures import Code
from fedpace.protocol.frames import FrameSocket
from fedpace.protocol.paced import Event, Order, PacedGrid, Replied, Tick
from fedpace.protocol.payloads import Get
from fedpace.protocol.records import Buffers, encode
from fedpace.server.grid import FleetGrid
from fedpace.simulations.replaygrid import ReplayGrid

APP = load_app_folder(Path(__file__).parent / "apps" / "recorded")
RUN_ID, LARGE = 7, 40_000
NODES = [2**62 + 5, 11, 2**40]  # as certificates give them: in no order, of any size
Story = Callable[[PacedGrid, "Coordinator | None"], Any]


class Coordinator:
    """Tells a `FleetGrid` what a story says. In a replay there is none."""

    def __init__(self, connection: FrameSocket, directory: Path) -> None:
        self._connection, self._directory = connection, directory
        self._started, self._sequence = time.monotonic(), 0
        connection.send(pb.FleetMessage(start=pb.Start(status="start")))

    def tell(self, **kind: Any) -> None:
        self._sequence += 1
        at = time.monotonic() - self._started
        self._connection.send(pb.FleetMessage(sequence=self._sequence, at=at, **kind))

    def join(self, node: int, cpus: int = 4) -> None:
        self.tell(joined=pb.Node(node_id=node, name=f"node {node}", slots=1, profile=pb.Profile(cpu_count=cpus)))

    def beat(self, node: int, load: float) -> None:
        self.tell(beat=pb.Beat(node_id=node, heartbeat=pb.Heartbeat(load=load)))

    def reply(self, task: int, node: int, values: int = 3) -> None:
        """A reply with so many float64, in a file of its own where they are many."""

        def put(buffers: Buffers) -> pb.Blob:
            return inline_blob(buffers) or BlobStore(self._directory / "updates" / str(task)).put(buffers)

        (self._directory / "updates").mkdir(exist_ok=True)
        arrays = ArrayRecord([np.arange(values, dtype=np.float64) * task])
        metrics = MetricRecord({"num-examples": task, "compute-seconds": 0.25})
        payload = encode(RecordDict({"arrays": arrays, "metrics": metrics}), put)
        seconds, speed = 0.5 + task, 1e6 * task
        self.tell(
            replied=pb.Replied(
                task_id=task,
                node_id=node,
                payload=payload,
                compute_seconds=seconds,
                download_bytes_per_second=speed,
                upload_bytes_per_second=2 * speed,
            )
        )

    def fail(self, task: int, node: int, *, expired: bool = False) -> None:
        code, reason = Code.MESSAGE_UNAVAILABLE if expired else Code.CLIENT_APP_CRASHED, f"task {task} is lost"
        self.tell(failed=pb.Failed(task_id=task, node_id=node, code=code, reason=reason, expired=expired))


def message(node: int, value: float = 1.0, ttl: float = 60.0) -> Message:
    content = RecordDict({"arrays": ArrayRecord([np.full(4, value)]), "config": ConfigRecord({"lr": value})})
    return Message(content, node, "train", ttl=ttl, group_id="1")


def told(event: Event | Message) -> Any:
    """All that there is to know of an event or a reply, to be compared."""
    if isinstance(event, Message):
        reply_to, sender = event.metadata.reply_to_message_id, event.metadata.src_node_id
        if event.has_error():
            return reply_to, sender, event.error.code, event.error.reason
        arrays = [array.tobytes() for array in event.content.array_records["arrays"].to_numpy_ndarrays()]
        return reply_to, sender, arrays, dict(event.content.metric_records["metrics"])
    if isinstance(event, Replied):
        arrays = [array.tobytes() for array in event.update.arrays("arrays").values()]
        found = event.sequence, event.at, event.node_id, event.message_id, dict(event.metrics), event.compute_seconds
        size = event.update.nbytes
        event.update.release()
        return *found, size, arrays
    return event


class Workshop:
    """Records stories, and replays them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._count = 0

    def record(self, story: Story) -> Any:
        """Returns what the story returned; the recording lies in `recording`."""
        self._count += 1
        base = self.directory / str(self._count)
        here, there = socket.socketpair()
        outputs = Outputs(base / "out", only_last=True)
        recorder = Recorder(base / "recording", APP, run_id=RUN_ID, seed=0, overrides={})
        with here, there:
            grid = FleetGrid(FrameSocket(here), base, outputs, make_run(APP, RUN_ID, {}), recorder)
            coordinator = Coordinator(FrameSocket(there), base)
            grid.wait_for_start()
            seen = story(grid, coordinator)
            grid.end()
            there.shutdown(socket.SHUT_RDWR)
        outputs.close()
        recorder.close("finished", base / "out" / "decisions.jsonl")
        return seen

    @property
    def folder(self) -> Path:
        return self.directory / str(self._count) / "recording"

    def replay(self, story: Story, recording: Recording | None = None) -> tuple[Any, ReplayGrid]:
        """Returns what the story returned, and the grid; decisions must be the same."""
        recording = recording or load_recording(self.folder)
        out = self.directory / str(self._count) / "replayed"
        outputs = Outputs(out, only_last=True)
        grid = ReplayGrid(make_run(APP, RUN_ID, {}), recording, outputs)
        try:
            seen = story(grid, None)
            grid.end()
        finally:
            outputs.close()
        if grid.failure is None:
            assert recording.first_difference(out / "decisions.jsonl") is None
        return seen, grid


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    """This process is taken for a ServerApp's, or Flower makes no messages."""
    with identity_kept():
        become(RUN_ID, SUPERLINK_NODE_ID)
        yield


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32))
def test_whatever_a_serverapp_asks_it_gets_the_same_answers_and_times(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    def story(grid: PacedGrid, coordinator: Coordinator | None) -> list[Any]:
        return act(grid, coordinator, random.Random(seed))

    workshop = Workshop(tmp_path_factory.mktemp("stories"))
    seen = workshop.record(story)
    again, grid = workshop.replay(story)
    assert again == seen
    assert grid.failure is None and grid.other_models_from is None
    logs = [workshop.folder.parent / folder / "decisions.jsonl" for folder in ("recording", "replayed")]
    assert logs[0].read_bytes() == logs[1].read_bytes()  # even the times


def act(grid: PacedGrid, coordinator: Coordinator | None, rng: random.Random) -> list[Any]:
    """Does things at random, while as random things arrive, and returns all that came of it."""
    seen: list[Any] = []
    out: dict[str, int] = {}  # tasks, and their nodes
    pending: dict[str, int] = {}  # those that are still to be answered
    joined: set[int] = set()

    def arrive() -> None:
        what, node, task = rng.randrange(6), rng.choice(NODES), rng.choice([*pending, ""])
        values, load = rng.choice([3, LARGE]), rng.random()
        if what == 0:
            joined.add(node)
        if what >= 3 and task:
            node = pending.pop(task)
        if coordinator is None:
            return
        if what == 0:
            coordinator.join(node, rng.randrange(9))
        elif what == 1 and node in joined:
            coordinator.tell(left=pb.Gone(node_id=node, reason="bored"))
        elif what == 2 and node in joined:
            coordinator.beat(node, load)
        elif what == 3 and task and node in joined:
            coordinator.reply(int(task), node, values)
        elif what > 3 and task:
            coordinator.fail(int(task), node, expired=what == 4)

    def sent(nodes: list[int], message_ids: Iterable[str]) -> list[str]:
        tasks = dict(zip(message_ids, nodes, strict=True))
        out.update(tasks)
        pending.update(tasks)
        return list(tasks)

    def ask() -> Any:
        what, node, waits = rng.randrange(10), rng.choice([*NODES, 99]), rng.choice([0.0, 0.0005, 0.005])
        asked = rng.sample(sorted(out), rng.randrange(len(out) + 1))
        if what == 0:
            return list(grid.get_node_ids())
        nodes, ttl = rng.choices([*NODES, 99], k=2), rng.choice([60.0, 1e-5])  # the coordinator sees to that it ends
        if what == 1:
            return sent(nodes, grid.push_messages(message(node, rng.random(), ttl) for node in nodes))
        if what == 2:
            orders = [Order(node, {"lr": 2.0}) for node in nodes]
            return sent(nodes, grid.send(message(node).content, "train", orders, ttl=ttl))
        if what == 3:
            return [told(reply) for reply in grid.pull_messages(asked)]
        if what == 4:
            return grid.cancel(asked)
        if what == 5:
            return grid.record({"what": "wondered", "at": rng.random()})
        if what == 6:
            return [told(reply) for reply in grid.send_and_receive([message(node)], timeout=waits)]
        if what == 7:
            try:
                return grid.profile(node)
            except KeyError:
                return "nobody"
        if what == 8:
            grid.save({"at": rng.random()})
            return grid.restore(), grid.now()
        return told(grid.next_event(grid.now() + waits))

    for _ in range(30):
        for _ in range(rng.randrange(3)):
            arrive_rng = rng.getrandbits(32)
            state = rng.getstate()
            rng.seed(arrive_rng)
            arrive()
            rng.setstate(state)
        seen.append(ask())
    return seen


def until_replied(grid: PacedGrid) -> Replied:
    while not isinstance(event := grid.next_event(grid.now() + 10.0), Replied):
        assert not isinstance(event, Tick)
    return event


def two_tasks(grid: PacedGrid, coordinator: Coordinator | None, *, second: float = 2.0, node: int = NODES[1]) -> Any:
    """Two tasks, one after the other."""
    if coordinator is not None:
        coordinator.join(NODES[1])
    for value, to in ((1.0, NODES[1]), (second, node)):
        [sent] = grid.push_messages([message(to, value)])
        if coordinator is not None:
            coordinator.reply(int(sent), to)
        grid.record({"what": "took", "task": int(until_replied(grid).message_id)})


def test_a_run_that_sends_something_else_has_diverged_and_says_where(workshop: Workshop) -> None:
    workshop.record(two_tasks)

    def elsewhere(grid: PacedGrid, coordinator: Coordinator | None) -> Any:
        return two_tasks(grid, coordinator, node=NODES[2])

    with pytest.raises(RunError, match=r"after decision 4: it sends task 2 \(train\) to node 1099511627776, where the"):
        workshop.replay(elsewhere)

    def more(grid: PacedGrid, coordinator: Coordinator | None) -> Any:
        two_tasks(grid, coordinator)
        list(grid.push_messages([message(NODES[1])]))

    with pytest.raises(RunError, match="after decision 6: it sends tasks, where the recorded one ends"):
        workshop.replay(more)

    _, grid = workshop.replay(lambda grid, coordinator: None)
    assert "after decision 0: it ends, where the recorded one sends tasks" in str(grid.failure)


def test_an_app_cannot_swallow_that_it_has_diverged(workshop: Workshop) -> None:
    workshop.record(two_tasks)

    def careless(grid: PacedGrid, coordinator: Coordinator | None) -> Any:
        with pytest.raises(RunError, match="it asks for the devices, where the recorded one sends tasks"):
            grid.get_node_ids()
        with pytest.raises(RunError, match="it asks for the devices"):
            two_tasks(grid, coordinator)

    _, grid = workshop.replay(careless)
    assert grid.failure is not None


def test_results_of_other_models_are_used_and_told_of(workshop: Workshop) -> None:
    workshop.record(two_tasks)
    _, grid = workshop.replay(lambda grid, coordinator: two_tasks(grid, coordinator, second=2.5))
    assert grid.failure is None and grid.other_models_from == 2


def test_a_run_that_was_told_to_stop_stops_there_again(workshop: Workshop) -> None:
    def story(grid: PacedGrid, coordinator: Coordinator | None) -> Any:
        two_tasks(grid, coordinator)
        if coordinator is not None:
            coordinator.tell(stop=pb.Stop(reason="enough"))
        with pytest.raises(RunNotRunningException):
            grid.next_event(grid.now() + 10.0)

    workshop.record(story)
    _, grid = workshop.replay(story)
    assert grid.halted and grid.failure is None


def test_a_recording_that_breaks_off_is_replayed_up_to_there(workshop: Workshop) -> None:
    """As a server that is killed leaves it: no ending, and half a row."""
    workshop.record(two_tasks)
    header = json.loads((workshop.folder / "recording.json").read_text())
    del header["status"], header["rows_sha256"]
    (workshop.folder / "recording.json").write_text(json.dumps(header))
    rows = (workshop.folder / "rows.jsonl").read_bytes()
    (workshop.folder / "rows.jsonl").write_bytes(rows[: rows.rindex(b'"record"') - 3])
    with pytest.raises(RunError, match="ends after decision 5, before its run did: the server was killed"):
        workshop.replay(two_tasks)


def test_a_damaged_recording_is_refused(workshop: Workshop, tmp_path: Path) -> None:
    workshop.record(two_tasks)
    rows, header = workshop.folder / "rows.jsonl", workshop.folder / "recording.json"
    whole, ended = rows.read_bytes(), header.read_bytes()
    rows.write_bytes(whole.replace(b'"now"', b'"nov"', 1))
    with pytest.raises(ConfigError, match=r"rows\.jsonl is damaged: it is not what was written"):
        load_recording(workshop.folder)
    header.write_text(json.dumps({k: v for k, v in json.loads(ended).items() if k != "rows_sha256"}))
    for old, new, reason in (
        (b'{"what"', b"{what", r"rows\.jsonl, line \d is damaged: Expecting"),
        (b'"what": "joined"', b'"what": "jumped"', "damaged: there is no 'jumped'"),
        (b'"sequence": 2', b'"sequence": 1', "sequence 1 comes after 1"),
        (b'"task": 1', b'"tusk": 1', "TypeError: .*tusk"),
        (b'"look": "push", ', b'"look": "push", "thread": "another", ', "from more than one thread"),
    ):
        assert old in whole
        rows.write_bytes(whole.replace(old, new, 1))
        with pytest.raises(ConfigError, match=reason):
            load_recording(workshop.folder)
    rows.write_bytes(whole)
    header.write_text(json.dumps({**json.loads(ended), "format": FORMAT - 1}))
    with pytest.raises(ConfigError, match=f"its format is {FORMAT - 1}, this fedpace replays {FORMAT}"):
        load_recording(workshop.folder)
    header.write_bytes(ended[:50])
    with pytest.raises(ConfigError, match=r"recording\.json is damaged"):
        load_recording(workshop.folder)
    with pytest.raises(ConfigError, match="is no recording"):
        load_recording(tmp_path)


def test_a_damaged_reply_ends_the_replay(workshop: Workshop) -> None:
    workshop.record(two_tasks)
    for blob in (workshop.folder / "blobs").iterdir():
        blob.write_bytes(bytes(len(blob.read_bytes())))
    with pytest.raises(RunError, match=r"is damaged: blob [0-9a-f]{12} has been changed"):
        workshop.replay(two_tasks)
    for blob in (workshop.folder / "blobs").iterdir():
        blob.unlink()
    with pytest.raises(RunError, match="cannot be read"):
        workshop.replay(two_tasks)


def test_a_disk_that_fails_ends_the_recording_and_not_the_run(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: Recorder, payload: pb.Payload, get: Get) -> pb.Payload:
        raise OSError(28, "No space left on device")

    def story(grid: PacedGrid, coordinator: Coordinator | None) -> Any:
        monkeypatch.setattr(Recorder, "_kept", full)
        two_tasks(grid, coordinator)

    workshop.record(story)
    assert "the recording in" in caplog.text and "No space left" in caplog.text
    assert not load_recording(workshop.folder).complete


def test_arrivals_of_one_instant_keep_their_order(workshop: Workshop) -> None:
    """Clocks may be too coarse to tell them apart; tasks are answered in another order than sent."""

    def story(grid: PacedGrid, coordinator: Coordinator | None) -> list[Any]:
        if coordinator is not None:
            coordinator.join(NODES[1])
        sent = list(grid.push_messages([message(NODES[1]) for _ in range(6)]))
        if coordinator is not None:
            for task in reversed(sent):
                coordinator.reply(int(task), NODES[1])
                coordinator.beat(NODES[1], int(task) / 10)
        return [until_replied(grid).message_id for _ in sent]

    seen = workshop.record(story)
    header = json.loads((workshop.folder / "recording.json").read_text())
    (workshop.folder / "recording.json").write_text(
        json.dumps({name: value for name, value in header.items() if name != "rows_sha256"})
    )
    rows = [json.loads(line) for line in (workshop.folder / "rows.jsonl").read_text().splitlines()]
    at = [row["at"] for row in rows if "what" in row][-1]
    for row in rows:
        if "what" in row:
            row["at"] = at
    (workshop.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    again, _ = workshop.replay(story)
    assert again == seen == ["6", "5", "4", "3", "2", "1"]
