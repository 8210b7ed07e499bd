"""Frames that do not say what they should: a PayloadError with the reason, and no memory taken for what is not there."""

from __future__ import annotations

import struct
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedpace.errors import ConfigError, PayloadError
from fedpace.protocol.codecs import LowRank, Quantise, TopK, encode, open_frame, parse_codec
from fedpace.protocol.codecs.reader import varint
from tests.generators import law

SIZE = 200
SHAPES = [(10, 15), (50,)]
MUTATIONS = 100_000
FAMILIES = {
    "raw": ["raw"],
    "half": ["half(float16)", "half(bfloat16)"],
    "quantise": ["quantise(8)", "quantise(4, chunk=32)", "quantise(1, rounding=stochastic, chunk=64)"],
    "qsgd": ["qsgd(1)", "qsgd(5, chunk=32)", "qsgd(100, chunk=64)"],
    "sign": ["sign"],
    "topk": ["topk(0.1)", "topk(0.02) >> quantise(4)", "topk(0.5) >> qsgd(1, chunk=32)", "topk(1.0) >> sign"],
    "randomk": ["randomk(0.1)", "randomk(0.05, scaled=true) >> half(float16)", "randomk(1.0) >> qsgd(1)"],
    "lowrank": ["lowrank(1)", "lowrank(2) >> half(float16)", "lowrank(3) >> quantise(8)"],
}
floats = struct.Struct("<f").pack


def vector() -> NDArray[np.float32]:
    return np.random.default_rng(5).standard_normal(SIZE).astype(np.float32)


def frame_of(text: str) -> bytes:
    return encode(parse_codec(text), vector(), seed=1, shapes=SHAPES)


