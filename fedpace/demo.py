"""`fedpace demo`: certificates, a server and devices of four speeds on this machine, and a model that learns.

One device joins late, one leaves and returns. What is shown while it runs comes from where anybody's tools would get
it: the server's `Devices` call and `OUT/metrics.jsonl`.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import plotext
from flwr.serverapp import strategy as flower_strategies
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

import fedpace
from fedpace.clients.connection import channel_to
from fedpace.devices import ask_devices
from fedpace.errors import ConfigError, RunError
from fedpace.hosting.app import AppFolder, load_app_folder
from fedpace.hosting.outputs import write_result
from fedpace.localfleet import LocalFleet
from fedpace.protocol import fleet_pb2 as pb
from fedpace.strategies import PRESETS

SPEEDS = {"fast": 1.0, "medium": 1.5, "slow": 2.5, "very slow": 4.0}
"""The classes, and how many times slower than this machine they are."""

_ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Many devices share this machine's few cores, and such small operators gain nothing from more threads."""

_REFRESH_SECONDS = 0.25
_LIMIT_SECONDS = 1800.0


@dataclass(frozen=True)
class DemoOptions:
    """`rounds` are of a strategy that has rounds; one that has none makes versions of about as many updates."""

    devices: int
    rounds: int | None
    strategy: str
    out: Path | None
    seed: int


@dataclass
class Progress:
    """What has been seen of the run so far."""

    reference: float
    reply: pb.DevicesReply = field(default_factory=pb.DevicesReply)
    curve: list[tuple[float, float]] = field(default_factory=list)
    round: int = 0
    event: str = ""


def demo_app() -> AppFolder:
    """The default app. Raises ConfigError where the package was installed without it."""
    folder = Path(fedpace.__file__).parent / "examples" / "digits"
    if not folder.is_dir():
        raise ConfigError(f"the demo's app is not at {folder}: install fedpace anew, or run the demo in a checkout")
    return load_app_folder(folder)


def check_strategy(name: str) -> None:
    """Raises ConfigError with the list of those there are, unless a strategy of that name runs the demo's app."""
    flowers = [f"flwr:{choice}" for choice in flower_strategies.__all__ if _runs_with_defaults(choice)]
    if name not in PRESETS and name not in flowers:
        raise ConfigError(
            f"--strategy: {name!r} is none of {', '.join(PRESETS)}, nor one of Flower's: {', '.join(flowers)}"
        )


def _runs_with_defaults(choice: str) -> bool:
    """Whether one of Flower's strategies averages arrays (those called FedXgb combine trees), and has to be told nothing."""
    found = getattr(flower_strategies, choice)
    if not inspect.isclass(found) or not issubclass(found, flower_strategies.FedAvg) or choice.startswith("FedXgb"):
        return False
    return all(p.default is not p.empty for p in inspect.signature(found).parameters.values())


