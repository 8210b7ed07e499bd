"""Fleets from files: what is refused and how, and files that a fleet names."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpace.errors import ConfigError
from fedpace.simulations.fleets import load_fleet, preset_names
from fedpace.simulations.fleets.presence import Trace
from fedpace.simulations.fleets.settings import SECTIONS

DOCS = Path(__file__).resolve().parents[2] / "docs" / "fleets.md"


def refusal(tmp_path: Path, text: str) -> str:
    """What is said of a fleet's file, without the path in front."""
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_fleet(str(path), 4, 1)
    said = str(caught.value)
    assert said.startswith(str(path))
    return said.removeprefix(str(path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\n[compute]\nmodle = 1", ":3: compute.modle: unknown key; known here: model, "),
        ("[computer]\n", ":1: computer: unknown key; known here: description, compute, "),
        ("speed = 1", ":1: speed: unknown key"),
        ("compute = 3", ":1: compute: is a whole number; write a table, [compute]"),
        ("compute = {modle = 1}", ":1: compute.modle: unknown key"),
        ("network.jitter = -1.0", ":1: network.jitter: is -1.0; allowed: a number, at least 0, at most 3"),
        ("[faults]\ndropout = true", ":2: faults.dropout: is true or false; allowed: a number"),
        ("[faults]\n'dropout' = \"often\"", ":2: faults.dropout: is text; allowed: a number, at least 0, at most 1"),
        ("[faults]\nfailure = nan", ":2: faults.failure: is nan; allowed"),
        ("[faults]\ndropout = 0.7\nfailure = 0.7", ":2: faults.dropout: is 1.4 together with failure; at most 1"),
        (
            "[network]\nserver_mbit = 0",
            ":2: network.server_mbit: is 0; allowed: a number, more than 0, at most 1e+12, or",
        ),
        (f"[network]\nserver_mbit = 1{400 * '0'}", ":2: network.server_mbit: is 1"),
        ("[compute]\nprocessors = 2.5", ":2: compute.processors: is a number; allowed: a whole number from 1 to 4096"),
        ('[compute]\nmodel = "fast"', ":2: compute.model: is 'fast'; allowed: constant, classes, lognormal, file"),
        ("[compute]\nmodel = [1]", ":2: compute.model: is [1]; allowed: constant"),
        ("description = 1", ":1: description: is a whole number; write text in quotes"),
        ("[compute]\nsigma = 1.0", ":2: compute.sigma: model is 'constant'; this key is for lognormal"),
        (
            "[availability]\nmodel = 'trace'\nday_share = 0.1\nfile = 'x'",
            ":3: availability.day_share: model is 'trace'",
        ),
        ("[compute]\nmodel = 'classes'", ":2: compute.model: 'classes' needs [[compute.classes]] tables"),
        ("[compute]\nmodel = 'file'", ":2: compute.model: 'file' needs file = \"...\""),
        ("[availability]\nmodel = 'trace'", ":2: availability.model: 'trace' needs file = \"...\""),
        (
            "[network]\nmodel = 'classes'\n[[network.classes]]\nshare = 1\n[[network.classes]]\nup_mbit = 0",
            ":6: network.classes[2].up_mbit: is 0; allowed",
        ),
        ("[compute]\nmodel = 'classes'\n[compute.classes]", ":3: compute.classes: is not an array of tables; write [["),
        ("[compute]\nload_low = 0.5\nload_high = 0.2", ":2: compute.load_low: is 0.5, more than load_high = 0.2"),
        ("[battery]\nleave_below = 0.5", ":1: battery.return_above: is the same as leave_below"),
        ("[battery]\nstart_low = 0.1", ":1: battery.leave_below: is 0.2, more than start_low = 0.1"),
        ("[network]\nmodel = 'normal'\nleast_mbit = 60", ":3: network.least_mbit: is more than the means"),
        ("[compute\n", ": Expected ']'"),
    ],
)
def test_what_is_wrong_is_named_with_its_line_and_key(tmp_path: Path, text: str, said: str) -> None:
    assert refusal(tmp_path, text).startswith(said)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([(name, field.name) for name, kind in SECTIONS.items() for field in dataclasses.fields(kind)]),
    st.sampled_from(["-1", "inf", "nan", "true", "'x'", "[]", "{}", "1e300", "0", "0.5", "3", "1979-05-27", "[[1]]"]),
)
def test_a_value_is_taken_or_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, place: tuple[str, str], value: str
) -> None:
    path = tmp_path_factory.mktemp("fleet") / "mine.toml"
    path.write_text(f"[{place[0]}]\n{place[1]} = {value}\n")
    try:
        fleet = load_fleet(str(path), 4, 1)
    except ConfigError as error:
        assert re.match(rf"{re.escape(str(path))}:[12]: {place[0]}\.", str(error))
    else:
        assert math.isfinite(fleet.draw(0, 1, 0.0, 10, 1000, 1000).at)


def test_names_that_are_no_fleet(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"fleet 'flesh': name one of cross-silo, .*, or a \.toml file"):
        load_fleet("flesh", 4, 1)
    with pytest.raises(ConfigError, match=r"gone\.toml: cannot be read: No such file"):
        load_fleet(str(tmp_path / "gone.toml"), 4, 1)
    with pytest.raises(ConfigError, match="at least 1"):
        load_fleet("flash", 0, 1)
    assert preset_names() == ["cross-silo", "edge-extreme", "flash", "liars", "uniform"]


