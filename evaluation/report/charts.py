"""Charts as SVG that can stand in a page: no fonts, no ids that another chart has, no text taken for mathematics.

Every series has a line style, a marker and a name at its end, so that no colour is needed to tell it from another.
"""

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from evaluation.report.reading import one_line

SIZE, SMALL = (5.0, 3.2), (3.6, 2.6)  # inches
COLOURS = ("#0b5cad", "#c2410c", "#0f766e", "#7c3aed", "#4b5563")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2, 2, 2)))
MARKERS, GLYPHS = "os^Dv", "●■▲◆▼"
WHOLE = ("step", "update", "tokens of the response")  # axes on which there is nothing between whole numbers
STEEP = 5.0  # times the smallest value: the axis of a loss becomes logarithmic
INK, FAINT = "#374151", "#9ca3af"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True,
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
}
REFERENCE = re.compile(r"(?:(?<=url\(#)|(?<=^#))[^)]+")
FONT = re.compile(r" font-family: [^;]*;")
LONG_NUMBER = re.compile(r"\d+\.\d{2,}")


class Line(NamedTuple):
    """A series: points in order, with intervals where they are known."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    intervals: Sequence[tuple[float, float] | None] = ()
    marks: Sequence[str] = ()  # beside the points


def draw_lines(
    name: str,
    title: str,
    labels: tuple[str, str],
    lines: Sequence[Line],
    *,
    at: tuple[float, str] | None = None,
    share: bool = False,
    falling: bool = False,
) -> str:
    """Curves over a common axis. `labels` are those of the axes; `at` marks a place on the horizontal one; `share`
    says that values lie between 0 and 1, `falling` that they fall as losses do: where the first steps would hide the
    others, the vertical axis is logarithmic. `name` is to be unique in the page.
    """
    with _figure(name, SIZE) as (figure, place):
        for number, line in enumerate(lines):
            _draw(place, number, line)
        if at is not None:
            place.axvline(at[0], color=INK, linestyle=":", linewidth=1.2)
            place.annotate(
                at[1], (at[0], 0), xycoords=("data", "axes fraction"), xytext=(-4, 4), textcoords="offset points",
                ha="right", fontsize=9,
            )  # fmt: skip
        values = {value for line in lines for value in line.y}
        if share:
            place.set_ylim(-0.03, 1.05)
        elif min(values, default=0.0) > 0 and max(values) > STEEP * min(
            values
        ):  # the first steps would hide the others
            place.set_yscale("log")
            place.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            place.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            place.yaxis.set_minor_formatter(NullFormatter())
        elif len(values) == 1 and (value := values.pop()):  # rounding is no news
            place.set_ylim(min(0.0, 1.5 * value), max(0.0, 1.5 * value))
        place.locator_params(axis="x", nbins=8, integer=labels[0] in WHOLE)
        _finish(place, title, labels)
        _name_lines(place, lines)
        return _svg(figure, name, title)


def draw_fewshot(
    name: str, title: str, counts: Sequence[str], lines: Sequence[Line], chance: float | None, *, small: bool = True
) -> str:
    """Accuracy over numbers of demonstrations, which stand side by side whatever lies between them; `x` of the lines
    are places in `counts`. Models are drawn beside each other, so that none hides another.
    """
    with _figure(name, SMALL if small else SIZE) as (figure, place):
        if chance is not None:
            place.axhline(chance, color=INK, linestyle=":", linewidth=1.2)
            place.annotate(
                f"chance {chance:.3g}", (1, chance), xycoords=("axes fraction", "data"), xytext=(-2, 3),
                textcoords="offset points", fontsize=9, ha="right",
            )  # fmt: skip
        shifts = [0.12 * (number - (len(lines) - 1) / 2) for number in range(len(lines))]
        for number, (line, shift) in enumerate(zip(lines, shifts, strict=True)):
            _draw(place, number, line._replace(x=[x + shift for x in line.x]), always_marked=True)
        place.set_ylim(-0.03, 1.05)
        place.set_xticks(range(len(counts)), list(counts))
        _finish(place, title, ("demonstrations", "accuracy"))
        _name_lines(place, lines)
        return _svg(figure, name, title)


def draw_reliability(name: str, title: str, judges: Sequence[Line]) -> str:
    """How often a judge is right over how sure it is; on the diagonal it knows itself."""
    with _figure(name, SIZE) as (figure, place):
        place.plot([0.5, 1], [0.5, 1], color=FAINT, linewidth=1)
        place.annotate("knows itself", (0.5, 0.5), xytext=(8, -4), textcoords="offset points", fontsize=9)
        for number, line in enumerate(judges):
            _draw(place, number, line, always_marked=True)
        place.set(xlim=(0.48, 1.02), ylim=(min([0.45, *(min(line.y) for line in judges if line.y)]), 1.02))
        _finish(place, title, ("how sure it is", "how often it is right"))
        _name_lines(place, judges)
        return _svg(figure, name, title)


def draw_points(name: str, title: str, labels: tuple[str, str], x: Sequence[float], y: Sequence[float]) -> str:
    """A point for each pair of values."""
    with _figure(name, SIZE) as (figure, place):
        place.plot(x, y, "o", markersize=3.5, alpha=0.35, color=COLOURS[0], markeredgewidth=0)
        place.locator_params(axis="x", nbins=8, integer=labels[0] in WHOLE)
        _finish(place, title, labels)
        return _svg(figure, name, title)


@contextmanager
def _figure(name: str, size: tuple[float, float]) -> Iterator[tuple[Figure, Axes]]:
    """A figure of so many inches; in our style while it is drawn and written."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        yield figure, figure.subplots()


