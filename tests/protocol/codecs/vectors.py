"""Codecs of every kind, and vectors that are hard on them."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedpace.protocol.codecs import QSGD, Codec, Half, LowRank, Quantise, RandomK, Raw, Sign, TopK

CHUNKS = [32, 64, 1024]
fractions = st.sampled_from([1e-4, 0.01, 0.1, 0.5, 1.0]) | st.floats(1e-6, 1, exclude_min=True)

nearest = (
    st.builds(Raw)
    | st.builds(Half, st.sampled_from(["float16", "bfloat16"]))
    | st.builds(Quantise, st.sampled_from([8, 4, 1]), st.just("nearest"), st.sampled_from(CHUNKS))
    | st.builds(Sign)
)
"""Coders without chance."""

stochastic = st.builds(
    Quantise, st.sampled_from([8, 4, 1]), st.just("stochastic"), st.sampled_from(CHUNKS)
) | st.builds(QSGD, st.integers(1, 127), st.sampled_from(CHUNKS))
coders = nearest | stochastic
sparsifiers = st.builds(TopK, fractions) | st.builds(RandomK, fractions, st.booleans())
reducers = sparsifiers | st.builds(LowRank, st.integers(1, 5))
chains = st.builds(lambda first, then: first >> then, reducers, coders)
codecs: st.SearchStrategy[Codec] = coders | reducers | chains


@st.composite
def vectors(draw: st.DrawFn, most: int = 3000) -> NDArray[np.float32]:
    """Normal, heavy-tailed, tied or mostly zero ones, from 2**-60 to 2**64 in magnitude, any size."""
    size = draw(st.integers(0, 70) | st.integers(0, most))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    kind = draw(st.sampled_from(["normal", "heavy", "ties", "few", "zero"]))
    found: NDArray[Any] = rng.standard_normal(size)
    if kind == "heavy":
        found = found**5
    elif kind == "ties":
        found = np.rint(found)
    elif kind == "few":
        found *= rng.random(size) < 0.02
    elif kind == "zero":
        found *= 0
    scale = 2.0 ** draw(st.sampled_from([0, 0, -60, -20, 50]))
    return (found * scale).astype(np.float32)


def shapes_of(size: int) -> list[tuple[int, ...]]:
    """Matrices, an array of three dimensions, vectors and a scalar that make a vector of this size."""
    shapes: list[tuple[int, ...]] = []
    for shape in ((7, 5), (), (4, 3, 2), (0, 3), (9,), (40, 30), (3, 600)):
        length = int(np.prod(shape))
        if length <= size:
            shapes.append(shape)
            size -= length
    return [*shapes, (size,)]


def square(vector: NDArray[Any]) -> float:
    """|x|^2 in float64."""
    return float(np.square(vector, dtype=np.float64).sum())
