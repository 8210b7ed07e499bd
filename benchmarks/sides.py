"""What the simulation benchmarks have in common: sides that are run in turn, some of which cannot be measured here."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from benchmarks.engines.arrays import make_work, save
from benchmarks.launch import Measured
from benchmarks.peers import mnist_file
from fedpace.errors import RunError

Side = Callable[[Path], Measured]
"""Runs an engine once on the work in a file. RunError when it cannot."""


def write_work(folder: Path, name: str, devices: int) -> Path:
    """The file of work `name` for so many devices."""
    path = folder / f"{name}-{devices}.npz"
    save(make_work(name, devices, mnist_file() if name == "C" else None), path)
    return path


class Results:
    """What was measured, by side and in turn; and why some sides could not be.

    A side that fails is not tried again, and none of its runs count: it is missing, not beaten.
    """

    def __init__(self) -> None:
        self.measured: dict[str, list[Measured]] = {}
        self.missing: dict[str, str] = {}

    def run(self, name: str, side: Side, work: Path) -> None:
        if name in self.missing:
            return
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            self.measured.setdefault(name, []).append(side(work))
        except RunError as error:
            self.measured.pop(name, None)
            self.missing[name] = str(error).splitlines()[0]
            print(f"{name} could not be measured: {error}", file=sys.stderr)

    def median(self, name: str, figure: str) -> float | None:
        """The median of an attribute of `Measured` over a side's runs; None where it is missing."""
        runs = self.measured.get(name)
        return float(np.median([getattr(run, figure) for run in runs])) if runs else None

    def ratio(self, name: str, to: str) -> float | None:
        """How many times less CPU time an update takes on one side than on another; None where either is missing."""
        ours, theirs = self.median(name, "cpu_ms"), self.median(to, "cpu_ms")
        return theirs / ours if ours and theirs else None

    def rows(self, first: str) -> list[tuple[str, ...]]:
        """A table, header first, in the order in which the sides were run; `first` is what all are compared with."""
        header = ("side", "CPU-ms an update", f"to {first}", "updates/s", "start, s", "peak MB", "loss")
        return [header, *(self._row(name, first) for name in [*self.measured, *self.missing])]

    def _row(self, name: str, first: str) -> tuple[str, ...]:
        if name in self.missing:
            return name, *("missing",) * 6
        figures = ("cpu_ms", "rate", "start_seconds", "peak_mb", "loss_before", "loss")
        of = {figure: self.median(name, figure) or 0.0 for figure in figures}
        ratio = self.ratio(name, first)
        return (
            name,
            f"{of['cpu_ms']:.3g}",
            "-" if ratio is None else f"{ratio:.3g}",
            f"{of['rate']:,.0f}",
            f"{of['start_seconds']:.0f}",
            f"{of['peak_mb']:,.0f}",
            f"{of['loss_before']:.2f} to {of['loss']:.2f}",
        )


def known(figures: Mapping[str, float | None]) -> dict[str, float]:
    """Those figures that could be measured."""
    return {name: value for name, value in figures.items() if value is not None}
