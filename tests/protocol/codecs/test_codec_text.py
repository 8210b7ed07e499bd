"""Codecs as text, and what they promise."""

from __future__ import annotations

import pytest
from hypothesis import given

from fedpace.errors import ConfigError
from fedpace.protocol.codecs import QSGD, Codec, Half, LowRank, Quantise, RandomK, Raw, Sign, TopK, parse_codec
from tests.generators import law
from tests.protocol.codecs.vectors import codecs


@law
@given(codecs)
def test_text_is_read_as_the_codec_it_came_from(codec: Codec) -> None:
    assert parse_codec(str(codec)) == codec


@pytest.mark.parametrize(
    ("codec", "text"),
    [
        (TopK(0.01) >> Quantise(bits=4), "topk(0.01) >> quantise(4)"),
        (RandomK(1 / 3, scaled=True), "randomk(0.33333334, scaled=true)"),
        (Quantise(1, "stochastic", 64), "quantise(1, rounding=stochastic, chunk=64)"),
        (LowRank(2) >> Half(), "lowrank(2) >> half(float16)"),
        (QSGD(4), "qsgd(4)"),
        (Sign(), "sign"),
        (Raw(), "raw"),
    ],
)
def test_the_text_of_a_codec(codec: Codec, text: str) -> None:
    assert str(codec) == text and parse_codec(text) == codec


def test_text_may_be_written_loosely() -> None:
    assert parse_codec(" topk( fraction = 0.01)>>quantise ( 4,nearest )") == TopK(0.01) >> Quantise(4)
    assert parse_codec("quantise") == Quantise(8) and parse_codec("half()") == Half()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "'' is no codec"),
        ("topk", "topk needs its fraction"),
        ("zip(3)", "'zip.3.' is no codec"),
        ("topk(0.01", "is no codec"),
        ("topk(0)", "above 0 and at most 1"),
        ("topk(1.5)", "above 0 and at most 1"),
        ("topk(nan)", "above 0 and at most 1"),
        ("topk(1e-60)", "above 0 and at most 1"),
        ("topk(much)", "fraction of topk is 'much'"),
        ("topk(0.1, 3)", "no place for '3'"),
        ("topk(0.1, fraction=0.2)", "no place for 'fraction=0.2'"),
        ("randomk(0.1, scaled=yes)", "scaled of randomk is 'yes'"),
        ("quantise(3)", "8, 4 or 1 bits, not 3"),
        ("quantise(4, rounding=up)", "nearest or stochastic"),
        ("quantise(4, chunk=100)", "power of two"),
        ("quantise(4, chunk=131072)", "power of two"),
        ("qsgd(128)", "1 to 127 levels"),
        ("lowrank(0)", "rank of 1 to 255"),
        ("half(float8)", "float16 and bfloat16"),
        ("sign(1)", "it takes nothing"),
        ("quantise(4) >> topk(0.1)", "cannot follow"),
        ("topk(0.1) >> randomk(0.1)", "cannot follow"),
    ],
)
def test_what_is_no_codec_is_refused_with_its_reason(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_codec(text)


def test_which_are_contractive_and_which_unbiased() -> None:
    promises = {
        "raw": (True, True),
        "half(float16)": (True, False),
        "topk(0.01)": (True, False),
        "topk(0.01) >> quantise(4)": (True, False),
        "topk(0.01) >> quantise(4, rounding=stochastic)": (False, False),
        "topk(0.01) >> quantise(4, rounding=stochastic, chunk=32)": (True, False),
        "randomk(0.01)": (True, False),
        "randomk(0.01, scaled=true)": (False, True),
        "randomk(0.01, scaled=true) >> half(float16)": (False, False),
        "randomk(0.01, scaled=true) >> qsgd(4)": (False, True),
        "quantise(8)": (True, False),
        "quantise(8, rounding=stochastic)": (True, True),
        "quantise(1)": (True, False),
        "quantise(1, rounding=stochastic)": (False, True),
        "qsgd(4)": (False, True),
        "qsgd(64)": (True, True),
        "sign": (True, False),
        "lowrank(2)": (True, False),
        "lowrank(2) >> half(float16)": (True, False),
        "lowrank(2) >> quantise(8)": (False, False),
    }
    found = {text: (parse_codec(text).contractive, parse_codec(text).unbiased) for text in promises}
    assert found == promises
