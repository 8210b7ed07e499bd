"""`--run-config` and `--node-config` read what Flower's command line reads, and say what they cannot read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from flwr.common.config import parse_config_args
from hypothesis import given
from hypothesis import strategies as st

from fedpace.errors import ConfigError
from fedpace.hosting.config import Config, merge_config, parse_config
from tests.generators import bits, law

OPTION = "--run-config"

keys = st.lists(st.text("abcXYZ019_-", min_size=1, max_size=4), min_size=1, max_size=3).map(".".join)
plain_text = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FFF, exclude_characters="\"'\\\x7f"), max_size=8)
values = st.one_of(
    st.booleans().map(lambda value: str(value).lower()),
    st.integers(-(1 << 62), 1 << 62).map(str),
    st.integers(0, 1 << 30).map(hex),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.sampled_from(["inf", "-inf", "+1_000", "1e3", "6.5e-7", '""', "''", '"a\\tb"']),
    plain_text.map(lambda text: f'"{text}"'),
    plain_text.map(lambda text: f"'{text}'"),
)


def _clash(one: str, other: str) -> bool:
    """Whether TOML takes no two such keys: the same, or one a table that holds the other."""
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


@st.composite
def configs(draw: st.DrawFn) -> list[tuple[str, str]]:
    """Keys and TOML values that one file may hold."""
    pairs: list[tuple[str, str]] = []
    for key, value in draw(st.lists(st.tuples(keys, values), max_size=5)):
        if not any(_clash(key, other) for other, _ in pairs):
            pairs.append((key, value))
    return pairs


def same(found: Config, expected: Config) -> bool:
    return {key: bits(value) for key, value in found.items()} == {key: bits(v) for key, v in expected.items()}


@law
@given(configs(), st.sampled_from([" ", "  ", "\t", "\n"]))
def test_what_flower_reads_is_read_likewise(pairs: list[tuple[str, str]], blank: str) -> None:
    text = blank.join(f"{key}={value}" for key, value in pairs)
    assert same(parse_config(text, OPTION), parse_config_args([text]))


@law
@given(configs())
def test_a_file_is_read_as_flower_reads_it(pairs: list[tuple[str, str]]) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "config.toml"
        path.write_text("".join(f"{key} = {value}\n" for key, value in pairs), encoding="utf-8")
        assert same(parse_config(str(path), OPTION), parse_config_args([str(path)]))


def test_more_is_read_than_flower_reads() -> None:
    """Blanks around the sign, and quotes inside quotes: Flower drops the first without a word and fails at the second."""
    assert parse_config(' a = 1   b= "x y" ', OPTION) == {"a": 1, "b": "x y"}
    assert parse_config(r'a="say \"no\"" b=2', OPTION) == {"a": 'say "no"', "b": 2}
    assert parse_config("a={b=1}", OPTION) == {"a.b": 1}
    assert parse_config("", OPTION) == parse_config("   ", OPTION) == {}


@law
@given(st.dictionaries(keys, st.text(st.characters(max_codepoint=0xD7FF, exclude_characters="\x7f")), max_size=1))
def test_any_text_can_be_written_as_json_writes_it(config: dict[str, str]) -> None:
    text = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
    assert parse_config(text, OPTION) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr", "cannot read 'lr'; write key=value, apart by blanks"),
        ("lr=", "cannot read 'lr='"),
        ("=1", "cannot read '=1'"),
        ("a=1 b", "cannot read 'b'"),
        ('a="x"y', "cannot read 'y'"),
        ("name=digits", 'name=digits is not a TOML value; text goes in quotes: name="digits"'),
        ("path=data/x-1.csv", 'text goes in quotes: path="data/x-1.csv"'),
        ("lr=0.1.2", 'lr=0.1.2 is not a TOML value; text goes in quotes: lr="0.1.2"'),
        ("on=True", 'text goes in quotes: on="True"'),
        ("a=[1,2]", "a=[1,2] is not a TOML value"),
        ("a=2020-01-01", "a=2020-01-01 is not a TOML value"),
        ('a="open', 'a="open is not a TOML value'),
        ("a=1 a=2", "'a' is there twice"),
        ("a.b=1 a={b=2}", "'a.b' is there twice"),
        ("a.=1", "a.=1 is not a TOML value"),
        ("a!=1", "a!=1 is not a TOML value"),
    ],
)
def test_what_cannot_be_read_is_said(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_config(text, OPTION)
    assert str(raised.value).startswith(f"{OPTION}: ") and message in str(raised.value)


def test_a_file_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--run-config: .*missing\.toml cannot be read: No such file"):
        parse_config(str(tmp_path / "missing.toml"), OPTION)
    for text, message in (
        ("a = ", "Invalid value"),
        ("a = [1]", "a is a list"),
        ("[t]\nb = 1979-05-27", "t.b is a date"),
    ):
        (tmp_path / "bad.toml").write_text(text)
        with pytest.raises(ConfigError, match=rf"--run-config: .*bad\.toml: {message}"):
            parse_config(str(tmp_path / "bad.toml"), OPTION)
    (tmp_path / "bad.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="decode"):
        parse_config(str(tmp_path / "bad.toml"), OPTION)


@law
@given(st.dictionaries(keys, st.integers(), max_size=5), st.dictionaries(keys, st.text(max_size=3), max_size=5))
def test_overrides_win_and_unknown_keys_are_refused(defaults: Config, overrides: Config) -> None:
    unknown = overrides.keys() - defaults.keys()
    if not unknown:
        assert merge_config(defaults, overrides, OPTION) == {**defaults, **overrides}
        return
    with pytest.raises(ConfigError, match=r"--run-config: the app has no key .* in \[tool.flwr.app.config\]; it has"):
        merge_config(defaults, overrides, OPTION)
    known = {key: value for key, value in overrides.items() if key in defaults}
    assert merge_config(defaults, known, OPTION) == {**defaults, **known}


def test_infinity_is_a_number() -> None:
    assert parse_config("a=inf b=nan", OPTION)["a"] == math.inf
