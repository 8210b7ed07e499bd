"""`compress`: a device's updates in a hundredth of the bytes, with what that costs kept and sent later.

The array record that came with the model goes back as one compressed step (`fedpace.protocol.encoded`). fedpace's
grids and strategies read it as it is; elsewhere `fedpace.protocol.decoding.decoded(grid)` makes plain arrays of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MessageType, RecordDict
from numpy.typing import NDArray

from fedpace.clients.mods._feedback import Feedback, Kind, Sent, Vector
from fedpace.errors import ConfigError, PayloadError
from fedpace.protocol.check import NUMPY
from fedpace.protocol.codecs import Codec, encode, parse_codec
from fedpace.protocol.encoded import CODEC, FATES, STEP, StepLayout, is_float, pack_step, reply_record
from fedpace.protocol.received import numbers_of

ClientAppCallable = Callable[[Message, Context], Message]


def compress(
    codec: Codec | str,
    *,
    error_feedback: bool | Literal["ef21"] = True,
    momentum: float = 0.0,
    decay: float = 1.0,
) -> Callable[[Message, Context, ClientAppCallable], Message]:
    """A mod that compresses what training changed; `ClientApp(mods=[...])` names it where it belongs: outside of mods
    that clip models or add noise to them.

    Parameters
    ----------
    codec
        Such as `TopK(0.01) >> Quantise(bits=4)`, or its text. A strategy may choose another for a device: the key
        "fedpace.codec" of the device's config.
    error_feedback
        True: what the codec drops is kept in `context.state` and added to the next step (EF). "ef21": codec and server
        work on the difference to a copy that both keep; for contractive codecs, and strategies that tell fates
        (fedpace's). False: what is dropped is lost.
    momentum
        From 0 to below 1: the share of the moving average of steps in what is sent in their place.
    decay
        What remains of EF's residual after each round: above 0, and 1 for all of it.

    Raises ConfigError for settings that do not fit one another. In a task it raises ConfigError where the reply has no
    model of the names and shapes received, where that is not finite, and for a codec that it is told but cannot use.
    """
    codec = parse_codec(codec) if isinstance(codec, str) else codec
    kind = _KINDS.get(error_feedback)
    if kind is None:
        raise ConfigError(f'compress: error_feedback is {error_feedback!r}; choose True, "ef21" or False')
    if not 0 <= momentum < 1:
        raise ConfigError(f"compress: momentum is {momentum}; choose from 0 to below 1")
    if not 0 < decay <= 1:
        raise ConfigError(f"compress: decay is {decay}; choose above 0, up to 1")
    if kind == "none" and momentum:
        raise ConfigError(
            "compress: momentum is a variant of error feedback; choose error_feedback=True, or no momentum"
        )
    if kind != "ef" and decay != 1:
        raise ConfigError("compress: decay is for the residual that error_feedback=True keeps; here there is none")
    return _Compress(_fitting(codec, kind), kind, momentum, decay)


_KINDS: Mapping[object, Kind] = {True: "ef", "ef21": "ef21", False: "none"}


@dataclass(frozen=True)
class _Compress:
    after_training: ClassVar[bool] = True

    codec: Codec
    kind: Kind
    momentum: float
    decay: float

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        name = _model_record(message)
        if name is None:
            return call_next(message, context)
        told = _config(message.content)
        codec, metadata = self._codec(told), message.metadata
        received = dict(message.content.array_records[name].items())
        reply = call_next(message, context)
        if reply.has_error() or not reply.content.array_records:
            return reply
        layout, step = _step(received, reply.content, reply_record(name))
        task = f"{metadata.run_id}/{metadata.dst_node_id}/{metadata.message_id}"
        feedback = Feedback.load(context.state, layout, self.kind)
        if feedback.codec != str(codec):
            feedback.codec, feedback.memory = str(codec), {}
        feedback.hear(told, metadata.message_id, metadata.created_at)
        this_round = told.get("server-round")
        feedback.decayed(self.decay, this_round if isinstance(this_round, int) else feedback.round + 1)
        step = feedback.averaged(step, self.momentum)
        seed = int.from_bytes(hashlib.sha256(task.encode()).digest()[:8], "little")

        def encoded(vector: Vector, memory: dict[str, NDArray[Any]]) -> bytes:
            try:
                return encode(codec, vector, seed=seed, shapes=list(layout.shapes.values()), memory=memory)
            except PayloadError as error:
                raise ConfigError(
                    f"compress: {error}; error feedback settles with contractive codecs, and {codec} is "
                    f"{'one' if codec.contractive else 'none'}"
                ) from None

        frame, base = feedback.compressed(step, encoded)
        teller = told.get(FATES) if self.kind != "none" else None
        if teller is not None:
            sent = Sent(metadata.message_id, metadata.created_at, float(teller), frame, base or 0)
            feedback.unsettled.append(sent)
        if self.kind != "none" or feedback.memory:
            feedback.save(context.state)
        array = pack_step(frame, layout, stream=feedback.stream, wants_fate=teller is not None, base=base)
        _replace(reply.content, reply_record(name), layout, array)
        return reply

    def _codec(self, told: Mapping[str, Any]) -> Codec:
        """The one to use: the strategy's, where it names one."""
        if self.kind == "ef21" and told.get(FATES) is None:
            raise ConfigError(
                'compress: error_feedback="ef21" needs to hear what became of updates, and this strategy does not tell: '
                "use one of fedpace.strategies, or error_feedback=True"
            )
        text = told.get(CODEC)
        return self.codec if text is None else _fitting(parse_codec(str(text)), self.kind)


def _fitting(codec: Codec, kind: Kind) -> Codec:
    """The codec, if it fits the kind of feedback."""
    if kind == "ef21" and not codec.contractive:
        raise ConfigError(
            f"compress: EF21 converges with contractive codecs only, which {codec} is not: choose error_feedback=True, "
            "or top-k, sign or nearest rounding"
        )
    return codec


def _config(content: RecordDict) -> dict[str, Any]:
    """All config values of a message."""
    return {key: value for record in content.config_records.values() for key, value in record.items()}


def _model_record(message: Message) -> str | None:
    """The array record that is the model: "arrays", or the only one; None where nothing is to be trained."""
    records = message.content.array_records
    if message.metadata.message_type.partition(".")[0] != MessageType.TRAIN or not records:
        return None
    if "arrays" in records:
        return "arrays"
    if len(records) > 1:
        names = ", ".join(map(repr, records))
        raise ConfigError(f'compress: which array record is the model? There are {names}; call it "arrays"')
    return next(iter(records))


def _step(received: Mapping[str, Array], content: RecordDict, name: str) -> tuple[StepLayout, Vector]:
    """The arrays that changed, and by how much: float32, flat."""
    before = {key: numbers_of(array) for key, array in received.items() if array.stype == NUMPY}
    dtypes = {key: received[key].dtype or str(array.dtype) for key, array in before.items()}
    layout = StepLayout.of((key, dtypes[key], array.shape) for key, array in before.items())
    if not layout.size:
        raise ConfigError("compress: the model has no floating-point arrays, and there is nothing to compress")
    if name not in content.array_records:
        names = ", ".join(map(repr, content.array_records))
        raise ConfigError(f"compress: the reply has no array record {name!r}, in which the model came, but {names}")
    trained = content.array_records[name]
    step: Vector = np.empty(layout.size, np.float32)
    for key, place in layout.places.items():
        array = numbers_of(trained[key]) if key in trained and trained[key].stype == NUMPY else None
        if array is None or array.shape != layout.shapes[key] or not is_float(str(array.dtype)):
            found = "missing" if array is None else f"{array.dtype}{list(array.shape)}"
            was = f"{before[key].dtype}{list(layout.shapes[key])}"
            raise ConfigError(f"compress: array {key!r} of the model was {was}, and is {found} in the reply")
        wide = np.float64 if max(array.itemsize, before[key].itemsize) > 4 else np.float32
        into = step[place].reshape(array.shape)
        with np.errstate(over="ignore", invalid="ignore"):
            np.subtract(array, before[key], out=into, dtype=wide, casting="unsafe")
        if not np.isfinite(into).all():
            raise ConfigError(
                f"compress: array {key!r} is not finite after training, or changed beyond float32: training diverged; "
                "lower the learning rate"
            )
    return layout, step


def _replace(content: RecordDict, name: str, layout: StepLayout, array: Array) -> None:
    """Puts a step in the place of the arrays that it stands for."""
    others = {key: other for key, other in content.array_records[name].items() if key not in layout.shapes}
    content[name] = ArrayRecord({STEP: array, **others})
