"""A matplotlib figure as SVG inside a page: the page's fonts and colours, no ids that another figure has too."""

from __future__ import annotations

import io
import re
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.figure import Figure

from fedpace.simulations.comparison.report.palette import css_colour

_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"
_STYLE_ID = re.compile(r"(s\d+u?)(~\w+)?")
_COLOUR = re.compile(r"#[0-9a-f]{6}")
_NUMBER = re.compile(r"-?\d+\.\d+")
_LEVEL = re.compile(r"M (\S+) (\S+) L (\S+) \2(?= M|$)")
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedpace",
    "path.simplify": True,
    "path.simplify_threshold": 0.1,
}


def embedded(figure: Figure, name: str, title: str) -> str:
    """The `<svg>` element. `name` is unique in the page; `title` is read to those who do not see the chart.

    A group whose gid is a strategy's style ("s3", or "s3~1" where there are several) gets it as a class.
    The same figure gives the same text.
    """
    file = io.StringIO()
    with mpl.rc_context(_SETTINGS):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(file.getvalue())
    for unwanted in (*root.findall(f"{_SVG}metadata"), *root.findall(f"{_SVG}defs/{_SVG}style/..")):
        root.remove(unwanted)
    used = _used(root)
    for element in root.iter():
        _clean(element, name, used)
    width, height = root.attrib["viewBox"].split()[2:]
    root.attrib = {"viewBox": f"0 0 {width} {height}", "role": "img", "class": "chart", "aria-label": title}
    return ElementTree.tostring(root, encoding="unicode").strip()


def _used(root: ElementTree.Element) -> set[str]:
    """The ids that something refers to."""
    used: set[str] = set()
    for element in root.iter():
        for value in element.attrib.values():
            used.update(_REFERENCE.findall(value))
        used.add(element.attrib.get(_HREF, "").removeprefix("#"))
    return used


def _clean(element: ElementTree.Element, name: str, used: set[str]) -> None:
    element.tag = element.tag.removeprefix(_SVG)
    element.text, element.tail = (text if text and text.strip() else None for text in (element.text, element.tail))
    attributes = element.attrib
    if found := attributes.pop("id", None):
        if of_strategy := _STYLE_ID.fullmatch(found):
            attributes["class"] = f"series {of_strategy[1]}"
        elif found in used:
            attributes["id"] = f"{name}-{found}"
    if target := attributes.pop(_HREF, None):
        attributes["href"] = f"#{name}-{target.removeprefix('#')}"
    for key, value in attributes.items():
        if key in ("d", "points", "x", "y", "transform", "width", "height"):
            value = _NUMBER.sub(lambda number: f"{float(number[0]):.1f}".removesuffix(".0"), value)
        if key == "style":
            value = _restyled(value)
        if key == "d":
            value = _shortened(value)
        attributes[key] = _REFERENCE.sub(rf"url(#{name}-\1)", value)


def _shortened(path: str) -> str:
    """A path with what SVG lets one leave out: the letter of a line after another, one of a level line's heights."""
    path = " ".join(path.split())
    path = _LEVEL.sub(r"M\1 \2H\3", path)
    return path if "C" in path or "Q" in path else path.replace(" L ", " ").replace("M ", "M")


def _restyled(style: str) -> str:
    """A style with the page's font, and CSS variables for stand-ins."""
    kept = [part for part in style.split("; ") if not part.startswith("font-family")]
    return _COLOUR.sub(lambda match: css_colour(match[0]) or match[0], "; ".join(kept))