def length_of(strategy: str, rounds: int, devices: int) -> tuple[int, str]:
    """How long a run of a strategy is, and in what: "round", or "version" where it has no rounds.

    Then it folds as many updates as so many rounds of all devices would. A group of Compass has no fixed size: two
    groups count as a round.
    """
    gate = PRESETS[strategy]().composition.gate if strategy in PRESETS else None
    if gate is None or gate.rounds:
        return rounds, "round"
    k = getattr(gate, "k", None)
    return max(1, 2 * rounds if k is None else rounds * devices // k), "version"


def run_demo(options: DemoOptions) -> int:
    """Runs the demo to its end. Returns the exit code. Raises ConfigError for a strategy that there is not."""
    return asyncio.run(_Demo(options).run())


class _Demo:
    def __init__(self, options: DemoOptions) -> None:
        check_strategy(options.strategy)
        self._app = demo_app()
        self._options = options
        self._out = (options.out or Path("runs") / f"demo-{time.strftime('%Y%m%d-%H%M%S')}").absolute()
        if (self._out / "result.json").exists():
            raise ConfigError(f"--out: {self._out} holds the result of another run; name another folder")
        self._work = self._out / "fleet"
        rounds = options.rounds or int(self._app.config["num-rounds"])
        self._length, self._unit = length_of(options.strategy, rounds, options.devices)
        self._console = Console(stderr=True)
        self._classes = {f"device-{i}": list(SPEEDS)[i % len(SPEEDS)] for i in range(options.devices)}
        self._late = f"device-{options.devices - 1}"
        self._leaver = "device-1" if options.devices > 2 else ""
        self._lines = 0

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
        try:
            return await self._run()
        except asyncio.CancelledError:
            self._console.print("interrupted; every process has been stopped")
            return 130

    async def _run(self) -> int:
        self._console.print("training the same model in one place, for comparison ...")
        reference = await self._train_centrally()
        self._console.print(f"reference: accuracy {reference['accuracy']:.4f} in {reference['seconds']:.1f} s")
        with LocalFleet(self._work, self._app.directory, environment=_ONE_THREAD) as fleet:
            fleet.out = self._out
            progress = Progress(float(reference["accuracy"]))
            self._start(fleet)
            code = await self._watch(fleet, progress)
        shutil.rmtree(self._work / "certs", ignore_errors=True)
        shutil.rmtree(self._work / "state", ignore_errors=True)
        return self._conclude(code, reference, progress)

    async def _train_centrally(self) -> dict[str, Any]:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "digits.central", "--seed", str(self._options.seed)),
            cwd=self._app.directory,
            env={**os.environ, **_ONE_THREAD},
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            output, _ = await process.communicate()
        except asyncio.CancelledError:
            process.kill()
            await process.wait()
            raise
        if process.returncode != 0:
            raise RunError("the reference could not be trained: see above")
        found: dict[str, Any] = json.loads(output)
        return found

    def _start(self, fleet: LocalFleet) -> None:
        options = self._options
        config = f'strategy="{options.strategy}" num-rounds={self._length} seed={options.seed}'
        first = [name for name in self._classes if name != self._late]
        fleet.start_server("--min-nodes", str(len(first)), "--seed", str(options.seed), "--run-config", config)
        for name in first:
            self._start_device(fleet, name)

    def _start_device(self, fleet: LocalFleet, name: str) -> None:
        index = list(self._classes).index(name)
        node_config = f"partition-id={index} num-partitions={len(self._classes)}"
        fleet.start_device(name, "--slowdown", str(SPEEDS[self._classes[name]]), node_config=node_config)

    # ------------------------------------------------------------ while it runs

    async def _watch(self, fleet: LocalFleet, progress: Progress) -> int:
        assert fleet.server is not None
        plan = self._plan(fleet, progress)
        until = time.monotonic() + _LIMIT_SECONDS
        async with channel_to(fleet.address, fleet.operator()) as channel:
            with Live(console=self._console, auto_refresh=False, transient=True) as live:
                while fleet.server.poll() is None:
                    if time.monotonic() > until:
                        raise RunError(f"the demo has not ended after {_LIMIT_SECONDS:g} s; see {self._work / 'logs'}")
                    with contextlib.suppress(RunError):
                        progress.reply = await ask_devices(channel)
                    self._read_metrics(progress)
                    next(plan, None)
                    self._show(live, progress)
                    await asyncio.sleep(_REFRESH_SECONDS)
        self._read_metrics(progress)
        return fleet.server.returncode

    def _plan(self, fleet: LocalFleet, progress: Progress) -> Any:
        """What happens to the fleet: one device joins late, one leaves and comes back."""
        while progress.round < max(1, self._length // 6):
            yield
        self._tell(progress, f"{self._late} joins late")
        self._start_device(fleet, self._late)
        if not self._leaver:
            return
        while progress.round < max(2, self._length // 3):
            yield
        self._tell(progress, f"{self._leaver} leaves")
        fleet.devices[self._leaver].terminate()
        while progress.round < max(3, self._length // 2) or fleet.devices[self._leaver].poll() is None:
            yield
        self._tell(progress, f"{self._leaver} returns")
        self._start_device(fleet, self._leaver)

    def _tell(self, progress: Progress, event: str) -> None:
        progress.event = event
        if not self._console.is_terminal:
            self._console.print(event)

    def _read_metrics(self, progress: Progress) -> None:
        with contextlib.suppress(FileNotFoundError):
            lines = (self._out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            for line in lines[self._lines :]:
                entry = json.loads(line)
                progress.round = max(progress.round, int(entry["round"]))
                if "accuracy" in entry["metrics"] and entry["source"] == "server":
                    progress.curve.append((float(entry["seconds"]), float(entry["metrics"]["accuracy"])))
                    if not self._console.is_terminal:
                        accuracy = progress.curve[-1][1]
                        self._console.print(f"{self._unit} {entry['round']}/{self._length}: accuracy {accuracy:.4f}")
            self._lines = len(lines)

    def _show(self, live: Live, progress: Progress) -> None:
        if self._console.is_terminal:
            curve = Text.from_ansi(draw_curve(progress, self._console.width, 14))
            live.update(Group(self._table(progress), curve), refresh=True)

    def _table(self, progress: Progress) -> Table:
        title = f"{self._options.strategy}, {self._unit} {progress.round}/{self._length}"
        table = Table(title=f"{title}   {progress.event}", title_style="bold")
        for name in ("device", "class", "state", "tasks", "s/task", "staleness"):
            table.add_column(name, justify="left" if name in ("device", "class", "state") else "right")
        for row in device_rows(progress.reply, self._classes):
            table.add_row(*row)
        return table

    # ------------------------------------------------------------ at the end

    def _conclude(self, code: int, reference: dict[str, Any], progress: Progress) -> int:
        path = self._out / "result.json"
        if not path.exists():
            raise RunError(f"the server ended with exit code {code} and no result; see {self._work / 'logs'}")
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        reference = {"accuracy": reference["accuracy"], "loss": reference["loss"]}
        final = {"final": result.pop("final"), "reference": reference}
        write_result(self._out, {"status": result.pop("status"), "run_id": result.pop("run_id"), **final, **result})
        (self._out / "report.md").write_text(self._report(result, final, progress), encoding="utf-8")
        if code != 0 or not final["final"]:
            raise RunError(f"the run failed: {result['reason']}; see {self._work / 'logs' / 'server.log'}")
        self._console.print(self._table(progress))
        accuracy, best = float(final["final"]["accuracy"]), float(reference["accuracy"])
        gap = 100 * (best - accuracy)
        length = f"{self._length} {self._unit}s"
        print(f"accuracy   {accuracy:.4f} after {length} and {result['training_seconds']:.1f} s of training")
        print(f"reference  {best:.4f} trained in one place; the gap is {gap:.1f} points")
        print(f"model      {self._out / 'model.safetensors'}")
        print(f"report     {self._out / 'report.md'}")
        return 0

    def _report(self, result: dict[str, Any], final: dict[str, Any], progress: Progress) -> str:
        rows = "\n".join(f"| {' | '.join(row)} |" for row in device_rows(progress.reply, self._classes))
        plain = plotext.uncolorize(draw_curve(progress, 100, 20))
        return _REPORT.format(
            strategy=self._options.strategy,
            devices=len(self._classes),
            length=f"{self._length} {self._unit}s",
            seed=self._options.seed,
            final=json.dumps(final["final"]),
            reference=json.dumps(final["reference"]),
            result=json.dumps(result, indent=2),
            rows=rows,
            curve=plain,
        )


_REPORT = """# Demo: {strategy}, {devices} devices, {length}, seed {seed}

Final: `{final}`; the same model trained in one place: `{reference}`.

```
{curve}
```

| device | class | state | tasks | s/task | staleness |
|---|---|---|---:|---:|---:|
{rows}

```json
{result}
```
"""


def device_rows(reply: pb.DevicesReply, classes: dict[str, str]) -> list[list[str]]:
    """name, class, state, tasks done, seconds a task, staleness: of every device, those never seen included."""
    states = {device.name: device for device in reply.devices}
    rows = []
    for name, kind in classes.items():
        device = states.get(name)
        if device is None:
            rows.append([name, kind, "not here yet", "", "", ""])
            continue
        seconds = f"{device.seconds_per_task:.2f}" if device.HasField("seconds_per_task") else ""
        staleness = f"{device.staleness:.0f}" if device.HasField("staleness") else ""
        rows.append([name, kind, device.state, str(device.tasks_done), seconds, staleness])
    return rows


def draw_curve(progress: Progress, width: int, height: int) -> str:
    """Accuracy over seconds, with the reference as a line, as text."""
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.plotsize(max(40, min(width, 110)), height)
    plotext.title("accuracy on the test images over seconds; the line is the reference")
    plotext.ylim(0.0, 1.0)
    if progress.curve:
        seconds, accuracy = zip(*progress.curve, strict=True)
        plotext.plot(seconds, accuracy, marker="braille")
    plotext.hline(progress.reference)
    drawn: str = plotext.build()
    return drawn
