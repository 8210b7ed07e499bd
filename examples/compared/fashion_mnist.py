"""Fashion-MNIST, as Debian packages it. Nothing is fetched: the files are there, or it is said how to get them."""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedpace.errors import ConfigError

PLACE = "FASHION_MNIST"
"""The environment variable that may name the folder."""

_CACHE = Path("~/.cache/fedpace")
PLACES = (Path("/usr/share/datasets/fashion-mnist"), _CACHE.expanduser() / "usr/share/datasets/fashion-mnist")
"""Where it is otherwise: installed, or only unpacked."""

_IMAGES, _LABELS = 0x803, 0x801
"""What files of bytes in three dimensions, and in one, begin with."""

HOW = (
    f"Debian has it: `apt-get install dataset-fashion-mnist`, or, without being root, `mkdir -p {_CACHE} && cd {_CACHE} "
    "&& apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb .`; or have the files "
    f"elsewhere and name their folder in {PLACE}"
)

Images = NDArray[np.float32]
Labels = NDArray[np.int64]


def load() -> tuple[Images, Labels, Images, Labels]:
    """60,000 images of clothes, their labels, and 10,000 more of each to test on.

    Images are float32 of shape (n, 196) from 0 to 1: 14 x 14 pixels, each the mean of four of the 28 x 28. Labels are
    from 0 to 9. Raises ConfigError that says how to get the files where they are not there, or are others.
    """
    folder = _folder()
    train, test = (
        (
            _read(folder / f"{name}-images-idx3-ubyte.gz", _IMAGES),
            _read(folder / f"{name}-labels-idx1-ubyte.gz", _LABELS),
        )
        for name in ("train", "t10k")
    )
    return _halved(train[0]), train[1].astype(np.int64), _halved(test[0]), test[1].astype(np.int64)


def _folder() -> Path:
    if named := os.environ.get(PLACE):
        return Path(named).expanduser()
    for place in PLACES:
        if place.is_dir():
            return place
    raise ConfigError(f"Fashion-MNIST is neither in {PLACES[0]} nor in {PLACES[1]}. {HOW}")


def _read(path: Path, kind: int) -> NDArray[np.uint8]:
    """An array of bytes in the IDX format: what it is and its lengths as big-endian int32, then the bytes."""
    try:
        with gzip.open(path) as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"Fashion-MNIST: {path} cannot be read: {reason}. {HOW}") from None
    lengths = [int.from_bytes(content[at : at + 4]) for at in range(4, 4 + 4 * (kind & 0xFF), 4)]
    if int.from_bytes(content[:4]) != kind or len(content) != 4 + 4 * len(lengths) + int(np.prod(lengths)):
        raise ConfigError(f"Fashion-MNIST: {path} is not the file of that name. {HOW}")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(lengths)).reshape(lengths)


def _halved(images: NDArray[np.uint8]) -> Images:
    count, height, width = images.shape
    sums = images.reshape(count, height // 2, 2, width // 2, 2).sum(axis=(2, 4), dtype=np.uint16)
    found: Images = sums.reshape(count, -1) / np.float32(4 * 255)
    return found
