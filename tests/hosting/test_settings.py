"""Settings: every key has a default and a check, and a wrong one is named."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import pytest

from fedpace.errors import AppError
from fedpace.hosting.settings import DeviceSettings, ServerSettings, read_settings

KINDS = [("server", ServerSettings), ("device", DeviceSettings)]
KEYS = [(table, kind, field.name) for table, kind in KINDS for field in fields(kind)]


@pytest.mark.parametrize(("table", "kind"), KINDS)
def test_what_is_not_said_is_as_by_default(table: str, kind: type[Any]) -> None:
    given: list[dict[str, Any]] = [{}, {table: {}}, {"another": {"key": 1}}]
    for settings in given:
        assert read_settings(kind, settings, table) == kind()


@pytest.mark.parametrize(("table", "kind", "name"), KEYS)
@pytest.mark.parametrize("dash", [True, False])
def test_every_key_is_read(table: str, kind: type[Any], name: str, dash: bool) -> None:
    default = getattr(kind(), name)
    value = (not default) if isinstance(default, bool) else ["topk"] if default == () else type(default)(default + 1)
    found = read_settings(kind, {table: {name.replace("_", "-") if dash else name: value}}, table)
    assert asdict(found) == {**asdict(kind()), name: type(default)(value)}
    assert type(getattr(found, name)) is type(default)


@pytest.mark.parametrize(("table", "kind", "name"), KEYS)
@pytest.mark.parametrize("value", ["5", [5], {"a": 5}, -1, -0.5, float("nan"), float("inf"), 10**30])
def test_every_key_is_checked(table: str, kind: type[Any], name: str, value: Any) -> None:
    with pytest.raises(AppError, match=rf"\[tool.fedpace.{table}\] {name} = "):
        read_settings(kind, {table: {name: value}}, table)


@pytest.mark.parametrize(("table", "kind", "name"), KEYS)
def test_true_is_no_number_and_a_number_is_not_true(table: str, kind: type[Any], name: str) -> None:
    default = getattr(kind(), name)
    boolean = isinstance(default, bool)
    match = "neither true nor false" if boolean else "not a list of texts" if default == () else "not a number"
    with pytest.raises(AppError, match=match):
        read_settings(kind, {table: {name: 1 if boolean else True}}, table)


@pytest.mark.parametrize(
    ("table", "settings", "message"),
    [
        ("server", {"heartbeat-secs": 1}, r"heartbeat-secs is unknown; there are attempts, .*heartbeat-seconds, "),
        ("server", {"keep-versions": 1.5}, "keep-versions = 1.5 is not a whole number"),
        ("server", {"heartbeat-seconds": 0}, "heartbeat-seconds = 0 is out of range: it must be above 0, and finite"),
        ("server", {"keep-versions": -1}, "keep-versions = -1 is out of range: it must be at least 0, and finite"),
        ("server", {"heartbeat-seconds": 15}, "lost-after-seconds = 15 must be longer than heartbeat-seconds = 15"),
        ("server", {"codecs": ["topkk"]}, r"codecs = \['topkk'\]: 'topkk' is no codec"),
        ("server", {"codecs": ["topk"], "check-updates": False}, "codecs are looked at where updates are"),
        ("device", {"tasks-per-worker": 0}, "tasks-per-worker = 0 is out of range: it must be above 0"),
        ("device", 3, r"\[tool.fedpace.device\] is not a table"),
    ],
)
def test_what_makes_no_sense_is_refused(table: str, settings: Any, message: str) -> None:
    with pytest.raises(AppError, match=message):
        read_settings(dict(KINDS)[table], {table: settings}, table)


def test_codecs_are_stages_or_whole_ones_as_they_are_written() -> None:
    found = read_settings(ServerSettings, {"server": {"codecs": ["topk", "sign", "topk(0.10)>>quantise(4)"]}}, "server")
    assert found.codecs == ("topk", "sign", "topk(0.1) >> quantise(4)")


def test_a_whole_number_will_do_for_seconds() -> None:
    found = read_settings(ServerSettings, {"server": {"drain-seconds": 0, "keep-versions": 0}}, "server")
    assert (found.drain_seconds, type(found.drain_seconds), found.keep_versions) == (0.0, float, 0)
