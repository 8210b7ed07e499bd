"""Error feedback: what a device keeps between tasks of what compression took from its updates, and how fates settle it.

EF, for any codec: what a codec drops of a step is added to the next one.
    Seide, Fu, Droppo, Li, Yu: "1-Bit Stochastic Gradient Descent and its Application to Data-Parallel Distributed
    Training of Speech DNNs", Interspeech 2014; Karimireddy, Rebjock, Stich, Jaggi: "Error Feedback Fixes SignSGD and
    other Gradient Compression Schemes", ICML 2019, algorithm 2.
EF21, for contractive codecs: device and server keep the same copy, and the codec writes how the step differs from it.
    Richtárik, Sokolov, Fatkhullin: "EF21: A New, Simpler, Theoretically Better, and Practically Faster Error Feedback",
    NeurIPS 2021, algorithm 2.

A sent update is unsettled until its fate is told. Then it is forgotten if it was folded; if not, EF takes it back into
the residual. So at any time, by EF and on decoded updates before weights,

    computed = folded + residual + unsettled + decayed.

EF21 adds to its copy what was folded, in the order in which it was, as the server does.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedpace.protocol.codecs import open_frame
from fedpace.protocol.encoded import FATES, FOLDED, OPEN, StepLayout, copy_name, folded_name
from fedpace.protocol.mapped import array_of

ARRAYS, FACTS = "fedpace.feedback", "fedpace.feedback.facts"
"""Names of the two records in `context.state`."""

LOST = 2
"""EF21: after so many updates in a row that were not folded, the server's copy may be another one: begin from zeros."""

UNTOLD = 16
"""Unsettled updates that a device keeps at most for a strategy that tells it nothing: none has arrived, or it would."""

Kind = Literal["ef", "ef21", "none"]
Vector = NDArray[np.float32]
Encode = Callable[[Vector, dict[str, NDArray[Any]]], bytes]
"""A vector and the codec's memory -> a frame."""

_FRAME = "fedpace.frame"
_COLUMNS = ("ids", "created", "tellers", "bases")
_FACTS = ("stream", "kind", "layout", "codec", "round", "copy", "lost")


@dataclass(frozen=True)
class Sent:
    """An update without a known fate: a message's, made at `created_at` (Unix seconds of the server's clock) by the
    strategy `teller`. `base` is EF21's."""

    message_id: str
    created_at: float
    teller: float
    frame: bytes
    base: int = 0


