"""Fixtures that tests of several rooms share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.fleets import PuppetFleet

StartFleet = Callable[..., PuppetFleet]


@pytest.fixture
def start_fleet(tmp_path: Path) -> Iterator[StartFleet]:
    """Starts servers on strings, with the settings of `PuppetFleet`; none outlives the test."""
    with ExitStack() as stack:

        def start(name: str = "fleet", **settings: dict[str, float]) -> PuppetFleet:
            return stack.enter_context(PuppetFleet(tmp_path / name, **settings)).start()

        yield start
