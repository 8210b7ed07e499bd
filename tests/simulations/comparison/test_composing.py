"""Strategies written out in a scenario."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fedpace.errors import ConfigError
from fedpace.simulations.comparison.composing import PARTS, check_setting, defaults_of, make_strategy
from fedpace.strategies import PRESETS, FedBuff
from fedpace.strategies.gates import Arrivals
from fedpace.strategies.planners import Together
from fedpace.strategies.weighers import Absolute, Polynomial, Samples

DOCS = Path(__file__).resolve().parents[3] / "docs" / "strategies.md"


def test_every_part_has_its_name() -> None:
    table = DOCS.read_text().split("## Parts")[1].split("\n## ")[0]
    documented = set(re.findall(r"^\| `(\w+)\(", table, re.MULTILINE))
    assert documented >= {"Uniform", "Arrivals", "ErrorWeight", "Yogi"}
    assert documented <= PARTS.keys()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_what_they_are(preset: str) -> None:
    written, own = make_strategy(preset, {}).composition, PRESETS[preset](fraction_evaluate=0.0).composition
    assert written.parts() == own.parts() and written.fraction_evaluate == 0.0
    assert repr(written) == repr(own)


def test_parts_by_name() -> None:
    weighers = ["Samples", {"part": "Absolute", "weigher": {"part": "Polynomial", "a": 0.3}}]
    made = make_strategy("FedAvg", {"gate": {"part": "Arrivals", "k": 3}, "weighers": weighers, "train_nodes": 7})
    assert made.composition.gate == Arrivals(3) and made.composition.devices == 7
    assert made.composition.weighers == (Samples(), Absolute(Polynomial(0.3)))
    short = make_strategy("FedAvg", {"weighers": [{"part": "Absolute", "weigher": "Polynomial"}]})
    assert short.composition.weighers == (Absolute(Polynomial()),)
    together = {"part": "Together", "q_min": 2, "q_max": 9}
    both = make_strategy("FedAvg", {"planner": together, "gate": together})
    assert (both.composition.planner, both.composition.gate) == (Together(2, 9), Together(2, 9))
    assert make_strategy("FedBuff", {"config": {"lr": 0.5}}).config == {"lr": 0.5}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"gate": {"part": "Arrivals", "k": "x"}}, "Arrivals: '<' not supported"),
        ({"gate": {"part": "Arrivals", "k": 0}}, "k is 0; choose 1 or more"),
        ({"gate": {"part": "Arrival"}}, "there is no part 'Arrival'"),
        ({"gate": 3}, "write a part by name"),
        ({"weighers": [{"part": "Absolute"}]}, "Absolute: .* missing 1 required positional argument: 'weigher'"),
        ({"selector": {"part": "Uniform", "seed": 1}}, "Uniform has no 'seed'; it has nothing to set"),
        ({"train_nodes": 0}, "devices is 0"),
        ({"fraction_train": "all"}, "could not convert string to float"),
    ],
)
def test_what_cannot_be_made(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_strategy("FedAvg", settings)


def test_settings_that_are_not_the_scenarios() -> None:
    check_setting("FedBuff", "k")
    check_setting("FedBuff", "max_staleness")
    with pytest.raises(ConfigError, match="FedAvg has no such setting; there are fraction_train, "):
        check_setting("FedAvg", "k")
    for key in ("seed", "evaluate_every", "directory", "validation_fn"):
        with pytest.raises(ConfigError, match="not in a comparison"):
            check_setting("FedBuff", key)
    assert defaults_of("FedBuff") == {"k": 10, "server_lr": 1.0, "a": 0.5}
    assert FedBuff(**defaults_of("FedBuff")).composition == FedBuff().composition
