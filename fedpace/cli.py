"""The command line. Thin: reads options, checks them, hands over to the rooms."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import os
import secrets
import socket
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import click
import typer
import uvloop
from click.core import ParameterSource

from fedpace import __version__
from fedpace.certs.authority import default_directory
from fedpace.certs.commands import app as certs_app
from fedpace.certs.identity import Identity, check_name, load_identity
from fedpace.errors import ConfigError, FedpaceError
from fedpace.hosting.processes import DIES_WITH_PARENT, die_with_parent, keep_chunks_on_the_heap

if TYPE_CHECKING:
    from fedpace.hosting.app import AppFolder

app = typer.Typer(
    name="fedpace",
    help="Federated learning for fleets whose devices do not keep the same pace.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(certs_app, name="certs")

AppDir = Annotated[Path, typer.Option("--app", help="Folder of a Flower app.", show_default=False)]
Certs = Annotated[Path | None, typer.Option(help="Folder of certificates; made by `fedpace certs`.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="No TLS; on loopback addresses only.")]
Server = Annotated[str, typer.Option(help="HOST:PORT of the server.", show_default=False)]


@app.command()
def server(
    app: AppDir,
    address: Annotated[str, typer.Option(help="HOST:PORT to listen on.")] = "127.0.0.1:9092",
    state: Annotated[Path | None, typer.Option(help="Folder for work in progress.")] = None,
    certs: Certs = None,
    insecure: Insecure = False,
    run_config: Annotated[str, typer.Option(help="Overrides of the app's config: 'lr=0.1 name=\"x\"'.")] = "",
    min_nodes: Annotated[int, typer.Option(min=0, help="Devices to wait for before the app starts.")] = 1,
    initial_model: Annotated[Path | None, typer.Option(help="safetensors file to start from.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of everything random; random by default.")] = None,
    record: Annotated[
        Path | None, typer.Option(help="Folder to record the run in, for `fedpace simulate --replay`.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results; ./runs/APP-TIME by default.")] = None,
) -> None:
    """Run a Flower app's ServerApp, with the devices that connect."""
    from fedpace.hosting.app import load_app_folder
    from fedpace.hosting.config import parse_config
    from fedpace.hosting.outputs import check_model_file, default_out
    from fedpace.server.main import ServerOptions, serve

    folder = load_app_folder(app)
    if initial_model is not None:
        check_model_file(initial_model)
    _check_unused(out)
    if record is not None and (record / "recording.json").exists():
        raise ConfigError(f"--record: {record} holds the recording of another run; name another folder")
    options = ServerOptions(
        app=folder,
        address=check_address(address, "--address"),
        state=_folder(state or home() / "server", "--state"),
        out=_folder(out or default_out(folder), "--out"),
        identity=_identity(certs, insecure, address, "server", None),
        overrides=parse_config(run_config, "--run-config"),
        min_nodes=min_nodes,
        initial_model=None if initial_model is None else initial_model.absolute(),
        record=None if record is None else _folder(record, "--record"),
        seed=secrets.randbits(32) if seed is None else seed,
    )
    raise typer.Exit(uvloop.run(serve(options)))


@app.command()
def client(
    server: Server,
    app: AppDir,
    name: Annotated[str | None, typer.Option(help="Name of the device; the certificate's, or the host's.")] = None,
    state: Annotated[Path | None, typer.Option(help="Folder for what the device keeps.")] = None,
    certs: Certs = None,
    insecure: Insecure = False,
    node_config: Annotated[str, typer.Option(help="The device's own config: 'partition-id=0 ...'.")] = "",
    slots: Annotated[int, typer.Option(min=0, help="Tasks at a time; 0: one a GPU, else one.")] = 0,
    slowdown: Annotated[float, typer.Option(min=1.0, help="Be this many times slower than the device is.")] = 1.0,
) -> None:
    """Run a device: connect, train when asked, reconnect for ever."""
    from fedpace.clients.connection import DeviceOptions
    from fedpace.clients.main import run_device
    from fedpace.hosting.app import load_app_folder
    from fedpace.hosting.config import parse_config

    identity = _identity(certs, insecure, server, "device", name)
    name = identity.caller.name if identity is not None else name or socket.gethostname()
    check_name(name)
    options = DeviceOptions(
        server=check_address(server, "--server"),
        app=load_app_folder(app),
        name=name,
        state=_folder(state or home() / "devices" / name, "--state"),
        identity=identity,
        node_config=parse_config(node_config, "--node-config"),
        slots=slots,
        slowdown=slowdown,
    )
    raise typer.Exit(uvloop.run(run_device(options)))


