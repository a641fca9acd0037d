"""What a judge is: conversations in, scores out; and the weighted sum of several."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple, Protocol

from rlhf.errors import StageFailed
from rlhf.tokenizer import Messages

LARGEST = 1e15  # of a score


class Conversation(NamedTuple):
    """A prompt with a response: as text, and as the ids that the policy really read and drew."""

    prompt: Messages
    response: str
    ids: list[int]


class Scores(NamedTuple):
    """A score for each conversation, higher is better; and further figures of each, by name, to be logged."""

    values: list[float]
    figures: Mapping[str, list[float]] = {}  # each as long as `values`

    def figures_of_each(self) -> list[dict[str, float]]:
        """The figures of each conversation."""
        return [{name: values[i] for name, values in self.figures.items()} for i in range(len(self.values))]


def mean_figures(each: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of every figure over conversations, all of which have the same ones."""
    return {name: fmean(figures[name] for figures in each) for name in each[0]}


class Judge(Protocol):
    """Scores conversations."""

    def scores(self, conversations: Sequence[Conversation]) -> Scores:
        """The scores in the order of the conversations. Raises StageFailed where there is none."""
        ...


class Part(NamedTuple):
    """One judge of a weighted sum."""

    name: str
    weight: float
    judge: Judge


class WeightedSum:
    """The sum of several judges' scores, each times its weight.

    Its figures are each part's own scores, unweighted, under the part's name, and the part's figures as NAME_FIGURE.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)

    def scores(self, conversations: Sequence[Conversation]) -> Scores:
        """See Judge."""
        totals = [0.0] * len(conversations)
        figures: dict[str, list[float]] = {}
        for name, weight, judge in self.parts:
            found = judge.scores(conversations)
            figures[name] = found.values
            figures |= {f"{name}_{figure}": values for figure, values in found.figures.items()}
            totals = [total + weight * value for total, value in zip(totals, found.values, strict=True)]
        check_usable("the judges' weighted sum", totals)
        return Scores(totals, figures)


def judge_models(judge: Any) -> list[tuple[str, Any]]:
    """The models behind a judge, by the names of its parts."""
    return [(part.name, part.judge.model) for part in getattr(judge, "parts", ()) if hasattr(part.judge, "model")]


def check_usable(who: str, values: Sequence[float]) -> None:
    """Raises StageFailed where a score is no finite number, or so large that its square is none in float32."""
    for place, value in enumerate(values):
        if not abs(value) <= LARGEST:
            why = f"larger than {LARGEST:g}" if math.isfinite(value) else "no finite number"
            raise StageFailed(f"{who}: score {place + 1} of {len(values)} is {value:g}, which is {why}")
