"""Plain values (numbers, text, bytes, and lists of one of them) to protobuf and back, types and order kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedpace.errors import PayloadError
from fedpace.protocol import fleet_pb2 as pb

Scalar = bool | int | float | str | bytes
Value = Scalar | list[bool] | list[int] | list[float] | list[str] | list[bytes]

_INT64 = (-(1 << 63), (1 << 63) - 1)
_LISTS = {"numbers": float, "booleans": bool, "texts": str, "octet_strings": bytes}


def encode_values(values: Mapping[str, Any], into: pb.Values | None = None) -> pb.Values:
    """Writes a mapping of names to `Value`s. Raises PayloadError for any other type, naming the key."""
    into = pb.Values() if into is None else into
    for name, value in values.items():
        _encode(into.entry.add(name=name), value)
    return into


def _encode(entry: pb.Entry, value: Any) -> None:
    if isinstance(value, bool):
        entry.boolean = value
    elif isinstance(value, int):
        if _fits(value):
            entry.integer = value
        else:
            entry.big_integer = _decimal(entry.name, value)
    elif isinstance(value, float):
        entry.number = value
    elif isinstance(value, str):
        entry.text = value
    elif isinstance(value, bytes):
        entry.octets = value
    elif isinstance(value, list):
        _encode_list(entry, value)
    else:
        raise PayloadError(f"the value of {entry.name!r} is a {type(value).__name__}, which no Flower record holds")


def _fits(value: int) -> bool:
    return _INT64[0] <= value <= _INT64[1]


def _decimal(name: str, value: int) -> str:
    try:
        return str(int(value))
    except ValueError:
        raise PayloadError(
            f"the integer {name!r} has {value.bit_length()} bits; Python reads no decimal so long"
        ) from None


def _encode_list(entry: pb.Entry, value: list[Any]) -> None:
    kinds = {type(item) for item in value}
    for field, kind in _LISTS.items():
        if kinds and all(issubclass(found, kind) for found in kinds):
            getattr(entry, field).value.extend(value)
            return
    if all(issubclass(found, int) for found in kinds):  # True among numbers is 1, in Flower too; an empty list is here
        if all(map(_fits, value)):
            entry.integers.SetInParent()
            entry.integers.value.extend(map(int, value))
        else:
            entry.big_integers.value.extend(_decimal(entry.name, item) for item in value)
        return
    names = sorted(kind.__name__ for kind in kinds)
    raise PayloadError(f"the list {entry.name!r} holds {names}; a Flower record takes lists of one type")


def decode_values(values: pb.Values) -> dict[str, Any]:
    """A dict in the order written. Raises PayloadError where a name comes twice or a kind is unknown."""
    found: dict[str, Any] = {}
    for entry in values.entry:
        kind = entry.WhichOneof("kind")
        if kind is None:
            raise PayloadError(f"the value of {entry.name!r} is of no kind this version knows")
        if entry.name in found:
            raise PayloadError(f"the value {entry.name!r} is there twice")
        value = getattr(entry, kind)
        try:
            if kind == "big_integer":
                value = int(value)
            elif kind == "big_integers":
                value = [int(item) for item in value.value]
            elif kind in _LISTS or kind == "integers":
                value = list(value.value)
        except ValueError:
            raise PayloadError(f"the value of {entry.name!r} is not a decimal integer") from None
        found[entry.name] = value
    return found