def mutated(frame: bytes, rng: np.random.Generator, count: int) -> Iterator[bytes]:
    """Frames with one to four bytes changed, of which some are then cut or followed by others."""
    changed = np.tile(np.frombuffer(frame, np.uint8), (count, 1))
    rows = np.arange(count)
    for often in (1.0, 0.5, 0.3, 0.1):
        hit = rows[rng.random(count) < often]
        flips = np.uint8(1) << rng.integers(0, 8, hit.size, dtype=np.uint8)
        noise = np.where(rng.random(hit.size) < 0.5, flips, rng.integers(1, 256, hit.size, dtype=np.uint8))
        # Every third one near the front, where the lengths and parameters are.
        reach = np.where(rng.random(hit.size) < 0.33, min(24, len(frame)), len(frame))
        changed[hit, rng.integers(0, reach)] ^= noise
    whole = changed.tobytes()
    lengths = np.where(rng.random(count) < 0.1, rng.integers(0, len(frame) + 1, count), len(frame)).tolist()
    tails = np.where(rng.random(count) < 0.03, rng.integers(1, 9, count), 0).tolist()
    for row, (length, tail) in enumerate(zip(lengths, tails, strict=True)):
        data = whole[row * len(frame) : row * len(frame) + length]
        yield data + b"\x81" * tail if tail else data


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_hundred_thousand_mutated_frames_raise_only_payload_errors(family: str) -> None:
    rng = np.random.default_rng(sum(family.encode()))
    total = np.zeros(SIZE)
    refused = passed = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for text in FAMILIES[family]:
            for data in mutated(frame_of(text), rng, -(-MUTATIONS // len(FAMILIES[family]))):
                try:
                    frame = open_frame(data, size=SIZE)
                except PayloadError:
                    refused += 1
                    continue
                passed += 1
                frame.add_to(total, 0.5)
                if few := frame.sparse:
                    assert few[0].size == few[1].size <= SIZE and (np.diff(few[0], prepend=-1) > 0).all()
                    assert not few[0].size or few[0][-1] < SIZE
                assert np.isfinite(total).all()
                total[:] = 0
    assert refused + passed >= MUTATIONS and min(refused, passed) > MUTATIONS // 100


@law
@given(st.binary(max_size=60), st.sampled_from([0, 1, 200, 1 << 40]))
def test_noise_is_refused(data: bytes, size: int) -> None:
    try:
        frame = open_frame(data, size=size)
    except PayloadError:
        return
    assert frame.size == size and frame.dense().shape == (size,)


@pytest.mark.parametrize("text", [text for texts in FAMILIES.values() for text in texts])
def test_a_frame_that_is_cut_or_goes_on_is_refused(text: str) -> None:
    data = frame_of(text)
    for length in range(len(data)):
        with pytest.raises(PayloadError):
            open_frame(data[:length], size=SIZE)
    with pytest.raises(PayloadError, match="1 bytes too many"):
        open_frame(data + b"\0", size=SIZE)
    with pytest.raises(PayloadError, match="a vector of 200 numbers; the model has 201"):
        open_frame(data, size=SIZE + 1)


def head(reducer: bytes, coder: bytes, size: int = SIZE) -> bytes:
    return b"\1" + reducer + coder + varint(size)


WHOLE, RAW = b"\0", bytes([16])
TOP_2 = b"\1" + floats(0.01)
QUANTISE_4 = bytes([18, 4, 10])
NAN, INFINITY = float("nan"), float("inf")


def top(parameter: int, unary: bytes, low: bytes = b"", numbers: bytes = bytes(8)) -> bytes:
    return head(TOP_2, RAW) + bytes([parameter]) + varint(len(unary)) + low + unary + numbers


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "ends at its version"),
        (b"\2" + frame_of("raw")[1:], "format version 2; this side reads 1"),
        (head(b"\7", RAW), "first stage 7"),
        (head(WHOLE, b"\7"), "stage 7"),
        (head(WHOLE, bytes([1])), "stage 1"),
        (head(b"\1" + floats(2.0), RAW), "above 0 and at most 1"),
        (head(b"\1" + floats(NAN), RAW), "above 0 and at most 1"),
        (head(b"\2" + floats(0.5) + b"\2", RAW), "scaling of randomk is 2"),
        (head(b"\3\0", RAW), "rank of 1 to 255"),
        (head(WHOLE, bytes([17, 2])), "no format 2"),
        (head(WHOLE, bytes([17, 0])) + b"\x80" + bytes(2 * SIZE), "exponent of half is -128"),
        (head(WHOLE, bytes([18, 5, 10])), "8, 4 or 1 bits, not 5"),
        (head(WHOLE, bytes([18, 4, 17])), "2..17 numbers"),
        (head(WHOLE, bytes([18, 4, 2])), "power of two"),
        (head(WHOLE, bytes([19, 0, 9])), "1 to 127 levels"),
        (head(WHOLE, bytes([19, 4, 9])) + floats(1) + b"\2", "no form 2"),
        (head(WHOLE, RAW)[:-2] + b"\xff" * 9, "more than 9 bytes"),
        (head(WHOLE, RAW) + floats(NAN) + bytes(4 * SIZE - 4), "not finite"),
        (head(WHOLE, RAW) + floats(-INFINITY) + bytes(4 * SIZE - 4), "not finite"),
        (head(WHOLE, RAW) + floats(3e38) + bytes(4 * SIZE - 4), "beyond 2..126"),
        (head(WHOLE, bytes([17, 0])) + b"\0" + bytes(2 * SIZE - 2) + b"\0\x7c", "not finite"),
        (head(WHOLE, bytes([17, 1])) + bytes(2 * SIZE - 2) + b"\xc0\x7f", "not finite"),
        *(
            (head(WHOLE, QUANTISE_4) + floats(scale) + bytes(SIZE // 2), "a scale that is negative, not finite")
            for scale in (NAN, INFINITY, -1.0, 1e38)
        ),
        (head(WHOLE, bytes([20])) + floats(NAN) + bytes(SIZE // 8), "a scale that is negative, not finite"),
        (head(b"\2" + floats(0.01) + b"\1", RAW) + bytes(4) + floats(8e37) + floats(0), "once it is scaled"),
        (top(32, b"\3"), "parameter 32"),
        (top(0, b"\1"), "1 indices in 1 bytes, where 2 are to be"),
        (top(0, b"\7"), "3 indices in 1 bytes, where 2 are to be"),
        (top(0, b"\3\0"), "2 indices in 2 bytes"),
        (top(0, b"\1" + bytes(29)), "do not take 30 bytes"),
        (top(6, b"\x21", low=b"\0\0"), "the index 257 is out of range: the vector has 200 numbers"),
        (top(6, b"\x11", low=b"\xc0\1"), "the index 200 is out of range: the vector has 200 numbers"),
        (top(31, b"\3", low=b"\xff" * 8), "is out of range"),
        (top(0, b"\3", numbers=bytes(9)), "1 bytes too many"),
        (top(0, b"\3", numbers=bytes(7)), "8 bytes are needed, 7 are left"),
        (head(b"\3\1", RAW) + varint(1 << 40), "shapes of 1099511627776 matrices"),
        (head(b"\3\1", RAW) + bytes([1, 10, 21]), "do not make the 200 numbers"),
        (head(b"\3\1", RAW) + bytes([2, 0, 0, 10, 20]), "without numbers"),
        (head(b"\3\1", RAW) + bytes([1, 1]) + varint(200), "takes more than it has"),
        (head(b"\3\1", RAW) + bytes([1, 10, 20]) + floats(1e30) * 30, "product is not finite"),
    ],
)
def test_what_is_wrong_is_said(data: bytes, reason: str) -> None:
    with pytest.raises(PayloadError, match=reason):
        open_frame(data, size=SIZE)


def test_only_codecs_that_are_allowed_are_opened() -> None:
    data = frame_of("topk(0.1) >> quantise(4)")
    for allowed in (None, ["topk", "quantise", "raw"], {"topk(0.1) >> quantise(4)"}):
        open_frame(data, size=SIZE, allowed=allowed)
    for refused in ([], ["topk"], ["quantise"], ["topk(0.1)"], {"topk(0.1) >> quantise(8)"}):
        with pytest.raises(PayloadError, match=r"topk\(0\.1\) >> quantise\(4\) is not allowed here; allowed: "):
            open_frame(data, size=SIZE, allowed=refused)
    open_frame(frame_of("topk(0.1)"), size=SIZE, allowed=["topk"])


@pytest.mark.parametrize("text", [text for texts in FAMILIES.values() for text in texts])
def test_a_small_frame_of_a_large_vector_takes_little_memory(text: str) -> None:
    """The size is the model's, 2**30: nothing is taken for numbers that the frame does not hold."""
    size = 1 << 30
    codec = parse_codec(text)
    reducer, coder = codec.reducer, codec.coder
    first = WHOLE if reducer is None else bytes([reducer.code]) + reducer.pack()
    then = RAW if coder is None else bytes([coder.code]) + coder.pack()
    rng = np.random.default_rng(0)
    tracemalloc.start()
    try:
        for _ in range(200):
            data = head(first, then, size) + rng.bytes(500)
            with pytest.raises(PayloadError):
                open_frame(data, size=size)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 500_000


def broken(change: Callable[[Any], object]) -> NDArray[np.float32]:
    found = vector()
    change(found)
    return found


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY, -1e20])
@pytest.mark.parametrize("place", [0, 17, SIZE - 1])
def test_what_is_not_finite_is_not_encoded(value: float, place: int) -> None:
    damaged = broken(lambda found: found.__setitem__(place, value))
    for codec in (Quantise(8), TopK(0.1)):
        with pytest.raises(PayloadError, match=f"number {place} of the vector is"):
            encode(codec, damaged, seed=0)


def test_what_is_no_vector_and_no_total_is_refused() -> None:
    for wrong in (vector().astype(np.float64), vector().reshape(10, 20)):
        with pytest.raises(ConfigError, match="flat float32 vector"):
            encode(Quantise(8), wrong, seed=0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="not negative"):
        encode(Quantise(8), vector(), seed=-1)
    with pytest.raises(ConfigError, match="shapes of the arrays"):
        encode(LowRank(2), vector(), seed=0, shapes=[(10, 10)])
    frame = open_frame(frame_of("raw"), size=SIZE)
    for total in (np.zeros(SIZE + 1), np.zeros((1, SIZE)), np.zeros(SIZE, np.float16)):
        with pytest.raises(ConfigError, match="added to as many float32 or float64"):
            frame.add_to(total)  # type: ignore[arg-type]


def test_a_refused_frame_leaves_the_accumulator_as_it_was() -> None:
    total = np.arange(SIZE, dtype=np.float32)
    before = total.copy()
    damaged = bytearray(frame_of("quantise(8)"))
    damaged[-SIZE - 1] = 0x7F  # the scale's exponent
    damaged[-SIZE - 2] = 0x80
    with pytest.raises(PayloadError, match="scale"):
        open_frame(memoryview(damaged), size=SIZE).add_to(total)
    assert np.array_equal(total, before)
