"""`fedpace compare`: the runs of a scenario over the cores, and the tables that come of them."""

from __future__ import annotations

import dataclasses
import fcntl
import logging
import shutil
import signal
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedpace.errors import ConfigError
from fedpace.hosting.files import write_atomically
from fedpace.hosting.outputs import to_json
from fedpace.hosting.processes import processors
from fedpace.simulations.comparison.plan import spec_of
from fedpace.simulations.comparison.reading import read_scenario
from fedpace.simulations.comparison.runs import PARTIAL, Outcome, Run, RunSpec, read_run
from fedpace.simulations.comparison.scenario import App, Scenario, Strategy
from fedpace.simulations.comparison.tuning import Trial, Tuned, read_tuned, search, write_tuned
from fedpace.simulations.comparison.workers import Workers

log = logging.getLogger("fedpace.comparison")

Course = Generator[list[RunSpec], list[Outcome], None]


@dataclass(frozen=True)
class CompareOptions:
    """What the command line says. `workers` is None for one a core."""

    scenario: Path
    out: Path
    workers: int | None = None
    tuned: Path | None = None
    quick: bool = False


def compare(options: CompareOptions) -> int:
    """Makes what is still to be made of a scenario, and writes its tables. Returns the exit code.

    Raises ConfigError, before anything runs, for a scenario that cannot be.
    """
    scenario = read_scenario(options.scenario)
    if options.quick:
        scenario = scenario.shortened()
    tuned = None if options.tuned is None else read_tuned(options.tuned, scenario)
    options.out.mkdir(parents=True, exist_ok=True)
    with _alone(options.out), _terminated_as_interrupted():
        shutil.rmtree(options.out / PARTIAL, ignore_errors=True)
        write_atomically(options.out / "scenario.json", to_json(dataclasses.asdict(scenario), indent=2).encode())
        found = _Found(trials=[] if tuned is None else list(tuned.trials))
        courses = [
            _course(scenario, app, strategy, tuned, found) for app in scenario.apps for strategy in scenario.strategies
        ]
        try:
            _drive(courses, options, _count(scenario, tuned))
        except KeyboardInterrupt:
            log.warning("stopped; the same command goes on where this one was")
            raise
        if tuned is None and found.trials:
            write_tuned(options.out / "tuned.json", scenario, found.trials)
        seeds = scenario.tuning.seeds if tuned is None else tuned.seeds
        _write(options.out, scenario.baseline, found, seeds)
        shutil.rmtree(options.out / PARTIAL, ignore_errors=True)
    return 0 if any(run.outcome.status == "completed" for run in found.runs) else 1


def _write(out: Path, baseline: str, found: _Found, seeds: Sequence[int]) -> None:
    """Tables and report, and what a terminal shows of them."""
    from fedpace.simulations.comparison.report import write_report  # these take long to import
    from fedpace.simulations.comparison.results import write_results
    from fedpace.simulations.comparison.tables import summary_table, write_tables

    write_results(out, found.runs, found.trials, seeds)
    write_tables(out, baseline)
    page = write_report(out)
    Console(width=None if sys.stdout.isatty() else 120).print(summary_table(out))
    print(f"report: {page}")


@dataclass
class _Found:
    """What came of a comparison so far."""

    trials: list[Trial] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)


def _course(scenario: Scenario, app: App, strategy: Strategy, tuned: Tuned | None, found: _Found) -> Course:
    """What is to be done for one strategy on one app: searches, then the runs of the result."""
    space = scenario.space_of(strategy)
    if space and tuned is None:
        trials: list[Trial] = []
        for fleet in scenario.searched_fleets:
            trials += yield from search(scenario, app, fleet, strategy)
        found.trials += trials
        tuned = Tuned(scenario.tuning.seeds, tuple(trials))
    specs = []
    for fleet in scenario.fleets:
        if space and tuned is not None:
            values = tuned.values(scenario, app, fleet, strategy)
            specs += [spec_of(scenario, app, fleet, strategy, seed, values) for seed in scenario.seeds]
        if not space or strategy.untuned:
            specs += [spec_of(scenario, app, fleet, strategy, seed) for seed in scenario.seeds]
    outcomes = yield specs
    limits = {fleet.name: app.limits(fleet.name) for fleet in scenario.fleets}
    found.runs += [Run(spec, outcome, limits[spec.fleet].target) for spec, outcome in zip(specs, outcomes, strict=True)]