def test_every_key_is_explained() -> None:
    text = DOCS.read_text()
    for name, kind in SECTIONS.items():
        section = text.split(f"### `[{name}]`")[1].split("\n##")[0]
        for field in dataclasses.fields(kind):
            assert f"`{field.name}`" in section, f"docs/fleets.md does not explain {name}.{field.name}"


# ------------------------------------------------------------ speeds of one's own


@pytest.mark.parametrize(
    ("name", "text"),
    [("speeds.json", "[0.5, 2, 0.25]"), ("speeds.csv", "model,seconds_per_step\na,0.5\nb,2\nc,0.25\n")],
)
def test_speeds_from_a_file(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    (tmp_path / "mine.toml").write_text(f"[compute]\nmodel = 'file'\nfile = '{name}'")
    fleet = load_fleet(str(tmp_path / "mine.toml"), 5, 1)
    assert fleet.devices.step_seconds.tolist() == [0.5, 2.0, 0.25, 0.5, 2.0]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("s.json", "[1, 0]", "entry 2: seconds_per_step is 0; allowed: more than 0"),
        ("s.json", "[1, true]", "entry 2: seconds_per_step is True; write a number of seconds"),
        ("s.json", "{}", "is not a list"),
        ("s.json", "[1", "Expecting"),
        ("s.json", "[]", "has no devices"),
        ("s.csv", "seconds\n1\n", "1: has no column 'seconds_per_step'"),
        ("s.csv", "seconds_per_step\n1\nx\n", "3: seconds_per_step is 'x'"),
        ("s.csv", "a,seconds_per_step\n1\n", "2: has too few values"),
        ("s.csv", "seconds_per_step\nnan\n", "2: seconds_per_step is nan"),
    ],
)
def test_speeds_that_are_refused(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    (tmp_path / "mine.toml").write_text(f"[compute]\nmodel = 'file'\nfile = '{name}'")
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        load_fleet(str(tmp_path / "mine.toml"), 5, 1)
    assert str(tmp_path / name) in str(caught.value)


# ------------------------------------------------------------ traces


def trace_fleet(tmp_path: Path, rows: str, more: str = "") -> str:
    (tmp_path / "trace.csv").write_text(f"device,start,end\n{rows}")
    (tmp_path / "mine.toml").write_text(f"[availability]\nmodel = 'trace'\nfile = 'trace.csv'\n{more}")
    return str(tmp_path / "mine.toml")


def test_a_trace_is_replayed(tmp_path: Path) -> None:
    path = trace_fleet(tmp_path, "a,0,10\nb,5,8\na,20,30\na,9,12\n", "cycle_seconds = 40")
    fleet = load_fleet(path, 3, 1)  # the third device is a again
    assert fleet.initially_present().tolist() == [True, False, True]
    assert fleet.initial_changes().tolist() == [12.0, 5.0, 12.0]
    for cycle in (0.0, 40.0, 4000.0):
        times = np.array([11.0, 12.0, 19.0, 20.0, 29.0, 30.0, 39.0]) + cycle
        assert [fleet.present(2, at) for at in times] == [True, False, False, True, True, False, False]
        assert [fleet.present(1, at + cycle) for at in (4.0, 5.0, 8.0)] == [False, True, False]
        assert fleet.next_change(0, 35.0 + cycle) == 40.0 + cycle
    end = fleet.draw(0, 1, 1.0, 1e6, 0, 0)
    assert (end.outcome, end.reason, end.at) == ("left", "session", 12.0)


@pytest.mark.parametrize(
    ("rows", "more", "said"),
    [
        ("a,5,5\n", "", r"trace\.csv:2: start is 5, end 5; allowed: 0 <= start < end"),
        ("a,0,1\nb,-1,5\n", "", r"trace\.csv:3: start is -1"),
        ("a,0,inf\n", "", r"trace\.csv:2: start is 0, end inf"),
        ("a,0\n", "", r"trace\.csv:2: has too few values"),
        ("", "", r"trace\.csv: has no sessions"),
        ("a,0,50\n", "cycle_seconds = 40", r"last session ends at 50 s, after availability\.cycle_seconds = 40"),
    ],
)
def test_traces_that_are_refused(tmp_path: Path, rows: str, more: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_fleet(trace_fleet(tmp_path, rows, more), 3, 1)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 60), min_size=2, max_size=10, unique=True).map(sorted),
    st.integers(60, 80),
    st.lists(st.floats(0, 1000), max_size=20),
)
def test_a_trace_says_of_any_time_what_its_file_says(marks: list[int], cycle: int, times: list[float]) -> None:
    sessions = [(float(start), float(end)) for start, end in zip(marks[::2], marks[1::2], strict=False)]
    trace = Trace([sessions], 1, float(cycle))
    for at in [*times, *(float(n) for n in range(3 * cycle))]:
        present, until = trace.at(0, at)
        assert present == any(start <= at % cycle < end for start, end in sessions)
        if math.isinf(until):
            assert sessions == [(0.0, float(cycle))]
        else:
            assert until > at and trace.at(0, until)[0] != present
            middle = (at + until) / 2  # rounded, it may be `until`
            assert middle == until or trace.at(0, middle) == (present, until)
