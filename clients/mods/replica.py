"""`replica`: the model of the last message is kept, so that the next one may say only what has changed since.

For strategies with a `downlink` codec (fedpace's): see docs/compression.md.
"""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict

from fedpace.clients.mods._replies import metric_record
from fedpace.errors import PayloadError
from fedpace.protocol.downlink import STEPS, STEPS_TYPE, VERSION, Steps, advanced, digest_of, read_steps
from fedpace.protocol.encoded import StepLayout
from fedpace.protocol.mapped import array_of, buffer_of
from fedpace.protocol.received import numbers_of

_ARRAYS, _VERSION = "fedpace.replica", "fedpace.replica-version"
"""Names of what is kept in `context.state`: the arrays, and the version that they are."""


def replica(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """Gives the app the whole model, whatever came of it, and keeps it for the next message.

    It belongs first in `ClientApp(mods=[...])`: other mods then see the model too. It does nothing where the strategy does
    not number its versions. Raises PayloadError where steps came that do not lead on from the version that is kept; the
    strategy then sends the whole model next time.
    """
    version = _version(message.content)
    if version is None:
        return call_next(message, context)
    name = _model_record(message.content)
    if name is None:
        return call_next(message, context)
    record = message.content.array_records[name]
    if (carrier := record.get(STEPS)) is not None and carrier.stype == STEPS_TYPE:
        record = _followed(carrier, record, context.state)
        message.content[name] = record
    context.state[_ARRAYS] = ArrayRecord(dict(record.items()))
    context.state[_VERSION] = ConfigRecord({"version": version})
    reply = call_next(message, context)
    if not reply.has_error():
        metric_record(reply.content)[VERSION] = version
    return reply


def _version(content: RecordDict) -> int | None:
    """The version of the model in a message, where it says so."""
    for record in content.config_records.values():
        if isinstance(version := record.get(VERSION), int):
            return version
    return None


def _model_record(content: RecordDict) -> str | None:
    """The array record that is the model: the one with steps, else "arrays", else the first."""
    records = content.array_records
    for name, record in records.items():
        if STEPS in record:
            return name
    return "arrays" if "arrays" in records else next(iter(records), None)


def _followed(carrier: Array, record: ArrayRecord, state: RecordDict) -> ArrayRecord:
    """The model that the steps lead to; its arrays in the order of the one that is kept."""
    if _ARRAYS not in state:
        raise PayloadError(
            "replica: this device was sent steps, and holds no version of the model: it needs the whole one"
        )
    kept, version = state.array_records[_ARRAYS], state.config_records[_VERSION]["version"]
    assert isinstance(version, int)
    layout = StepLayout.of((name, array.dtype, tuple(array.shape)) for name, array in kept.items())
    try:
        steps = read_steps(memoryview(buffer_of(carrier)), layout)
        floats = _advanced(kept, version, steps, layout)
    except PayloadError as error:
        raise PayloadError(f"replica: array {STEPS!r}: {error}") from None
    return ArrayRecord({name: floats.get(name, record.get(name, array)) for name, array in kept.items()})


def _advanced(kept: ArrayRecord, version: int, steps: Steps, layout: StepLayout) -> dict[str, Array]:
    if not steps.first <= version <= steps.last:
        raise PayloadError(
            f"leads from version {steps.first} to {steps.last}, and this device holds version {version}: "
            "it needs the whole model"
        )
    before = {name: numbers_of(kept[name]) for name in layout.shapes}
    after = advanced(before, steps.frames[version - steps.first :], layout)
    if digest_of(after.values()) != steps.digest:
        raise PayloadError(
            f"leads to another model than version {steps.last}: what this device held as version {version} was not that"
        )
    return {name: array_of(array) if array is not before[name] else kept[name] for name, array in after.items()}
