"""`report.html`: what a comparison found, as one page that needs nothing else."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedpace.hosting.files import write_atomically
from fedpace.simulations.comparison.report import charts, palette
from fedpace.simulations.comparison.report.files import Entry, Run, Scene, read_description, read_scenes, read_table
from fedpace.simulations.comparison.report.sections import rows_of, scene_section
from fedpace.simulations.comparison.report.standings import Standings
from fedpace.simulations.comparison.report.units import amount, digits
from fedpace.simulations.comparison.statistics import Row
from fedpace.simulations.tomlfile import LARGE

NAME = "report.html"


def write_report(directory: Path) -> Path:
    """Writes `report.html` beside the tables of a comparison, from them, its scenario's description and the runs' details.

    The same files give the same bytes. Returns its path. Raises ConfigError where a table is missing or holds no run.
    """
    scenes = read_scenes(directory)
    entries = list({entry.style: entry for scene in scenes for entry in scene.entries}.values())
    entries.sort(key=lambda entry: (palette.place(entry.style), entry.style))
    standings = Standings(directory)
    reference = standings.reference
    sections = [scene_section(scene, f"scene{n}", standings.of(scene), reference) for n, scene in enumerate(scenes)]
    environment = _environment()
    html = environment.get_template("report.html").render(
        css=environment.get_template("report.css").render(
            light=_variables(palette.LIGHT), dark=_variables(palette.DARK)
        ),
        apps=list(dict.fromkeys(scene.app for scene in scenes)),
        description=read_description(directory),
        facts=_facts(scenes, entries),
        finding=_finding(sections),
        entries=entries,
        reference=reference,
        scenes=sections,
        together=_together(scenes, standings, entries),
        slow=any(scene.has_slow for scene in scenes),
        tuning=list(_tuning(read_table(directory, "trials"), entries)),
        failures=list(_failures(scenes)),
        limits=list(_limits(scenes, sections)),
        settings=list(_settings(scenes)),
        runs=sum(len(entry.runs) for scene in scenes for entry in scene.entries),
    )
    path = directory / NAME
    write_atomically(path, html.encode())
    return path


def _environment() -> Environment:
    loader = PackageLoader("fedpace.simulations.comparison.report", "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"dash": palette.css_dashes, "css_outcome": palette.css_outcome}
    environment.filters["css"] = lambda style: palette.css_colour(palette.colour(style))
    return environment


def _variables(colours: Sequence[str]) -> str:
    return "".join(f"--c{place}: {colour}; " for place, colour in enumerate(colours)).rstrip()


def _together(scenes: Sequence[Scene], standings: Standings, entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """A row a fleet of what all apps say together; nothing where there is one app."""
    if len({scene.app for scene in scenes}) == 1:
        return []
    fleets = list(dict.fromkeys(scene.fleet for scene in scenes))
    return [
        {"title": f"all apps on {fleet}", "rows": rows_of(standings.of_all_apps(fleet, entries))} for fleet in fleets
    ]


def _facts(scenes: Sequence[Scene], entries: Sequence[Entry]) -> str:
    """How much there is of what, in one line."""
    seeds = {run.row["seed"] for scene in scenes for entry in scene.entries for run in entry.runs}
    counts = {
        "app": len({scene.app for scene in scenes}),
        "fleet": len({scene.fleet for scene in scenes}),
        "strategy": len({entry.strategy for entry in entries}),
        "seed": len(seeds),
        "run": sum(len(entry.runs) for scene in scenes for entry in scene.entries),
    }
    plurals = {"strategy": "strategies"}
    return " · ".join(f"{n:,} {name if n == 1 else plurals.get(name, name + 's')}" for name, n in counts.items())


def _finding(sections: Sequence[dict[str, Any]]) -> str:
    """Who is best on how many combinations of app and fleet; of one alone, what it says itself."""
    if len(sections) == 1:
        return str(sections[0]["finding"])
    told = []
    for column, what in (("time", "soonest at the target"), ("final", "most accurate at the end")):
        best = Counter(row["entry"].label for section in sections for row in section["rows"] if row[column].best)
        told.append(f"{what}: {', '.join(f'{label} {count}×' for label, count in best.most_common()) or 'none'}")
    return f"Of {len(sections)} combinations of app and fleet, {'; '.join(told)}."


def _tuning(trials: Sequence[Row], entries: Sequence[Entry]) -> Iterator[dict[str, Any]]:
    """A part an app and fleet: a chart of the trials' values, what was chosen, and all that was tried."""
    of_strategy = {entry.strategy: entry for entry in entries if entry.tuned}
    shown = [row for row in trials if row["strategy"] in of_strategy]
    shown.sort(key=lambda row: (row["app"], row["fleet"], row["strategy"].casefold(), row["trial"]))
    for part, ((app, fleet), found) in enumerate(groupby(shown, key=lambda row: (row["app"], row["fleet"]))):
        rows = list(found)
        grouped = [(of_strategy[name], list(group)) for name, group in groupby(rows, key=lambda row: row["strategy"])]
        values = [(entry, [(row["value"], row["chosen"]) for row in group]) for entry, group in grouped]
        told = [_trial(row, of_strategy[row["strategy"]]) for row in rows]
        count = Counter(row["strategy"] for row in rows)
        yield {
            "title": f"{app} on {fleet}",
            "chart": charts.trials(values, f"trials{part}"),
            "chosen": [trial | {"trials": count[trial["strategy"]]} for trial in told if trial["chosen"]],
            "tried": told,
        }


