"""The report of a comparison: complete, equal to the tables, self-contained, valid, and the same for the same files."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedpace.errors import ConfigError
from fedpace.simulations.comparison.report import write_report
from fedpace.simulations.comparison.report.charts import spread
from fedpace.simulations.comparison.report.curves import accuracy_curve
from fedpace.simulations.comparison.report.files import read_scenes
from fedpace.simulations.comparison.report.observed import jain, lorenz, observe
from fedpace.simulations.comparison.tables import write_tables
from tests.simulations.comparison.comparison_files import SHAPES, Comparison, Shape, write_comparison

VOID = {"meta", "link", "input", "br", "img", "hr"}
FULL = Comparison(
    fleets=("flash", "uniform"),
    shapes={**SHAPES, "Oort": Shape(0.83, 1500), "FedAsync <1>": Shape(0.79, 1100, staleness=30)},
    broken={
        ("Oort", 101): ("failed", "RunError: <no update> came within 3600 s"),
        ("FedBuff", 102): ("diverged", "NaN"),
    },
    late=("FedAsync <1>",),
)


class Page(HTMLParser):
    """The parts of a page, read strictly: every element is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: Counter[str] = Counter()
        self.references: list[str] = []
        self.loads: list[str] = []
        self.tags: Counter[str] = Counter()
        self.headings: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        assert len(found) == len(attrs), f"an attribute twice: {attrs}"
        self.tags[tag] += 1
        if "id" in found:
            self.ids[found["id"]] += 1
        for value in found.values():
            self.references += re.findall(r"url\(#([^)]+)\)", value)
        if found.get("href", "").startswith("#"):
            self.references.append(found["href"][1:])
        elif "href" in found or "src" in found:
            self.loads.append(found.get("href", found.get("src", "")))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        if tag in ("h1", "h2", "h3", "h4"):
            self.headings.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open) and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip() + " " if self.open[-1] in ("b", "small") else data.strip()
        if self.open and self.open[-1] in ("h1", "h2", "h3", "h4"):
            self.headings[-1] += data.strip()


def report(directory: Path, made: Comparison, baseline: str = "FedAvg") -> tuple[str, Page]:
    """The text and the parts of the report of a made-up comparison."""
    write_comparison(directory, made)
    write_tables(directory, baseline)
    text = write_report(directory).read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("full")


@pytest.fixture(scope="module")
def full(folder: Path) -> tuple[str, Page]:
    return report(folder, FULL)


def test_every_section_is_there(full: tuple[str, Page]) -> None:
    text, page = full
    expected = {"Summary", "Accuracy", "Who worked how much", "Weights by device speed", "What became of the updates"}
    expected |= {"100 devices at work", "Tuning", "Runs that failed", "Settings", "How to read this"}
    expected |= {"digits on flash", "digits on uniform", "Over virtual time", "Over bytes", "Over device time"}
    expected |= {"On slow devices' data, over virtual time", "Times sooner at the target than FedAvg"}
    assert expected <= set(page.headings)
    entries = 6  # five strategies, one of them untuned too
    assert text.count('class="chart"') == 2 * (4 + 1 + 1 + 1 + 1 + entries) + 2
    assert "Paced (untuned)" in text


def test_it_is_valid_and_needs_nothing_else(full: tuple[str, Page]) -> None:
    text, page = full
    assert text.startswith("<!DOCTYPE html>")
    assert [name for name, count in page.ids.items() if count > 1] == []
    assert set(page.references) <= set(page.ids)
    assert set(page.loads) == {"data:,"}  # an icon that is none, so that no browser asks for one
    assert not re.search(r"https?:|//[a-z]|@import|@font-face", text)
    assert not page.tags.keys() & {"script", "iframe", "object", "embed", "img", "image"}


def test_every_colour_follows_the_scheme(full: tuple[str, Page]) -> None:
    text, _ = full
    charts = re.findall(r'<svg[^>]*class="chart".*?</svg>', text, re.DOTALL)
    assert not [colour for chart in charts for colour in re.findall(r"#[0-9a-f]{6}", chart)]
    used, defined = set(re.findall(r"var\((--\w+)\)", text)), set(re.findall(r"(--\w+):", text))
    assert used <= defined
    light, dark = text.split("prefers-color-scheme: dark")[:2]
    assert set(re.findall(r"(--\w+):", light)) == set(re.findall(r"(--\w+):", dark.split("</style>")[0]))


