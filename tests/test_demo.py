"""What the demo decides before it starts anything; that it runs is seen by running it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
from flwr.serverapp import strategy as flower_strategies
from typer.testing import CliRunner

from fedpace.cli import app
from fedpace.demo import check_strategy, demo_app, length_of
from fedpace.errors import ConfigError
from fedpace.strategies import PRESETS


@pytest.mark.parametrize(
    ("strategy", "devices", "length"),
    [
        ("FedAvg", 8, (25, "round")),
        ("flwr:FedMedian", 8, (25, "round")),
        ("Oort", 3, (25, "round")),
        ("FedAsync", 8, (200, "version")),
        ("FedBuff", 8, (20, "version")),
        ("Paced", 8, (50, "version")),
        ("Paced", 2, (12, "version")),
        ("Compass", 8, (50, "version")),
    ],
)
def test_a_strategy_without_rounds_folds_about_as_many_updates(
    strategy: str, devices: int, length: tuple[int, str]
) -> None:
    assert length_of(strategy, 25, devices) == length


def test_what_is_accepted_is_what_the_app_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def accepts(check: Callable[[str], Any], error: type[Exception], name: str) -> bool:
        try:
            check(name)
        except error:
            return False
        return True

    monkeypatch.syspath_prepend(demo_app().directory)
    strategy_class = importlib.import_module("digits.server_app").strategy_class
    names = [*PRESETS, *(f"flwr:{name}" for name in flower_strategies.__all__)]
    accepted = [name for name in names if accepts(check_strategy, ConfigError, name)]
    assert accepted == [name for name in names if accepts(strategy_class, ValueError, name)]
    assert {*PRESETS, "flwr:FedMedian", demo_app().config["strategy"]} <= set(accepted) < set(names)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_length(name: str) -> None:
    length, unit = length_of(name, 1, 2)
    assert length >= 1 and unit == ("round" if PRESETS[name]().composition.gate.rounds else "version")


@pytest.mark.parametrize("name", ["fedavg", "", "flwr:", "flwr:Nope", "flwr:Paced", "Paced "])
def test_other_names_are_refused_with_the_list(name: str) -> None:
    with pytest.raises(ConfigError, match=r"none of FedAvg, .*Paced, nor one of Flower's"):
        check_strategy(name)
    found = CliRunner().invoke(app, ["demo", "--strategy", name])
    assert isinstance(found.exception, ConfigError)