@app.command()
def devices(
    server: Server,
    certs: Certs = None,
    insecure: Insecure = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show who is connected, doing what, how fast."""
    from fedpace.devices import device_table, fetch_devices, to_json

    check_address(server, "--server")
    reply = asyncio.run(fetch_devices(server, _identity(certs, insecure, server, "operator", None)))
    if as_json:
        print(json.dumps(to_json(reply), indent=2))
    else:
        from rich.console import Console

        Console().print(device_table(reply))


@app.command()
def demo(
    devices: Annotated[int, typer.Option(min=2, max=64, help="Device processes to start.")] = 8,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds, or as much; the app's own number by default.")
    ] = None,
    strategy: Annotated[str, typer.Option(help="A preset of fedpace, or 'flwr:NAME' of Flower's.")] = "FedAvg",
    out: Annotated[Path | None, typer.Option(help="Folder for results; ./runs/demo-TIME by default.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
) -> None:
    """Certificates, a server and devices of four speeds on this machine: a model learns while you watch."""
    from fedpace.demo import DemoOptions, run_demo

    raise typer.Exit(run_demo(DemoOptions(devices, rounds, strategy, out, seed)))


@app.command()
def simulate(
    app: AppDir,
    devices: Annotated[int, typer.Option(min=1, max=10_000_000, help="Devices in the fleet.")] = 100,
    fleet: Annotated[
        str, typer.Option(help="A preset (see 'fedpace fleets'), or a TOML file of your own.")
    ] = "uniform",
    executor: Annotated[str, typer.Option(help="inline, pool, fused, or auto: fused where the app allows.")] = "auto",
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes; the executor's choice.")] = None,
    device: Annotated[str, typer.Option(help="Where fused computes: cpu, cuda, cuda:1, ...")] = "cpu",
    steps: Annotated[
        float, typer.Option(min=0.0, help="Local steps of a task, for its duration, where the app does not say.")
    ] = 10.0,
    run_config: Annotated[str, typer.Option(help="Changes to the app's config: 'lr=0.1 ...', or a .toml file.")] = "",
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    initial_model: Annotated[Path | None, typer.Option(help="A safetensors file to start from.")] = None,
    replay: Annotated[
        Path | None,
        typer.Option(help="A recording of `fedpace server --record` to replay, which says all of the above but --app."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results; ./runs/APP-TIME by default.")] = None,
) -> None:
    """Run an app on a simulated fleet, in virtual time: the same seed gives the same result."""
    from fedpace.hosting.app import load_app_folder
    from fedpace.hosting.config import parse_config
    from fedpace.hosting.outputs import check_model_file, default_out
    from fedpace.simulations.run import EXECUTORS, SimulationOptions
    from fedpace.simulations.run import simulate as run

    if executor not in EXECUTORS:
        raise ConfigError(f"--executor: there is no {executor!r}; choose one of {', '.join(EXECUTORS)}")
    folder = load_app_folder(app)
    if initial_model is not None:
        check_model_file(initial_model)
    _check_unused(out)
    if replay is not None:
        _replay(folder, replay, out)
    options = SimulationOptions(
        app=folder,
        devices=devices,
        fleet=fleet,
        executor=executor,
        workers=workers,
        device=device,
        steps=steps,
        overrides=parse_config(run_config, "--run-config"),
        seed=seed,
        initial_model=None if initial_model is None else initial_model.absolute(),
        out=_folder(out or default_out(folder), "--out"),
    )
    raise typer.Exit(run(options))


def _replay(folder: AppFolder, recording: Path, out: Path | None) -> NoReturn:
    from fedpace.hosting.outputs import default_out
    from fedpace.simulations.replay import replay

    context = click.get_current_context()
    for name in context.params:
        if name not in ("app", "replay", "out") and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise ConfigError(f"--{name.replace('_', '-')}: a replay takes that from the recording; leave it out")
    raise typer.Exit(replay(folder, recording, _folder(out or default_out(folder), "--out")))


@app.command()
def compare(
    scenario: Annotated[Path, typer.Argument(help="TOML file: apps, fleets, strategies, seeds.", show_default=False)],
    out: Annotated[
        Path, typer.Option(help="Folder for results; one that was interrupted goes on.", show_default=False)
    ],
    workers: Annotated[int | None, typer.Option(min=1, help="Runs at a time; one a core by default.")] = None,
    tuned: Annotated[
        Path | None, typer.Option(help="A tuned.json of an earlier comparison, instead of searching.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only what the scenario's [quick] names.")] = False,
) -> None:
    """Compare strategies on simulated fleets: which one gets where, in what time, at what cost."""
    from fedpace.simulations.comparison.compare import CompareOptions
    from fedpace.simulations.comparison.compare import compare as run

    for name in ("jinja2", "matplotlib", "optuna", "pyarrow", "scipy"):
        if find_spec(name) is None:
            raise ConfigError(f"comparing needs {name}: pip install 'fedpace[compare]'")
    raise typer.Exit(run(CompareOptions(scenario, _folder(out, "--out"), workers, tuned, quick)))


@app.command()
def fleets(
    fleet: Annotated[
        str | None, typer.Argument(help="A preset or a TOML file to describe; lists presets if none.")
    ] = None,
    devices: Annotated[int, typer.Option(min=1, max=10_000_000, help="Devices to draw.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw.")] = 0,
) -> None:
    """Show the fleets that can be simulated, or what one looks like."""
    from fedpace.hosting.seeds import derive_seed
    from fedpace.simulations.fleets import describe, load_fleet, preset_names

    if fleet is None:
        print("\n".join(preset_names()))
    else:
        print(describe(load_fleet(fleet, devices, derive_seed(seed, "fleet"))))


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fedpace {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Options of every command."""


def home() -> Path:
    """Where fedpace keeps what it is not told to keep elsewhere: $FEDPACE_HOME, or ~/.fedpace."""
    return default_directory().parent


def check_address(address: str, option: str) -> str:
    """Raises ConfigError unless an address is HOST:PORT."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ConfigError(f"{option}: {address!r} is not HOST:PORT, as in 127.0.0.1:9092 or [::1]:9092")
    return address


def is_loopback(host: str) -> bool:
    """Whether every address of a host is a loopback address."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host.strip("[]"), None)}
    except OSError:
        return False
    return bool(found) and all(ipaddress.ip_address(address).is_loopback for address in found)


def _identity(certs: Path | None, insecure: bool, address: str, role: str, name: str | None) -> Identity | None:
    if insecure:
        if certs is not None:
            raise ConfigError("--certs and --insecure exclude each other")
        if not is_loopback(check_address(address, "the address").rpartition(":")[0]):
            raise ConfigError(f"--insecure works on loopback addresses only, and {address} is none; use --certs")
        return None
    directory = certs or default_directory()
    if not directory.is_dir():
        raise ConfigError(f"there are no certificates in {directory}; make them with `fedpace certs init`")
    return load_identity(directory, expect_role=role, name=name)


def _check_unused(out: Path | None) -> None:
    """Raises ConfigError for a folder of results that holds some already."""
    if out is not None and (out / "result.json").exists():
        raise ConfigError(f"--out: {out} holds the result of another run; name another folder")


def _folder(path: Path, option: str) -> Path:
    path = path.expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{option}: {path} cannot be made: {error.strerror}") from None
    return path


class _Formatter(logging.Formatter):
    """One line an event: time, level where it matters, message."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    level = os.environ.get("FEDPACE_LOG", "info").upper()
    logging.basicConfig(level=level if level in logging.getLevelNamesMapping() else "INFO", handlers=[handler])


def main(run: Callable[..., Any] = app) -> None:
    """Runs a command and exits with its code: 0 done, 1 the run failed, 2 wrong usage, 130 interrupted."""
    _log_to_stderr()
    if os.environ.pop(DIES_WITH_PARENT, "") == "1":
        die_with_parent()
    keep_chunks_on_the_heap()
    try:
        run()
    except ConfigError as error:
        print(f"fedpace: {error}", file=sys.stderr)
        sys.exit(2)
    except FedpaceError as error:
        print(f"fedpace: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
