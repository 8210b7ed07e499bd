"""What the README shows, run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fedpace.strategies.strategy import PacedStrategy
from tests.inline_grid import InlineGrid
from tests.strategies.test_strategy import initial, least_squares

README = Path(__file__).parents[1] / "README.md"


def test_parts_of_ones_own_take_ten_lines() -> None:
    [code] = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 10
    shown: dict[str, Any] = {}
    exec(code, shown)  # noqa: S102
    assert isinstance(shown["strategy"], PacedStrategy)
    result = shown["strategy"].start(InlineGrid(least_squares(), 4), initial(), num_rounds=3)
    assert result.arrays["weight"].numpy().any()
