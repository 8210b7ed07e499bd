"""Laws of error feedback: nothing is lost and nothing counts twice, whatever becomes of messages, devices and updates.

The mod is driven by hand through sequences that Hypothesis makes up. On the server's side stand the strategies' own
`Fates` and `Waiting`; what a machine would decide, the sequence decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, Metadata, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedpace.clients.mods import compress
from fedpace.clients.mods._feedback import Feedback, Kind
from fedpace.errors import PayloadError
from fedpace.hosting.flower import become, make_context, make_request
from fedpace.protocol.codecs import QSGD, Codec, Half, LowRank, Quantise, RandomK, Sign, TopK, open_frame
from fedpace.protocol.encoded import FATES, Step, StepLayout, read_step
from fedpace.protocol.paced import UpdateHandle
from fedpace.protocol.received import RecordsUpdate
from fedpace.strategies.fates import Fates
from fedpace.strategies.layout import Layout
from fedpace.strategies.parts import Work
from fedpace.strategies.state import Task
from fedpace.strategies.waiting import Waiting
from tests.generators import law
from tests.inline_grid import RUN_ID, copied

MODEL = {"w": np.zeros((4, 3), np.float32), "b": np.zeros(3, np.float32)}
RECORD = ArrayRecord({name: Array(array) for name, array in MODEL.items()})
LAYOUT = StepLayout.of((name, str(array.dtype), array.shape) for name, array in MODEL.items())
SIZE, SLOTS, NODE = LAYOUT.size, 2, 7
CONTRACTIVE: list[Codec] = [TopK(0.1), TopK(0.2) >> Quantise(bits=4), LowRank(1), Half()]
CODECS: list[Codec] = [*CONTRACTIVE, RandomK(0.2), Quantise(bits=1), QSGD(4), Sign()]

Numbers = NDArray[np.float64]


def zeros() -> Numbers:
    return np.zeros(SIZE)


@dataclass(eq=False)
class Slot:
    """One state of the device, and what is known of it outside: sums of all that its stream ever did, in float64."""

    state: RecordDict = field(default_factory=RecordDict)
    round: int = 0
    average: Numbers | None = None
    computed: Numbers = field(default_factory=zeros)
    decayed: Numbers = field(default_factory=zeros)
    folded: dict[str, Numbers] = field(default_factory=dict)
    most: float = 1.0


class Sent(RecordsUpdate):
    """Stays readable, for the test to look at."""

    def release(self) -> None:
        pass


@dataclass(eq=False)
class Reply:
    task: Task
    slot: Slot
    update: UpdateHandle
    arrived: bool = False

    @property
    def step(self) -> Step:
        view = self.update.encoded("arrays")
        assert view is not None
        return read_step(view, LAYOUT)


class World:
    """One device with slots, and the server. A message is computed or lost; a reply is folded, discarded or lost."""

    def __init__(self, codec: Codec, kind: Kind = "ef", momentum: float = 0.0, decay: float = 1.0) -> None:
        become(RUN_ID, 1)
        self.kind, self.momentum, self.decay = kind, momentum, decay
        feedback: Any = "ef21" if kind == "ef21" else True
        self.mod = compress(codec, error_feedback=feedback, momentum=momentum, decay=decay)
        self.slots = [Slot() for _ in range(SLOTS)]
        self.fates: Fates | None = None
        self.waiting = Waiting(Layout(RECORD), "arrays", None)
        self.open: dict[int, Task] = {}
        self.messages: list[tuple[Task, Message]] = []
        self.replies: list[Reply] = []
        self.sent = 0
        self.round = 1

    # ------------------------------------------------------------ the server

    def send(self, teller: float = 0.5) -> None:
        self.sent += 1
        task = Task(self.sent, 0, "train", 0, 0, Work(), 0.0, state="out")
        config: Any = {FATES: teller, "server-round": self.round}
        if self.fates is not None:
            config = self.fates.tell(task, config)
        task.message_id = str(self.sent)
        self.open[task.id] = task
        content = copied(RecordDict({"arrays": RECORD, "config": ConfigRecord(dict(config))}))
        metadata = Metadata(RUN_ID, task.message_id, 1, NODE, "", "", 1000.0 + self.sent, 60.0, "train")
        self.messages.append((task, make_request(metadata, content)))

    def end(self, task: Task, fate: str) -> None:
        del self.open[task.id]
        if self.fates is not None:
            self.fates.settle(task, fate)

    def arrive(self, reply: Reply) -> None:
        """As the strategy receives an update. It may be refused; one whose task is over is not looked at."""
        if reply.task.id not in self.open:
            self.replies.remove(reply)
            return
        if self.fates is None:
            self.fates = Fates(self.open.values())
        try:
            stream = self.waiting.receive(reply.task.id, 0, reply.update, checked=False)
        except PayloadError:
            self.fates.hear(reply.task, 0)
            self.replies.remove(reply)
            self.end(reply.task, "lost")
            return
        assert stream == reply.step.stream
        self.fates.hear(reply.task, stream)
        reply.arrived = True

    def decide(self, reply: Reply, fold: bool) -> None:
        self.replies.remove(reply)
        if fold:
            reply.slot.folded[reply.task.message_id] = reply.step.frame.dense().astype(np.float64)
            self.waiting.commit([reply.task.id])
        self.waiting.discard([reply.task.id])
        self.end(reply.task, "folded" if fold else "discarded")

    def give_up(self, task: Task) -> None:
        """A deadline, a device that left, a cancelled task."""
        if task.id in self.open and not any(reply.task is task and reply.arrived for reply in self.replies):
            self.end(task, "given up")

    # ------------------------------------------------------------ the device

    def compute(self, place: int, slot: Slot, step: NDArray[np.float32], crash: str = "") -> None:
        """One task. With a crash the state stays what it was before, or else the reply never leaves; either way the same
        message may come again, for any slot. A message whose reply has left does not."""
        task, request = self.messages[place]
        state = copied(slot.state)

        def train(request: Message, _: Any) -> Message:
            arrays = {
                name: Array(array.numpy() + step[LAYOUT.places[name]].reshape(array.shape))
                for name, array in request.content.array_records["arrays"].items()
            }
            return Message(RecordDict({"arrays": ArrayRecord(arrays)}), reply_to=request)

        context = make_context(RUN_ID, NODE, {}, {}, state)
        reply = self.mod(request, context, train)
        if crash == "before":
            return
        self.account(slot, copied(context.state), step, request)
        if crash != "after":
            del self.messages[place]
            self.replies.append(Reply(task, slot, Sent(copied(reply.content))))

    def account(self, slot: Slot, state: RecordDict, step: NDArray[np.float32], request: Message) -> None:
        before, after = self.feedback(slot.state), self.feedback(state)
        average = step.astype(np.float64)
        if slot.average is not None and self.momentum:
            average = self.momentum * slot.average + (1 - self.momentum) * average
        slot.average = average
        slot.computed += average
        still = {sent.message_id for sent in after.unsettled if sent.message_id != request.metadata.message_id}
        residual = kept_of(before)
        for sent in before.unsettled:
            if sent.message_id not in still and sent.message_id not in slot.folded:
                residual += decoded(sent.frame)
        this_round = request.content.config_records["config"]["server-round"]
        assert isinstance(this_round, int)
        slot.decayed += (1 - self.decay ** max(1, this_round - slot.round)) * residual
        slot.round = this_round
        slot.state = state

    def wipe(self, slot: Slot) -> None:
        """The device has lost a state: what comes is another stream."""
        self.slots[self.slots.index(slot)] = Slot()

    def feedback(self, state: RecordDict) -> Feedback:
        return Feedback.load(state, LAYOUT, self.kind)

    # ------------------------------------------------------------ laws

    def check_conservation(self) -> None:
        """computed = folded + residual + unsettled + decayed."""
        for slot in self.slots:
            feedback = self.feedback(slot.state)
            parts = [slot.decayed, kept_of(feedback), *slot.folded.values()]
            parts += [decoded(s.frame) for s in feedback.unsettled if s.message_id not in slot.folded]
            slot.most = max(slot.most, *(float(np.abs(part).max()) for part in parts))
            np.testing.assert_allclose(sum(parts), slot.computed, atol=1e-5 * slot.most, rtol=0)

    def check_copies(self) -> None:
        """Copies of one name are equal, bit for bit."""
        for slot in self.slots:
            feedback = self.feedback(slot.state)
            held = self.waiting.copies._copies.get(feedback.stream)
            if held is not None and held.name == feedback.copy:
                assert feedback.kept is not None
                assert held.numbers.tobytes() == feedback.kept.tobytes()


def kept_of(feedback: Feedback) -> Numbers:
    return zeros() if feedback.kept is None else feedback.kept.astype(np.float64)


def decoded(frame: bytes) -> Numbers:
    return open_frame(frame, size=SIZE).dense().astype(np.float64)


steps = st.lists(st.integers(-8, 8), min_size=SIZE, max_size=SIZE).map(lambda n: np.array(n, np.float32) / 4)


def happen(world: World, draw: Callable[[st.SearchStrategy[Any]], Any], *, kinds: list[str]) -> None:
    """One thing that may happen, if it can now."""
    kind = draw(st.sampled_from(kinds))
    waiting = [reply for reply in world.replies if reply.arrived]
    coming = [reply for reply in world.replies if not reply.arrived]
    if kind == "send":
        world.send()
    elif kind == "round":
        world.round += 1
    elif kind in ("compute", "crash") and world.messages:
        place = draw(st.integers(0, len(world.messages) - 1))
        crash = draw(st.sampled_from(["before", "after"])) if kind == "crash" else ""
        world.compute(place, draw(st.sampled_from(world.slots)), draw(steps), crash)
    elif kind == "arrive" and coming:
        world.arrive(draw(st.sampled_from(coming)))
    elif kind in ("fold", "discard") and waiting:
        world.decide(draw(st.sampled_from(waiting)), kind == "fold")
    elif kind == "vanish" and coming:
        world.replies.remove(draw(st.sampled_from(coming)))
    elif kind == "give up" and world.open:
        world.give_up(draw(st.sampled_from(list(world.open.values()))))
    elif kind == "wipe":
        world.wipe(draw(st.sampled_from(world.slots)))
    elif kind == "evict":
        for stream in set(world.waiting.copies._copies) - {reply.step.stream for reply in waiting}:
            del world.waiting.copies._copies[stream]


USUAL = ["send", "compute", "arrive", "fold"]
KINDS = [*USUAL, *USUAL, "discard", "vanish", "give up", "crash", "round", "wipe"]


@law
@given(
    data=st.data(),
    codec=st.sampled_from(CODECS),
    momentum=st.sampled_from([0.0, 0.7]),
    decay=st.sampled_from([1.0, 0.5]),
    count=st.integers(1, 60),
)
def test_what_was_computed_is_folded_kept_unsettled_or_decayed(
    data: Any, codec: Codec, momentum: float, decay: float, count: int
) -> None:
    world = World(codec, "ef", momentum, decay)
    for _ in range(count):
        happen(world, data.draw, kinds=KINDS)
        world.check_conservation()


@law
@given(
    data=st.data(), codec=st.sampled_from(CONTRACTIVE), momentum=st.sampled_from([0.0, 0.7]), count=st.integers(1, 60)
)
def test_copies_of_ef21_are_equal_after_every_fate_and_heal(
    data: Any, codec: Codec, momentum: float, count: int
) -> None:
    world = World(codec, "ef21", momentum)
    for _ in range(count):
        happen(world, data.draw, kinds=[*KINDS, "evict"])
        world.check_copies()
    for reply in [reply for reply in world.replies if reply.arrived]:
        world.decide(reply, fold=False)
    for task in list(world.open.values()):
        world.give_up(task)
    world.messages.clear()
    world.replies.clear()
    for slot in world.slots:
        for left in reversed(range(6)):
            world.send()
            world.compute(-1, slot, data.draw(steps))
            reply, feedback = world.replies[-1], world.feedback(slot.state)
            world.arrive(reply)
            if left < 3:
                assert reply.arrived, "three tries are enough to begin anew"
            if left < 2:
                held = world.waiting.copies._copies[feedback.stream]
                assert feedback.kept is not None
                assert (held.name, held.numbers.tobytes()) == (feedback.copy, feedback.kept.tobytes())
            if reply.arrived:
                world.decide(reply, fold=True)


@pytest.mark.parametrize("codec", [TopK(0.2), Quantise(bits=1), Sign(), LowRank(1)], ids=str)
def test_everything_gets_through_in_the_end(codec: Codec) -> None:
    """A device that trains no more sends what is left of its steps until nothing is."""
    world, step = World(codec), np.arange(-7, 8, dtype=np.float32)
    for time in range(60):
        world.send()
        world.compute(0, world.slots[0], step if time < 3 else np.zeros(SIZE, np.float32))
        world.arrive(world.replies[0])
        world.decide(world.replies[0], fold=time != 1)
    folded = sum(world.slots[0].folded.values())
    np.testing.assert_allclose(folded, 3 * step, atol=0.05 * 21)


def test_another_strategy_does_not_take_back_what_the_one_before_folded() -> None:
    world, slot, step = World(TopK(0.2)), 0, np.arange(-7, 8, dtype=np.float32)
    world.send()
    world.compute(0, world.slots[slot], step)
    world.arrive(world.replies[0])
    world.decide(world.replies[0], fold=True)
    world.fates, world.open = Fates([]), {}
    world.send(teller=9.5)
    world.compute(0, world.slots[slot], step)
    world.check_conservation()
    assert len(world.feedback(world.slots[slot].state).unsettled) == 1