def test_the_numbers_are_those_of_the_tables(folder: Path, full: tuple[str, Page]) -> None:
    _, page = full
    with (folder / "summary.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["app"] == "digits"]
    assert len(rows) == 12
    shown = [row for row in page.rows if len(row) == 8 and " of " in row[1]]
    assert len(shown) == len(rows)
    of_fleet = dict(zip(FULL.fleets, (shown[:6], shown[6:]), strict=True))
    for row in rows:
        label = row["strategy"] + " (untuned)" * (row["strategy"] == "Paced" and row["tuned"] == "False")
        [found] = [cells for cells in of_fleet[row["fleet"]] if cells[0] == label]
        assert found[1] == f"{row['reached']} of {row['runs']}"
        assert found[6].startswith(f"{float(row['final_accuracy']):.1%}" if row["final_accuracy"] else "–")
        ratio = float(re.sub("[^0-9.]", "", found[3].split("×")[0]))
        assert ratio == pytest.approx(float(row["speedup"]), rel=6e-3)
        assert {"≥": "at least", "≤": "at most", "≈": "unclear"}.get(found[3][0], "") == row["speedup_bound"]
        low, high = (float(end) for end in found[3].split("×")[1].split("–"))
        assert (low, high) == pytest.approx((float(row["speedup_low"]), float(row["speedup_high"])), rel=6e-3)


def test_a_run_that_never_arrived_or_failed_is_told(full: tuple[str, Page]) -> None:
    text, page = full
    assert "Never there: FedAsync &lt;1&gt;" in text
    assert "4 of 36 runs did not complete." in text
    failed = [row for row in page.rows if "RunError: <no update> came within 3600 s" in row]
    assert [row[:4] for row in failed] == [[f"digits on {fleet}", "Oort", "101", "failed"] for fleet in FULL.fleets]
    assert any(row[1:4] == ["FedBuff", "102", "diverged"] and row[5] == "NaN" for row in page.rows)


def test_what_was_tuned_is_there(full: tuple[str, Page]) -> None:
    _, page = full
    trials = [row for row in page.rows if len(row) == 5 and row[-1] == "0, 1"]
    assert len(trials) == 5 * 2 * FULL.trials
    assert all("server_lr = 0." in row[3] for row in trials)
    assert len([row for row in page.rows if len(row) == 4 and row[1] == str(FULL.trials)]) == 5 * 2


def test_the_same_files_give_the_same_bytes(folder: Path, full: tuple[str, Page]) -> None:
    assert write_report(folder).read_text(encoding="utf-8") == full[0]


def test_what_the_scenario_says_of_itself_is_there(tmp_path: Path) -> None:
    (tmp_path / "scenario.json").write_text(json.dumps({"description": "Digits <uneven>"}))
    text, _ = report(tmp_path, FULL)
    assert "<p>Digits &lt;uneven&gt;</p>" in text


def test_it_stays_small(full: tuple[str, Page]) -> None:
    assert len(full[0]) < 1_200_000


ONE = Comparison(shapes={"Paced": SHAPES["Paced"]}, untuned=(), seeds=(100,))


def cases() -> Iterator[tuple[str, Comparison, str, str]]:
    """Name, comparison, a text that its report has, and one that it has not."""
    yield "one strategy, one seed", ONE, "Paced is the first at 80%", "Times sooner at the target than Paced, digits"
    yield "nothing of slow devices", dataclasses.replace(ONE, slow=False), "Over device time", "Final accuracy on slow"
    yield "nobody arrives", dataclasses.replace(ONE, late=("Paced",)), "No strategy reached 80%", "is the first at"
    yield "nothing tuned", dataclasses.replace(ONE, trials=0), "Nothing was tuned", "Trials"
    failed = dataclasses.replace(ONE, broken={("Paced", 100): ("failed", "died")})
    yield "all failed", failed, "1 of 1 runs did not complete", "Lorenz"
    diverged = dataclasses.replace(ONE, broken={("Paced", 100): ("diverged", "NaN")})
    yield "all diverged", diverged, "a run that diverged", "Lorenz"


@pytest.mark.parametrize(("made", "there", "absent"), [case[1:] for case in cases()], ids=[case[0] for case in cases()])
def test_what_there_is_little_of(tmp_path: Path, made: Comparison, there: str, absent: str) -> None:
    text, page = report(tmp_path, made, "Paced")
    assert there in text
    assert absent not in text
    assert max(page.ids.values()) == 1


def test_more_strategies_than_hues_have_other_dashes(tmp_path: Path) -> None:
    shapes = {f"S{number}": SHAPES["FedBuff"] for number in range(10)}
    text, _ = report(tmp_path, Comparison(shapes=shapes, untuned=(), seeds=(1,), versions=3), "S0")
    legend = re.findall(r'<path d="M1 4H25" style="(stroke: [^"]*)"', text.split("</fieldset>")[0])
    assert len(set(legend)) == len(legend) == 10


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"runs\.parquet is missing"):
        write_report(tmp_path)
    write_comparison(tmp_path, ONE)
    with pytest.raises(ConfigError, match=r"summary\.csv is missing"):
        write_report(tmp_path)
    schema = pq.read_schema(tmp_path / "runs.parquet")
    pq.write_table(pa.Table.from_pylist([], schema), tmp_path / "runs.parquet")
    with pytest.raises(ConfigError, match="holds no run"):
        write_report(tmp_path)