def _inches(place: Axes) -> tuple[float, float]:
    figure = place.get_figure(root=True)
    return tuple(figure.get_size_inches()) if figure else SIZE


def _draw(place: Axes, number: int, line: Line, *, always_marked: bool = False) -> None:
    colour, dash, marker = (options[number % len(options)] for options in (COLOURS, DASHES, MARKERS))
    few = always_marked or len(line.x) <= 24
    place.plot(
        line.x, line.y, color=colour, linestyle=dash, marker=marker, markevery=1 if few else max(1, len(line.x) // 8),
        markeredgewidth=0,
    )  # fmt: skip
    known = [(x, y, bounds) for x, y, bounds in zip(line.x, line.y, line.intervals, strict=False) if bounds]
    if known:
        below = [max(0.0, y - bounds[0]) for _, y, bounds in known]
        above = [max(0.0, bounds[1] - y) for _, y, bounds in known]
        xs, ys = [point[0] for point in known], [point[1] for point in known]
        place.errorbar(xs, ys, [below, above], fmt="none", ecolor=colour, elinewidth=1, alpha=0.6)
    for x, y, mark in zip(line.x, line.y, line.marks, strict=False):
        if mark:
            place.annotate(mark, (x, y), xytext=(3, -11), textcoords="offset points", fontsize=9, color=colour)


def _finish(place: Axes, title: str, labels: tuple[str, str]) -> None:
    place.set_xlabel(one_line(labels[0]), fontsize=10)
    place.set_ylabel(one_line(labels[1]), fontsize=10)
    place.set_title(
        one_line(title, 26 if _inches(place) < SIZE else 44),
        fontsize=11,
        loc="left",
        fontweight="bold",
    )
    place.tick_params(which="both", length=0)
    place.set_axisbelow(True)
    if place.get_yscale() == "linear":
        place.locator_params(axis="y", nbins=6)
    for axis in (place.xaxis, place.yaxis):
        axis.get_offset_text().set_fontsize(9)


def _name_lines(place: Axes, lines: Sequence[Line]) -> None:
    """The name of every line at the height of its end, right of the chart, as near as names can stand."""
    last = [(number, line.y[-1]) for number, line in enumerate(lines) if line.y]
    if len(lines) < 2:  # the title has said it
        return
    place.set_ylim(place.get_ylim())  # as it is now
    (low, high), apart = place.get_ylim(), 0.085 * SIZE[1] / _inches(place)[1]
    heights = _spread([(value - low) / (high - low) if high > low else 0.5 for _, value in last], apart)
    for (number, _), height in zip(last, heights, strict=True):
        place.annotate(
            f"{GLYPHS[number % len(GLYPHS)]} {one_line(lines[number].name, 18)}", (1, height),
            xycoords="axes fraction", xytext=(5, 0), textcoords="offset points", va="center", fontsize=9.5,
            color=COLOURS[number % len(COLOURS)],
        )  # fmt: skip


def _spread(heights: Sequence[float], apart: float) -> list[float]:
    """The nearest heights in the same order of which no two are nearer than `apart`, around the middle if need be."""
    order = sorted(range(len(heights)), key=lambda i: (heights[i], -i))
    placed = [0.0] * len(heights)
    floor = -math.inf
    for i in order:
        placed[i] = floor = max(heights[i], floor + apart)
    ceiling = max(1.0, apart * (len(heights) - 1))
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - apart
    return placed


# SVG


def _svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an `svg` element of a page, named for those who can't see it."""
    file = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a character that the font for measuring lacks
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    root = ElementTree.fromstring(file.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    _plain(root, name)
    width, height = (f"{inches * 72:g}" for inches in figure.get_size_inches())
    root.attrib = {"viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": one_line(label, 200)}
    return ElementTree.tostring(root, encoding="unicode")


def _plain(root: ElementTree.Element, name: str) -> None:
    """Takes off what a page doesn't need: namespaces, fonts, digits, ids that nothing refers to; the other ids begin
    with `name`.
    """
    used = {found for node in root.iter() for value in node.attrib.values() for found in REFERENCE.findall(value)}
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2]
        found = {key.rpartition("}")[2]: value for key, value in node.attrib.items()}
        if found.pop("id", None) in used:
            found["id"] = f"{name}-{node.attrib['id']}"
        for key in ("href", "clip-path", "style"):
            if key in found:
                found[key] = REFERENCE.sub(lambda match: f"{name}-{match[0]}", found[key])
        if "style" in found:
            found["style"] = FONT.sub("", found["style"])
        for key in ("d", "x", "y", "transform"):
            if key in found:
                found[key] = " ".join(LONG_NUMBER.sub(lambda digits: f"{float(digits[0]):.1f}", found[key]).split())
        node.attrib = found
        node.tail = None
        if node.text is not None and not node.text.strip():
            node.text = None
