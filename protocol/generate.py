"""Generates the protobuf code from `fleet.proto`: `python -m fedpace.protocol.generate [OUTPUT_DIRECTORY]`.

The generated files are committed; a test generates them anew and compares.
"""

from __future__ import annotations

import sys
from pathlib import Path


def generate(output: Path) -> None:
    """Writes `fedpace/protocol/fleet_pb2*.py[i]` under `output`."""
    from grpc_tools import protoc  # a development dependency

    root = Path(__file__).absolute().parents[1]
    if root.name == "fedpace":  # imported through the package's link, or installed
        root = root.parent
    arguments = [
        "protoc",
        f"-I{root}",
        f"--python_out={output}",
        f"--grpc_python_out={output}",
        f"--mypy_out=quiet:{output}",
        f"--mypy_grpc_out=quiet:{output}",
        "fedpace/protocol/fleet.proto",
    ]
    if protoc.main(arguments) != 0:
        raise SystemExit("protoc failed: see its messages above")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else Path.cwd())
