"""What is sent, apart from the records of the app, which may change them once they are sent."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from flwr.app import Array, RecordDict

from fedpace.simulations.work import Content

_KEPT = 4


class Contents:
    """What was sent last: who sends the same object again gets the same `Content` back, which executors have prepared."""

    def __init__(self) -> None:
        self._kept: OrderedDict[int, tuple[RecordDict, list[Any], Content]] = OrderedDict()

    def of(self, records: RecordDict, *, same: bool = False) -> Content:
        """What stands for these records: a copy. With `same` nobody has changed them since they were sent before."""
        known = self._kept.get(id(records))
        if same and known is not None:
            return known[2]
        values = _values(records)
        if known is not None and known[1] == values:
            return known[2]
        copied: dict[str, Any] = {}
        for name, record in records.items():
            copied[name] = type(record)({key: _own(value) for key, value in record.items()})
        content = Content(RecordDict(copied))
        self._kept[id(records)] = records, values, content
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return content

    def clear(self) -> None:
        """The same objects may hold other things when they are sent again."""
        self._kept.clear()


def _values(records: RecordDict) -> list[Any]:
    """What tells whether records are still the same; it compares fast where they are."""
    values: list[Any] = []
    for name, record in records.items():
        values += (name, record, *record.keys())
        values += [tuple(value) if isinstance(value, list) else value for value in record.values()]
    return values


def _own(value: Any) -> Any:
    """A value that can be changed, apart from the one that the app holds."""
    return copy.copy(value) if isinstance(value, list | Array) else value
