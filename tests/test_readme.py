"""What the README and the page on strategies show, run as it stands there."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from flwr.clientapp import ClientApp

from fedpace.strategies import PRESETS, compensators, folders, gates, optimisers, planners, selectors, weighers
from fedpace.strategies.strategy import PacedStrategy
from tests.inline_grid import InlineGrid
from tests.strategies.test_strategy import initial, least_squares

README = Path(__file__).parents[1] / "README.md"
STRATEGIES = README.parent / "docs" / "strategies.md"


def test_parts_of_ones_own_take_ten_lines() -> None:
    code, mods = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 10
    shown: dict[str, Any] = {}
    exec(code, shown)  # noqa: S102
    assert isinstance(shown["strategy"], PacedStrategy)
    result = shown["strategy"].start(InlineGrid(least_squares(), 4), initial(), num_rounds=3)
    assert result.arrays["weight"].numpy().any()
    exec(mods, shown)  # noqa: S102
    assert isinstance(shown["app"], ClientApp)


def test_what_the_page_on_strategies_shows_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown: dict[str, Any] = {"__name__": __name__, "grid": InlineGrid(least_squares(), 4), "arrays": initial()}
    blocks = re.findall(r"```python\n(.*?)```", STRATEGIES.read_text(encoding="utf-8"), re.DOTALL)
    for number, code in enumerate(blocks, 1):
        exec(compile(code, f"{STRATEGIES.name}, block {number}", "exec"), shown)  # noqa: S102
        if "strategy" in shown:
            result = shown.pop("strategy").start(shown["grid"], initial(), num_rounds=3)
            assert result.arrays["weight"].numpy().any()
    assert "fold" in shown["story"](shown["entries"], 1)[-1]


def signature(name: str, parameters: dict[str, Any]) -> str:
    """As in NAME(a, b=1)."""
    told = [
        key if value in (inspect.Parameter.empty, dataclasses.MISSING) else f"{key}={value!r}"
        for key, value in parameters.items()
    ]
    return f"`{name}({', '.join(told)})`"


def test_the_page_on_strategies_names_every_part_and_preset_with_its_defaults() -> None:
    told = STRATEGIES.read_text(encoding="utf-8")
    parts = {
        part
        for module in (selectors, planners, gates, weighers, compensators, folders, optimisers)
        for part in vars(module).values()
        if isinstance(part, type)
        and dataclasses.is_dataclass(part)
        and str(part.__module__).startswith(module.__name__)
    }
    assert len(parts) > 30
    for part in parts:
        fields = {field.name: field.default for field in dataclasses.fields(part) if field.init}
        assert signature(part.__name__, fields) in told
    for name, preset in PRESETS.items():
        found = inspect.signature(preset).parameters.values()
        assert signature(name, {p.name: p.default for p in found if p.kind != p.VAR_KEYWORD}) in told
