"""A second reader of frames, written from docs/codecs.md alone, bit by bit and number by number."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import numpy as np

M64 = (1 << 64) - 1


class Bytes:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def take(self, count: int) -> bytes:
        assert count <= len(self.data)
        found, self.data = self.data[:count], self.data[count:]
        return found

    def byte(self) -> int:
        return self.take(1)[0]

    def float(self) -> float:
        return float(struct.unpack("<f", self.take(4))[0])

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def numbers(self, count: int, width: int) -> list[int]:
        """`count` numbers of `width` bits, lowest bits first."""
        whole = int.from_bytes(self.take(-(-count * width // 8)), "little")
        return [whole >> (width * place) & (1 << width) - 1 for place in range(count)]

    def indices(self, count: int) -> list[int]:
        parameter, length = self.byte(), self.varint()
        low = self.numbers(count, parameter)
        unary = int.from_bytes(self.take(length), "little")
        found, at, last = [], 0, -1
        for place in range(count):
            zeros = 0
            while not unary >> at & 1:
                zeros, at = zeros + 1, at + 1
            at += 1
            last += (zeros << parameter | low[place]) + 1
            found.append(last)
        return found


def decode(frame: bytes) -> list[float]:
    """The vector of a frame."""
    data = Bytes(frame)
    assert data.byte() == 1
    reducer = data.byte()
    fraction = rank = scaled = 0.0
    if reducer in (1, 2):
        fraction = float(str(np.float32(data.float())))
    if reducer == 2:
        scaled = data.byte()
    if reducer == 3:
        rank = data.byte()
    coder = data.byte()
    settings = data.take({16: 0, 17: 1, 18: 2, 19: 2, 20: 0}[coder])
    n = data.varint()
    vector = [0.0] * n
    kept = min(n, max(1, round(fraction * n)))
    if reducer == 0:
        vector = read(data, coder, settings, n)
    elif reducer == 1:
        indices = data.indices(kept)
        for index, value in zip(indices, read(data, coder, settings, kept), strict=True):
            vector[index] = value
    elif reducer == 2:
        seed = int.from_bytes(data.take(4), "little")
        for stratum, value in enumerate(read(data, coder, settings, kept)):
            start, stop = stratum * n // kept, (stratum + 1) * n // kept
            index = start + (splitmix64(seed, stratum) >> 32) * (stop - start) // (1 << 32)
            vector[index] = value * (stop - start) if scaled else value
    else:
        parts = [(data.varint(), data.varint()) for _ in range(data.varint())]
        ranks = [min(int(rank), rows, columns) for rows, columns in parts]
        counts = [r * (rows + columns) if rows else columns for (rows, columns), r in zip(parts, ranks, strict=True)]
        numbers = iter(read(data, coder, settings, sum(counts)))
        vector = [value for part, r in zip(parts, ranks, strict=True) for value in products(numbers, *part, r)]
    assert not data.data
    return vector


def products(numbers: Iterator[float], rows: int, columns: int, rank: int) -> list[float]:
    if not rows:
        return [next(numbers) for _ in range(columns)]
    left = [[next(numbers) for _ in range(rank)] for _ in range(rows)]
    right = [[next(numbers) for _ in range(rank)] for _ in range(columns)]
    return [sum(p * q for p, q in zip(row, column, strict=True)) for row in left for column in right]


def splitmix64(seed: int, place: int) -> int:
    value = seed + 0x9E3779B97F4A7C15 * (place + 1) & M64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & M64
    value = (value ^ value >> 27) * 0x94D049BB133111EB & M64
    return value ^ value >> 31


def read(data: Bytes, coder: int, settings: bytes, count: int) -> list[float]:
    if coder == 16:
        return [data.float() for _ in range(count)]
    if coder == 17 and settings[0] == 0:
        exponent = struct.unpack("<b", data.take(1))[0]
        return [float(value) * 2.0**exponent for (value,) in struct.iter_unpack("<e", data.take(2 * count))]
    if coder == 17:
        return [float(struct.unpack("<f", b"\0\0" + data.take(2))[0]) for _ in range(count)]
    if coder == 20:
        norm = data.float()
        return [norm if bit else -norm for bit in data.numbers(count, 1)]
    chunk = 1 << settings[1]
    scales = [data.float() for _ in range(-(-count // chunk))]
    if coder == 18:
        width = settings[0] & 0x7F
        codes = data.numbers(count, width)
        levels = {1: 1, 4: 7, 8: 127}[width]
        return [scales[place // chunk] * step(code, width) / levels for place, code in enumerate(codes)]
    levels = settings[0]
    width = 2 if levels == 1 else 4 if levels <= 7 else 8
    if data.byte() == 0:
        codes = data.numbers(count, width)
        return [scales[place // chunk] * step(code, width) / levels for place, code in enumerate(codes)]
    kept = data.varint()
    found = [0.0] * count
    indices = data.indices(kept)
    width = 1 if levels == 1 else width
    for place, code in zip(indices, data.numbers(kept, width), strict=True):
        found[place] = scales[place // chunk] * step(code, width) / levels
    return found


def step(code: int, width: int) -> int:
    return 2 * code - 1 if width == 1 else code - (1 << width - 1)