# ------------------------------------------------------------ what charts are drawn of


def test_a_curve_holds_the_last_evaluation_and_lies_within_its_interval(tmp_path: Path) -> None:
    write_comparison(tmp_path, Comparison(shapes={"Paced": SHAPES["Paced"]}, untuned=(), seeds=(1, 2, 3), versions=4))
    [entry] = read_scenes(tmp_path)[0].entries
    curve = accuracy_curve(entry.runs, "virtual_seconds", "accuracy")
    assert curve is not None
    finals = np.array([run.evaluations["accuracy"] for run in entry.runs])
    assert curve.x[-1] == entry.runs[0].evaluations["virtual_seconds"][-1]
    assert curve.mean[-1] == pytest.approx(finals[:, -1].mean())
    assert curve.mean[-2] == pytest.approx(finals[:, -2].mean())  # the last version came at the very end
    assert (finals[:, -1].min() <= curve.low[-1] < curve.mean[-1]) and (curve.mean[-1] < curve.high[-1])
    assert curve.high[-1] <= finals[:, -1].max()
    alone = accuracy_curve(entry.runs[:1], "bytes", "accuracy")
    assert alone is not None
    assert (alone.low == alone.mean).all() and (alone.high == alone.mean).all()


def test_jain_and_lorenz() -> None:
    assert jain(np.array([3.0, 3.0, 3.0])) == pytest.approx(1)
    assert jain(np.array([9.0, 0.0, 0.0])) == pytest.approx(1 / 3)
    devices, tasks = lorenz(np.array([6.0, 0.0, 2.0]))
    assert devices.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert tasks.tolist() == pytest.approx([0, 0, 0.25, 1])


def test_weights_by_speed_keep_a_speed_that_many_share_in_one_bin(tmp_path: Path) -> None:
    write_comparison(tmp_path, ONE)
    [details] = read_scenes(tmp_path)[0].entries[0].read_details()
    speed = np.repeat([1.0, 4.0], [60, 40])  # of a hundred devices
    of_update = np.repeat([1.0, 4.0], [30, 60])
    weights = np.repeat([2.0, 0.5], [30, 60])
    changed = dataclasses.replace(details, speed=speed, weight_speed=of_update, weights=weights)
    found = observe([changed]).weights
    assert found is not None
    assert found.percentile.tolist() == pytest.approx([30, 80])
    assert found.each.tolist() == pytest.approx([2, 0.5])
    assert found.influence.tolist() == pytest.approx([(60 / 90) / 0.6, (30 / 90) / 0.4])


def test_labels_are_moved_apart_and_no_further() -> None:
    places = spread(np.array([0.1, 0.5, 0.51, 0.9]), 0.1, 0.0, 1.0)
    assert places.tolist() == pytest.approx([0.1, 0.455, 0.555, 0.9])
    crowded = spread(np.full(4, 0.99), 0.1, 0.0, 1.0)
    assert crowded.tolist() == pytest.approx([0.7, 0.8, 0.9, 1.0])
