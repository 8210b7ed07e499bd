"""Updates in few bytes: codecs, both halves of each in one place, and the frame they write. See docs/codecs.md."""

from __future__ import annotations

from fedpace.protocol.codecs.codec import Chain, Codec
from fedpace.protocol.codecs.floats import Half, Raw
from fedpace.protocol.codecs.frame import FORMAT_VERSION, Frame, encode, open_frame
from fedpace.protocol.codecs.lowrank import LowRank
from fedpace.protocol.codecs.qsgd import QSGD
from fedpace.protocol.codecs.scaled import Quantise, Sign
from fedpace.protocol.codecs.sparse import RandomK, TopK
from fedpace.protocol.codecs.text import parse_codec, typical_bytes

__all__ = [
    "FORMAT_VERSION",
    "QSGD",
    "Chain",
    "Codec",
    "Frame",
    "Half",
    "LowRank",
    "Quantise",
    "RandomK",
    "Raw",
    "Sign",
    "TopK",
    "encode",
    "open_frame",
    "parse_codec",
    "typical_bytes",
]