def _trial(row: Row, entry: Entry) -> dict[str, Any]:
    value = "–" if row["value"] is None else digits(row["value"])
    seeds = ", ".join(map(str, row["seeds"]))
    return {**row, "entry": entry, "value": value, "settings": _told(row["settings"]), "seeds": seeds}


def _failures(scenes: Sequence[Scene]) -> Iterator[dict[str, Any]]:
    for scene in scenes:
        for entry in scene.entries:
            for run in entry.runs:
                if not run.completed:
                    after = amount("virtual_seconds", run.row["virtual_seconds"])
                    yield {**run.row, "scene": scene.title, "entry": entry, "after": after}


def _limits(scenes: Sequence[Scene], sections: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of each scene its target, when its runs end, and their seeds."""
    for scene, section in zip(scenes, sections, strict=True):
        runs = [run.row for entry in scene.entries for run in entry.runs]
        limit = min(row["limit_seconds"] for row in runs)
        yield {
            "title": scene.title,
            "target": section["target"],
            "limit": amount("virtual_seconds", limit) if limit < LARGE else "none",
            "longest": amount("virtual_seconds", max(row["virtual_seconds"] for row in runs)),
            "versions": f"{max(_versions(run) for entry in scene.entries for run in entry.runs):,}",
            "seeds": ", ".join(str(seed) for seed in sorted({row["seed"] for row in runs})),
        }


def _versions(run: Run) -> int:
    return int(run.evaluations["version"].max(initial=0))


def _settings(scenes: Sequence[Scene]) -> Iterator[dict[str, Any]]:
    """A row for all scenes in which an entry has the same settings."""
    found: dict[tuple[str, str, str], list[tuple[Scene, Entry]]] = {}
    for scene in scenes:
        for entry in scene.entries:
            for settings in dict.fromkeys(_told(run.row["settings"]) for run in entry.runs):
                found.setdefault((entry.label, entry.style, settings), []).append((scene, entry))
    for (_, _, settings), places in sorted(found.items(), key=lambda item: item[0][0].casefold()):
        titles = [scene.title for scene, _ in places]
        where = "everywhere" if len(titles) == len(scenes) else ", ".join(titles)
        yield {"entry": places[0][1], "settings": settings, "where": where}


def _told(settings: str) -> str:
    """Settings, written as JSON, as `key = value` pairs; numbers with four digits."""
    found = json.loads(settings, parse_float=lambda text: float(f"{float(text):.4g}"))
    return ", ".join(f"{key} = {json.dumps(value)}" for key, value in sorted(found.items())) or "its own defaults"