def _count(scenario: Scenario, tuned: Tuned | None) -> int:
    """How many runs there are, those of searches included."""
    count = 0
    for strategy in scenario.strategies:
        space = scenario.space_of(strategy)
        rows = 1 + bool(space and strategy.untuned)
        count += rows * len(scenario.fleets) * len(scenario.seeds)
        if space and tuned is None:
            count += len(scenario.searched_fleets) * scenario.tuning.trials * len(scenario.tuning.seeds)
    return count * len(scenario.apps)


# ------------------------------------------------------------ driving


@dataclass(eq=False)
class _Batch:
    """The runs that a course waits for."""

    course: Course
    specs: list[RunSpec]
    outcomes: dict[str, Outcome] = field(default_factory=dict)


def _drive(courses: Sequence[Course], options: CompareOptions, count: int) -> None:
    """Lets all courses go their way, side by side."""
    waiting: dict[str, _Batch] = {}
    with Workers(options.out, options.workers or processors()) as pool, _Bar(count) as bar:

        def go_on(batch: _Batch) -> None:
            """Until the course waits for runs that are still to be made."""
            while len(batch.outcomes) == len(batch.specs):
                try:
                    specs = batch.course.send([batch.outcomes[spec.identity] for spec in batch.specs])
                except StopIteration:
                    return
                batch.specs, batch.outcomes = specs, {}
                begin(batch)

        def begin(batch: _Batch) -> None:
            missing = []
            for spec in batch.specs:
                outcome = read_run(options.out, spec)
                if outcome is not None and outcome.status != "failed":  # that may have been mended since
                    batch.outcomes[spec.identity] = outcome
                    bar.found()
                else:
                    waiting[spec.identity] = batch
                    missing.append(spec)
            pool.ask(missing)

        for course in courses:
            batch = _Batch(course, next(course))
            begin(batch)
            go_on(batch)
        while pool.busy:
            for spec, outcome in pool.ended(bar.look):
                batch = waiting.pop(spec.identity)
                batch.outcomes[spec.identity] = outcome
                bar.made(spec, outcome)
                go_on(batch)


class _Bar:
    """How far a comparison is: a bar with the time left on a terminal, a line a run elsewhere."""

    def __init__(self, count: int) -> None:
        self._left, self._done = count, 0
        self._shown = sys.stderr.isatty()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not self._shown,
            transient=True,
            auto_refresh=False,
            speed_estimate_period=600.0,
        )
        self._task = self._bar.add_task("runs", total=count)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def found(self) -> None:
        """A run was there already."""
        self._left -= 1
        self._bar.update(self._task, total=self._left)

    def made(self, spec: RunSpec, outcome: Outcome) -> None:
        self._done += 1
        self._bar.update(self._task, completed=self._done, description=f"{spec.app} {spec.fleet} {spec.strategy}")
        if outcome.status != "completed":
            log.warning("%s: %s: %s", spec, outcome.status, outcome.reason)
        elif not self._shown:
            log.info("%d of %d: %s, %.1f s", self._done, self._left, spec, outcome.wall_seconds)

    def look(self) -> None:
        self._bar.refresh()


# ------------------------------------------------------------ the folder


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Raises ConfigError where another comparison is at work in the folder."""
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"--out: another comparison is at work in {directory}; wait, or name another folder"
            ) from None
        yield


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
