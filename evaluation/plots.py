"""What a judge knows about itself, and how far optimising against it leads, as pictures.

Each function writes one PNG; none needs a display.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation.preference import Bin
from rlhf.functional.intervals import Estimate

LONGEST_NAME = 40
BARS, NOTES = "tab:blue", "tab:orange"


def plot_reliability(path: Path, before: Sequence[Bin], after: Sequence[Bin], titles: tuple[str, str]) -> None:
    """Two reliability diagrams side by side: how often a judge is right, by how sure it is.

    The width of a point's mark stands for the share of the comparisons; on the diagonal a judge knows itself.
    """
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for place, bins, title in zip(axes, (before, after), titles, strict=True):
        total = sum(found.pairs for found in bins)
        place.plot([0.5, 1], [0.5, 1], color="grey", linestyle="--", linewidth=1, label="knows itself")
        place.scatter(
            [found.confidence for found in bins],
            [found.accuracy for found in bins],
            s=[20 + 800 * found.pairs / total for found in bins],
            color=BARS,
            alpha=0.7,
        )
        place.set(xlabel="confidence", xlim=(0.48, 1.02), ylim=(0, 1.02))
        _title(place, title)
        place.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy")
    axes[0].legend(loc="lower right")
    figure.savefig(path)


def plot_shares(path: Path, shares: Mapping[str, Estimate], title: str) -> None:
    """Named shares with their intervals, one line each; 0.5 is marked."""
    rows = list(shares.items())
    figure = Figure(figsize=(8, 1.2 + 0.32 * len(rows)), layout="constrained")
    place = figure.subplots()
    heights = range(len(rows), 0, -1)
    for height, (_, share) in zip(heights, rows, strict=True):
        place.plot([share.low, share.high], [height, height], color=BARS, linewidth=2)
        place.plot([share.mean], [height], "o", color=BARS)
    place.axvline(0.5, color="grey", linestyle="--", linewidth=1)
    place.set_yticks(list(heights), [_shown(name) for name, _ in rows])
    for label in place.get_yticklabels():
        label.set_parse_math(False)  # a source may be called $anything$
    place.set(xlim=(0, 1.02), xlabel="share, with its 95 % interval")
    place.grid(alpha=0.3, axis="x")
    _title(place, title)
    figure.savefig(path)


def plot_scores_by_length(path: Path, lengths: Sequence[float], scores: Sequence[float], title: str) -> None:
    """A point for every response: its length in tokens and its score."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    place = figure.subplots()
    place.scatter(lengths, scores, s=8, alpha=0.3, color=BARS, edgecolors="none")
    place.set(xlabel="tokens of the response", ylabel="score")
    place.grid(alpha=0.3)
    _title(place, title)
    figure.savefig(path)


def plot_differences(path: Path, differences: Sequence[float], title: str) -> None:
    """How far the scores of chosen and rejected responses lie apart; below 0 the judge is wrong."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    place = figure.subplots()
    reach = max(map(abs, differences)) or 1.0
    edges = [reach * (edge / 30 - 1) for edge in range(61)]  # 0 is one of them
    place.hist([d for d in differences if d > 0], bins=edges, color=BARS, label="right")
    place.hist([d for d in differences if d <= 0], bins=edges, color=NOTES, label="wrong")
    place.set(xlabel="score of the chosen less that of the rejected response", ylabel="comparisons")
    place.legend()
    _title(place, title)
    figure.savefig(path)


class Mark(NamedTuple):
    """A point of a curve over KL."""

    kl: float  # nats; an estimate below 0 is drawn at 0
    value: float
    label: str  # beside the point


def plot_course(
    path: Path, courses: Mapping[str, Mapping[str, Sequence[Mark]]], title: str, kl_budget: float | None = None
) -> None:
    """Curves over the square root of KL: one panel for each unit ("score", "gold"), in it each named way of optimising
    as points in order. The budget, in nats, is a line."""
    figure = Figure(figsize=(4.5 * len(courses), 4.2), layout="constrained")
    panels = figure.subplots(1, len(courses), squeeze=False)[0]
    for place, (unit, ways) in zip(panels, courses.items(), strict=True):
        for number, (name, points) in enumerate(ways.items()):
            style = ("o-", "s--", "^:", "D-.")[number % 4]
            roots = [max(point.kl, 0.0) ** 0.5 for point in points]
            place.plot(roots, [point.value for point in points], style, label=_shown(name), markersize=4)
            for root, point in zip(roots, points, strict=True):
                place.annotate(
                    point.label, (root, point.value), xytext=(4, -10), textcoords="offset points", fontsize=8
                )
        if kl_budget is not None:
            place.axvline(kl_budget**0.5, color="grey", linestyle=":", linewidth=1, label="KL budget")
        place.set(xlabel="square root of KL to the reference, nats per response", ylabel=unit)
        place.grid(alpha=0.3)
        place.legend()
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)


def _title(place: Axes, text: str) -> None:
    place.set_title(text, fontsize=10).set_parse_math(False)


def _shown(name: str) -> str:
    """A name on one line, not too long."""
    plain = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    return plain if len(plain) <= LONGEST_NAME else plain[: LONGEST_NAME - 3] + "..."