@dataclass
class Feedback:
    """Of one model and one state of a device. `kept` is EF's residual, or EF21's copy, float32 of shape (n,); `average`
    is the momentum's, and `memory` the codec's own for `codec`. `round` is the last one taken part in.
    """

    kind: Kind
    size: int
    layout: bytes
    stream: int
    kept: Vector | None = None
    average: Vector | None = None
    memory: dict[str, NDArray[Any]] = field(default_factory=dict)
    codec: str = ""
    round: int = 0
    copy: int = 0
    lost: int = 0
    unsettled: list[Sent] = field(default_factory=list)

    # ------------------------------------------------------------ in context.state

    @classmethod
    def load(cls, state: RecordDict, layout: StepLayout, kind: Kind) -> Feedback:
        """What `state` holds for this model and kind of feedback; a new stream where it holds none. Its name is drawn, for
        nothing tells two states of one device apart; no result depends on it."""
        facts: dict[str, Any] = dict(state.config_records.get(FACTS, {}))
        if not facts or (facts["kind"], facts["layout"]) != (kind, layout.digest):
            return cls(kind, layout.size, layout.digest, stream=1 + secrets.randbelow((1 << 32) - 1))
        arrays = state.array_records[ARRAYS]
        columns = [facts.pop(name, []) for name in _COLUMNS]
        unsettled = [
            Sent(message_id, created_at, teller, arrays[f"sent {message_id}"].data, base)
            for message_id, created_at, teller, base in zip(*columns, strict=True)
        ]
        own = {name: array.numpy() for name, array in arrays.items() if array.stype != _FRAME}
        memory = {name.removeprefix("memory "): array for name, array in own.items() if name.startswith("memory ")}
        kept, average = own.get("kept"), own.get("average")
        return cls(**facts, size=layout.size, kept=kept, average=average, memory=memory, unsettled=unsettled)

    def save(self, state: RecordDict) -> None:
        arrays = {f"memory {name}": array_of(array) for name, array in self.memory.items()}
        for name, vector in (("kept", self.kept), ("average", self.average)):
            if vector is not None:
                arrays[name] = array_of(vector)
        for sent in self.unsettled:
            arrays[f"sent {sent.message_id}"] = Array("uint8", (len(sent.frame),), _FRAME, sent.frame)
        facts: dict[str, Any] = {name: getattr(self, name) for name in _FACTS}
        if self.unsettled:  # Flower cannot count the bytes of an empty list
            facts["ids"] = [sent.message_id for sent in self.unsettled]
            facts["created"] = [sent.created_at for sent in self.unsettled]
            facts["tellers"] = [sent.teller for sent in self.unsettled]
            facts["bases"] = [sent.base for sent in self.unsettled]
        state[ARRAYS], state[FACTS] = ArrayRecord(arrays), ConfigRecord(facts)

    # ------------------------------------------------------------ fates

    def hear(self, config: Mapping[str, Any], message_id: str, created_at: float) -> None:
        """Settles what a message tells of, or what its coming tells.

        Who tells no fates folds all that is sent; so did a strategy that is no longer there. What was sent for an
        earlier message and is neither folded nor open is lost; a later message is nothing that this one could know of.
        A message that comes again was not answered. A strategy tells nothing until it knows that the device compresses.
        """
        teller = config.get(FATES)
        self._settle([sent for sent in self.unsettled if sent.teller != teller], folded=True)
        self._settle([sent for sent in self.unsettled if sent.message_id == message_id], folded=False)
        by_name = {folded_name(sent.message_id, self.stream): sent for sent in self.unsettled}
        self._settle([by_name[name] for name in str(config.get(FOLDED, "")).split() if name in by_name], folded=True)
        if OPEN in config:
            still = set(str(config[OPEN]).split())
            before = [sent for sent in self.unsettled if sent.created_at < created_at]
            self._settle([sent for sent in before if sent.message_id not in still], folded=False)
        elif len(self.unsettled) > UNTOLD:
            self._settle(self.unsettled[:-UNTOLD], folded=False)

    def _settle(self, fates: Sequence[Sent], *, folded: bool) -> None:
        if not fates:
            return
        settled = {sent.message_id for sent in fates}
        self.unsettled = [sent for sent in self.unsettled if sent.message_id not in settled]
        for sent in fates:
            if self.kind == "ef21":
                taken = folded and self._add_to_copy(sent)
                self.lost = 0 if taken else self.lost + 1
            elif not folded:
                self._add(sent.frame, 1.0)

    def _add_to_copy(self, sent: Sent) -> bool:
        """What the server does with a folded update; False where its copy is another than the update was made for."""
        if sent.base not in (0, self.copy):
            return False
        if not sent.base:
            self.kept = None
        self._add(sent.frame, 1.0)
        self.copy = copy_name(sent.base, sent.frame)
        return True

    def _add(self, frame: bytes, weight: float) -> None:
        if self.kept is None:
            self.kept = np.zeros(self.size, np.float32)
        open_frame(frame, size=self.size).add_to(self.kept, weight)

    # ------------------------------------------------------------ a new update

    def averaged(self, step: Vector, momentum: float) -> Vector:
        """The step, or the moving average of steps that stands in its place.

        Fatkhullin, Tyurin, Richtárik: "Momentum Provably Improves Error Feedback!", NeurIPS 2023, algorithm 1.
        """
        if not momentum:
            self.average = None
            return step
        if self.average is None:
            self.average = step.copy()
        else:
            self.average *= np.float32(momentum)
            self.average += np.float32(1 - momentum) * step
        return self.average.copy()

    def decayed(self, decay: float, this_round: int) -> None:
        """Shrinks EF's residual, once for every round since it was last sent from."""
        if self.kept is not None and decay < 1:
            self.kept *= np.float32(decay ** max(1, this_round - self.round))
        self.round = this_round

    def compressed(self, step: Vector, encode: Encode) -> tuple[bytes, int | None]:
        """The frame of a step, which is written over, and EF21's base; with EF, the residual goes along in it."""
        if self.kind == "ef21":
            return self._difference(step, encode)
        if self.kind == "none":
            return encode(step, self.memory), None
        if self.kept is not None:
            step += self.kept
        frame = encode(step, self.memory)
        self.kept = step
        self._add(frame, -1.0)
        return frame, None

    def _difference(self, step: Vector, encode: Encode) -> tuple[bytes, int]:
        """By EF21: to the copy as it will be if all that is open is folded in order; to zeros where that keeps failing."""
        base, kept, chain = 0, self.kept, list[Sent]()
        if self.lost < LOST:
            base = self.copy
            for sent in self.unsettled:
                if not sent.base:
                    kept, chain = None, []
                elif sent.base != base:
                    continue
                chain.append(sent)
                base = copy_name(sent.base, sent.frame)
            if kept is not None:
                step -= kept
            for sent in chain:
                open_frame(sent.frame, size=self.size).add_to(step, -1.0)
        return encode(step, self.memory), base
