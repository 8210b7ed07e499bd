"""Fixtures that tests of simulations share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from fedpace.simulations.grid import VirtualGrid
from fedpace.simulations.work import Executor
from tests.simulations.grids import EVEN, Counter, GridOf, make_fleet, virtual_grid


@pytest.fixture
def grid_of(tmp_path: Path) -> Iterator[GridOf]:
    """Makes grids of a fleet, given as TOML. With `clock`, this thread's time is theirs until the test ends."""
    with ExitStack() as stack:

        def make(
            toml: str = EVEN, devices: int = 5, executor: Executor | None = None, *, clock: bool = False
        ) -> VirtualGrid:
            fleet = make_fleet(tmp_path, toml, devices)
            return stack.enter_context(virtual_grid(tmp_path, fleet, executor or Counter(), clock=clock))

        yield make
