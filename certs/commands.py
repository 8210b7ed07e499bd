"""`fedpace certs`: make an authority, and the certificates of devices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedpace.certs.authority import default_directory, init_authority, issue_device
from fedpace.certs.identity import host_names, load_identity, read_certificate

app = typer.Typer(help="Make the certificates by which server and devices know each other.", no_args_is_help=True)

_Directory = Annotated[
    Path | None, typer.Option("--dir", help="The authority's folder.", show_default="$FEDPACE_HOME/certs")
]
_Days = Annotated[int, typer.Option(help="How many days the certificates are valid.")]


@app.command()
def init(
    directory: _Directory = None,
    host: Annotated[
        list[str] | None, typer.Option(help="A DNS name or IP address of the server; may be repeated.")
    ] = None,
    days: _Days = 365,
) -> None:
    """Make an authority, with a server's and an operator's certificate."""
    directory = directory or default_directory()
    init_authority(directory, hosts=host or (), days=days)
    server = load_identity(directory, expect_role="server")
    names = ", ".join(host_names(read_certificate(directory / "server" / "cert.pem")))
    typer.echo(f"Made an authority in {directory}. Keep {directory / 'ca.key'} secret, and on this machine.")
    typer.echo(f"  {directory / 'server'}    the server's certificate, for {names}; until {server.not_after:%Y-%m-%d}")
    typer.echo(f"  {directory / 'operator'}  the operator's, for `fedpace devices`")
    typer.echo("Next: `fedpace certs device NAME` for each device. A server or an operator on another machine needs a")
    typer.echo("copy of its folder, and --certs to name it.")


@app.command()
def device(
    name: Annotated[str, typer.Argument(help="The device's name: 1 to 64 of A-Z a-z 0-9 . _ -")],
    directory: _Directory = None,
    days: _Days = 365,
) -> None:
    """Make a device's certificate."""
    directory = directory or default_directory()
    folder = issue_device(directory, name, days=days)
    identity = load_identity(folder, expect_role="device", name=name)
    typer.echo(f"Made the certificate of device {name} in {folder}.")
    typer.echo(f"  node id {identity.caller.node_id}; valid until {identity.not_after:%Y-%m-%d}")
    typer.echo(f"Next: copy {folder} to the device, over a channel you trust, and run there")
    typer.echo("  fedpace client --certs COPY --server HOST:PORT --app DIR")
