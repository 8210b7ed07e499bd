"""Colours of the report: one a strategy, the same in every chart and table, in light and in dark.

The eight hues of each scheme were searched for so that any two of them differ under every common colour blindness
(at least 0.11 in OKLab, after Machado et al. 2009) and each stands out from the page (contrast of 3 and more). A ninth
strategy takes the first hue again, dashed; an untuned row is its strategy's hue, dotted.
"""

from __future__ import annotations

from typing import Any

LIGHT = ("#3f82f9", "#c57c10", "#1e7669", "#1b1f24", "#9b88b0", "#600364", "#c50612", "#3326ad")
DARK = ("#6a9ff2", "#c2a960", "#a5e887", "#f2f3f5", "#f4b8f8", "#a47194", "#de4d00", "#8363f3")
_DASHES: tuple[Any, ...] = ("solid", (0, (6, 2)), (0, (6, 2, 1, 2)), (0, (10, 2, 2, 2)))
_DOTTED = (0, (1.2, 1.6))

# Matplotlib wants colours, not names of colours: these stand for CSS variables until `svg.embedded` puts those in.
INK, MUTED, RULE, PAGE = "#010101", "#010102", "#010103", "#010104"
_OTHERS = {INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)", PAGE: "var(--page)"}
_OUTCOMES = ("replied", "failed", "expired", "cancelled")


def place(style: str) -> int:
    """The place among all strategies that a style, "s3" or "s3u", stands for."""
    return int(style.removeprefix("s").removesuffix("u"))


def colour(style: str) -> str:
    """The stand-in for a strategy's colour."""
    return f"#0202{place(style) % len(LIGHT):02x}"


def dashes(style: str) -> Any:
    """How a strategy's line is drawn, for matplotlib's `linestyle`."""
    return _DOTTED if style.endswith("u") else _DASHES[place(style) // len(LIGHT) % len(_DASHES)]


def css_dashes(style: str) -> str:
    """The same for SVG's `stroke-dasharray`, of a line 2 units wide."""
    pattern = dashes(style)
    return "none" if pattern == "solid" else " ".join(f"{2 * length:g}" for length in pattern[1])


def outcome_colour(outcome: str) -> str:
    """The stand-in for what became of a task."""
    found = _OUTCOMES.index(outcome) if outcome in _OUTCOMES else len(_OUTCOMES)
    return f"#0303{found:02x}"


def css_outcome(outcome: str) -> str:
    return f"var(--o{int(outcome_colour(outcome)[-2:], 16)})"


def css_colour(stand_in: str) -> str | None:
    """The CSS variable that a stand-in stands for; None for any other colour."""
    if stand_in.startswith("#0202"):
        return f"var(--c{int(stand_in[-2:], 16)})"
    if stand_in.startswith("#0303"):
        return f"var(--o{int(stand_in[-2:], 16)})"
    return _OTHERS.get(stand_in)
