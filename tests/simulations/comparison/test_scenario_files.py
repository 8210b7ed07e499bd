"""Scenarios from files: what is taken, and what is refused before anything runs."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from fedpace.errors import ConfigError
from fedpace.simulations.comparison.plan import spec_of
from fedpace.simulations.comparison.reading import read_scenario
from fedpace.simulations.comparison.scenario import App, Dimension, Fleet, Quick, Scenario, Strategy, Tuning
from fedpace.simulations.comparison.tuning import read_tuned
from tests.simulations.comparison.scenarios import CONTEST, FEDBUFF, scenario_text, write_scenario

DOCS = Path(__file__).resolve().parents[3] / "docs" / "comparison.md"

WRITTEN_OUT = """
[[strategies]]
name = "mine"
[strategies.settings]
train_nodes = 5
gate = { part = "Arrivals", k = 4 }
weighers = ["Samples", { part = "Absolute", weigher = { part = "Polynomial", a = 0.5 } }]
[strategies.search]
gate.k = [2, 4]
weighers.1.weigher.a = { low = 0.1, high = 1.0 }
config.lr = { low = 0.01, high = 0.5, log = true }
"""
TUNING = "\n[tuning]\nseeds = [7]\ntrials = 2\n"


def read(folder: Path, text: str) -> Scenario:
    return read_scenario(write_scenario(folder, text))


def test_what_a_scenario_says(tmp_path: Path) -> None:
    scenario = read(tmp_path, scenario_text(WRITTEN_OUT, before="[settings]\nconfig = { lr = 0.1 }") + TUNING)
    assert scenario.seeds == (1, 2) and scenario.baseline == "FedAvg" and scenario.evaluations == 20
    fleet, app, mine = scenario.fleets[0], scenario.apps[0], scenario.strategies[1]
    assert fleet.fleet == str(tmp_path / "uneven.toml") and app.folder == str(CONTEST)
    assert mine.preset == "FedAvg", "what a composition does not name is FedAvg's"
    assert scenario.space_of(mine) == {
        "gate.k": Dimension(("gate", "k"), (2, 4)),
        "weighers.1.weigher.a": Dimension(("weighers", "1", "weigher", "a"), low=0.1, high=1.0),
        "config.lr": Dimension(("config", "lr"), low=0.01, high=0.5, log=True),
    }
    spec = spec_of(scenario, app, fleet, mine, 1, {"gate.k": 2, "weighers.1.weigher.a": 0.9, "config.lr": 0.2})
    assert spec.settings["gate"] == {"part": "Arrivals", "k": 2}
    assert spec.settings["weighers"][1]["weigher"] == {"part": "Polynomial", "a": 0.9}
    assert spec.settings["config"] == {"lr": 0.2} and spec.tuned
    untuned = spec_of(scenario, app, fleet, mine, 1)
    assert untuned.settings["gate"]["k"] == 4 and untuned.settings["config"] == {"lr": 0.1} and not untuned.tuned


def test_numbers_on_one_fleet(tmp_path: Path) -> None:
    text = scenario_text(FEDBUFF).replace("[[fleets]]", "on.uneven = { target = 0.6, versions = 9 }\n[[fleets]]", 1)
    scenario = read(tmp_path, f'{text}\n[[fleets]]\nname = "flash"\n')
    app = scenario.apps[0]
    assert (app.limits("uneven").target, app.limits("uneven").versions) == (0.6, 9)
    assert app.limits("flash").target == 0.7 and app.limits("uneven").virtual_seconds == 30.0


def test_quick_is_a_part_of_it(tmp_path: Path) -> None:
    text = scenario_text(FEDBUFF, seeds=range(1, 10)) + '\n[[fleets]]\nname = "flash"\n'
    scenario = read(tmp_path, f'{text}\n[quick]\nfleets = ["flash"]\n').shortened()
    assert [fleet.name for fleet in scenario.fleets] == ["flash"] and len(scenario.strategies) == 2
    assert scenario.seeds == (1, 2, 3, 4, 5)
    assert read(tmp_path, f"{text}\n[quick]\nseeds = [20]\n").shortened().seeds == (20,)


@pytest.mark.parametrize(
    ("wrong", "right", "said"),
    [
        ("seeds", "seads", "seads: unknown key; known here: description, seeds, "),
        ("seeds = [1, 2]", "", "seeds: a scenario needs a list of them"),
        ("seeds = [1, 2]", "seeds = [1, 1]", "seeds: entry 2: 1 is there twice"),
        ("seeds = [1, 2]", "seeds = [1, -2]", "seeds: entry 2 is -2; allowed: a whole number from 0 to"),
        ("seeds = [1, 2]", "seeds = []", "seeds: is empty; write a list of seeds"),
        ('baseline = "FedAvg"', 'baseline = "FedAvk"', "baseline: there is no strategy 'FedAvk'; there are FedAvg, F"),
        ('baseline = "FedAvg"', "", "baseline: a scenario needs it"),
        ("evaluations = 20", "evaluations = 0", "evaluations: is 0; allowed: a whole number from 1"),
        ("evaluations = 20", "settings = { seed = 1 }", "settings.seed: not in a comparison: the scenario's `seeds`"),
        ("evaluations = 20", "settings = { tempo = 1 }", "settings.tempo: FedAvg has no such setting; there are "),
        ("devices = 20", "devices = 0", "apps[1].devices: is 0; allowed: a whole number from 1"),
        ("devices = 20", "devises = 20", "apps[1].devises: unknown key; known here: name, folder, devices"),
        ("target = 0.7", "target = -1", "apps[1].target: is -1; allowed: a number, at least 0"),
        ("virtual_seconds = 30.0", "", "apps[1]: its runs have no end; write virtual_seconds, or versions"),
        ("virtual_seconds = 30.0", "virtual_seconds = 0", "apps[1].virtual_seconds: is 0; allowed: a number, more tha"),
        ("config = {}", "config = { speed = 3 }", "apps[1].config.speed: config: the app has no key 'speed'"),
        ("config = {}", "config = { server = [1] }", "apps[1].config.server: server is a list"),
        ("config = {}", "on.flash.target = 0.5", "apps[1].on.flash: there is no fleet of that name; there are uneven"),
        ("config = {}", "on.uneven.devices = 5", "apps[1].on.uneven.devices: unknown key; known here: virtual_seconds"),
        ("config = {}", "on.uneven.target = -5", "apps[1].on.uneven.target: is -5; allowed"),
        (f'folder = "{CONTEST}"', 'folder = "nowhere"', "apps[1].folder: "),
        (f'folder = "{CONTEST}"', "", 'apps[1]: has no folder; write folder = "..."'),
        ('name = "contest"', 'name = "../contest"', "apps[1].name: is '../contest'; write letters, digits"),
        ('fleet = "uneven.toml"', 'fleet = "flesh"', "fleets[1].fleet: there is no fleet 'flesh'; name cross-silo, "),
        ('fleet = "uneven.toml"', 'fleet = "gone.toml"', "fleets[1].fleet: "),
        ('fleet = "uneven.toml"', 'fleet = "wrong.toml"', "fleets[1].fleet: "),
        ('name = "uneven"', 'name = "uneven"\n[[fleets]]\nname = "uneven"', "fleets[2].name: 'uneven' is there twice"),
        ('name = "FedBuff"', 'name = "FedBluff"', "strategies[2].name: 'FedBluff' is no preset, and no part of it"),
        ('name = "FedBuff"', 'name = "FedBuff-untuned"', "strategies[2].name: is 'FedBuff-untuned'; write letters"),
        ('name = "FedBuff"', 'name = "b"\npreset = "Fed"', "strategies[2].preset: there is no preset 'Fed'; there "),
        ("k = 4", "k = 0", "strategies[2].settings.k: a gate of K arrivals: k is 0; choose 1 or more"),
        ("k = 4", 'k = "many"', "strategies[2].settings.k: "),
        ("k = 4", 'gate = "Arrival"', "strategies[2].settings.gate: there is no part 'Arrival'; there are Absolute, "),
        ("k = 4", 'gate = { k = 3 }', "strategies[2].settings.gate: write a part by name"),
        ("k = 4", 'gate = { part = "Arrivals", j = 3 }', "strategies[2].settings.gate: Arrivals has no 'j'; it has k"),
        ("k = 4", 'gate = "Samples"', "strategies[2].settings.gate: gate Samples has no 'sends'"),
        ("k = 4", 'planner = "Together"', "strategies[2]: planner Together cannot go with the other parts: "),
        ("k = 4", "directory = '/tmp'", "strategies[2].settings.directory: not in a comparison: the comparison keeps"),
        (", k = 4 }", "}\nsearch = { k = [0, 1] }", "strategies[2].search.k: cannot be 0: a gate of K arrivals: k is 0"),
        (", k = 4 }", "}\nsearch = { kk = [1] }", "strategies[2].search.kk: FedBuff has no such setting"),
        (", k = 4 }", "}\nsearch = { k = 3 }", "strategies[2].search.k: write a list of choices, or { low = ..., high"),
        (", k = 4 }", "}\nsearch.k = { low = 5, high = 2 }", "strategies[2].search.k: low is 5, high 2; low must be less"),
        (", k = 4 }", "}\nsearch.k = { low = 0, high = 2, log = true }", "strategies[2].search.k: log is for numbers ab"),
        (", k = 4 }", "}\nsearch.k = { low = 1, high = 2, by = 1 }", "strategies[2].search.k: unknown key 'by'; known "),
        (", k = 4 }", "}\nsearch.k = { low = 1, high = 9, step = 0 }", "strategies[2].search.k: step is 0; choose more t"),
        (", k = 4 }", "}\nsearch.gate.k = [1]", "strategies[2].search.gate.k: cannot be 1: write a part by name"),
        (", k = 4 }", "}\nsearch = { k = [1, 2] }", "strategies[2].search: FedBuff is to be tuned, on no seeds; write"),
        ("k = 4 }", "k = 4 }\n[tuning]\nseeds = [2, 3]", "seeds: seed 2 is one of those that strategies are tuned on"),
        ("k = 4 }", "k = 4 }\n[tuning]\nfleets = ['flash']", "tuning.fleets: there is no 'flash'; there are uneven"),
        ("k = 4 }", "k = 4 }\n[tuning]\nobjective = 'best'", "tuning.objective: is 'best'; allowed: seconds, accuracy"),
        ("k = 4 }", "k = 4 }\n[quick]\napps = ['digits']", "quick.apps: there is no 'digits'; there are contest"),
        ("k = 4 }", "k = 4 }\n[quick]\nstrategies = ['FedBuff']", "quick.strategies: leaves out the baseline, 'FedAvg'"),
        ("k = 4 }", "k = 4 }\n[tuning]\nseeds = [9]\n[quick]\nseeds = [9]", "quick.seeds: seed 9 is one of those that"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, wrong: str, right: str, said: str) -> None:
    good = scenario_text(FEDBUFF)
    read(tmp_path, good)
    assert wrong in good
    (tmp_path / "wrong.toml").write_text("[compute]\nmodle = 1\n")
    text = good.replace(wrong, right, 1)
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    told = str(caught.value)
    assert "\n" not in told
    found = re.match(rf"{re.escape(str(tmp_path / 'scenario.toml'))}(?::(\d+))?: (.*)", told)
    assert found is not None and found[2].startswith(said), told
    if found[1] is None:
        assert right == "", "what is nowhere has no line"
        return
    line, key = text.splitlines()[int(found[1]) - 1], said.split(":")[0].rpartition(".")[2].partition("[")[0]
    assert key in line or right.partition("\n")[0] in line, f"line {found[1]} is {line!r}"


def test_a_file_that_is_no_scenario(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.toml: cannot be read: No such file"):
        read_scenario(tmp_path / "gone.toml")
    with pytest.raises(ConfigError, match=r"scenario\.toml: Invalid value"):
        read(tmp_path, "seeds = [")


def test_the_scenario_on_the_page_is_one(tmp_path: Path) -> None:
    (tmp_path / "my-fleet.toml").write_text("")
    text = DOCS.read_text().split("```toml\n")[1].split("```")[0]
    assert "../examples" in text
    scenario = read(tmp_path, text.replace("../examples", str(DOCS.parents[1] / "examples")))
    assert [strategy.name for strategy in scenario.strategies] == ["FedAvg", "FedBuff", "my-buffer"]
    assert all(scenario.space_of(strategy) for strategy in scenario.strategies)


def test_every_key_is_explained() -> None:
    text = DOCS.read_text()
    for kind in (Scenario, App, Fleet, Strategy, Tuning, Quick):
        for field in dataclasses.fields(kind):
            if field.name not in ("apps", "fleets", "strategies", "tuning", "quick"):
                assert f"`{field.name}" in text, f"docs/comparison.md does not explain {kind.__name__}.{field.name}"


# ---------------------------------------------------------------- files of what was chosen

TUNED = """{"seeds": [7], "trials": [
  {"app": "contest", "fleet": "uneven", "strategy": "FedBuff", "trial": 0, "settings": {"k": 3}, "value": 9.0,
   "chosen": true}]}"""
SEARCHED = FEDBUFF.replace(", k = 4 }", "}\nsearch = { k = [3, 4] }") + TUNING


def tuned(folder: Path, text: str, scenario: str = SEARCHED) -> str:
    """What is said of a file that does not fit; empty where it does."""
    path = folder / "tuned.json"
    path.write_text(text)
    try:
        read_tuned(path, read(folder, scenario_text(scenario)))
    except ConfigError as error:
        return str(error).replace(str(path), "FILE")
    return ""


def test_a_file_of_what_was_chosen(tmp_path: Path) -> None:
    assert tuned(tmp_path, TUNED) == ""
    assert tuned(tmp_path, TUNED.replace("[7]", "[2]")) == (
        "--tuned: FILE was searched on seed 2, which is one of the scenario's own"
    )
    assert "says nothing of app contest, fleet uneven, strategy FedBuff" in tuned(
        tmp_path, TUNED.replace("FedBuff", "FedFluff")
    )
    assert "it chose j, the scenario searches k" in tuned(tmp_path, TUNED.replace('"k"', '"j"'))
    assert "k is 0; choose 1 or more" in tuned(tmp_path, TUNED.replace('"k": 3', '"k": 0'))
    assert "no file that a comparison wrote" in tuned(tmp_path, "{}")
    assert "no file that a comparison wrote" in tuned(tmp_path, "[")


def test_what_was_found_on_one_fleet_is_for_others(tmp_path: Path) -> None:
    fleets = '\n[[fleets]]\nname = "flash"\n'
    assert "fleet flash" in tuned(tmp_path, TUNED, SEARCHED + fleets)
    assert tuned(tmp_path, TUNED, SEARCHED.replace("trials = 2", 'fleets = ["uneven"]') + fleets) == ""
