"""Codecs as text: `topk(0.01) >> quantise(4, rounding=stochastic)`."""

from __future__ import annotations

import dataclasses
import re
from functools import lru_cache

import numpy as np

from fedpace.errors import ConfigError
from fedpace.protocol.codecs.codec import Codec, Coder, Reducer
from fedpace.protocol.codecs.frame import STAGES, encode

_STAGE = re.compile(r"\s*([a-z]+)\s*(?:\(([^()]*)\))?\s*")


def parse_codec(text: str) -> Codec:
    """The codec whose `str` this is. Raises ConfigError that says what is wrong."""
    first, *others = [_parse_stage(part) for part in text.split(">>")]
    codec: Codec = first
    for other in others:
        codec = codec >> other
    return codec


@lru_cache(maxsize=1024)
def typical_bytes(codec: str, size: int) -> int:
    """About how long frames of a codec are that `parse_codec` reads, of vectors of shape (size,): that of normal numbers.

    Raises ConfigError for what is no codec, or one that needs shapes.
    """
    vector = np.random.default_rng(0).standard_normal(size, np.float32)
    return len(encode(parse_codec(codec), vector, seed=0))


def _parse_stage(text: str) -> Reducer | Coder:
    found = _STAGE.fullmatch(text)
    if found is None or found[1] not in STAGES:
        raise ConfigError(f"{text.strip()!r} is no codec; there are {', '.join(STAGES)}, such as topk(0.01)")
    kind = STAGES[found[1]]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    settings: dict[str, bool | int | float | str] = {}
    for position, setting in enumerate(filter(str.strip, (found[2] or "").split(","))):
        name, equals, value = (part.strip() for part in setting.partition("="))
        if not equals:
            name, value = next(iter(list(fields)[position : position + 1]), ""), name
        if name not in fields or name in settings:
            raise ConfigError(
                f"{found[1]} has no place for {setting.strip()!r}; it takes {', '.join(fields) or 'nothing'}"
            )
        settings[name] = _parse_value(value, str(fields[name].type), f"{name} of {found[1]}")
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in settings]
    if missing:
        raise ConfigError(f"{found[1]} needs its {missing[0]}: {found[1]}(...)")
    return kind(**settings)


def _parse_value(value: str, kind: str, what: str) -> bool | int | float | str:
    try:
        if kind == "bool":
            return {"true": True, "false": False}[value]
        return int(value) if kind == "int" else float(value) if kind == "float" else value
    except (KeyError, ValueError):
        raise ConfigError(f"the {what} is {value!r}; it is to be a {kind}") from None
