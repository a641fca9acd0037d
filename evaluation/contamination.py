"""Contamination: which items of a task occur in the training texts, by runs of words that both have.

What is looked for is said in rlhf.data.overlap: runs of 13 words, or all words of a shorter item. Words are compared in
lower case, without punctuation, so layout doesn't hide a copy.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf.data.overlap import LONGEST_RUN, Probe, Run, RunSearch, item_runs
from rlhf.data.words import words_of
from rlhf.functional.intervals import proportion_estimate

CONTAMINATED = 0.02  # of the items, and at least two: a task is named
AT_ONCE = 2**20  # words


class Item(NamedTuple):
    """What is looked for of one item."""

    runs: tuple[Run, ...]  # any of which tells it
    answered: Run | None  # the run that ends with the right answer; None where the item has too few words


class Overlap(NamedTuple):
    """What was found of one task."""

    items: tuple[bool | None, ...]  # whether each overlaps; None for items that can't be told from the others
    answered: int  # items that occur with their answer
    example: str  # a run that was found

    def summary(self) -> dict[str, Any]:
        """As summaries write it."""
        found = sum(item is True for item in self.items)
        checked = sum(item is not None for item in self.items)
        figures: dict[str, Any] = {"items": len(self.items), "too_short": len(self.items) - checked}
        if checked:
            figures |= proportion_estimate(found, checked).as_keys("overlap", 4)
        contaminated = found >= 2 and found >= CONTAMINATED * checked
        example = {"example": self.example} if self.example else {}
        return {**figures, "overlap_with_answer": self.answered, "contaminated": contaminated, **example}


class OverlapSearch:
    """Looks for the items of tasks in training texts, which pass by once."""

    def __init__(self, tasks: Mapping[str, Sequence[Probe]]) -> None:
        self._tasks = {name: _items(probes) for name, probes in tasks.items()}
        self._search = RunSearch(run for items in self._tasks.values() for item in items for run in _all_runs(item))
        self._found: set[Run] = set()
        self._waiting: list[list[str]] = []
        self._waiting_words = 0
        self.documents = self.words = 0  # that passed by

    def read(self, texts: Iterable[str]) -> None:
        """Looks into more training texts."""
        for text in texts:
            words = words_of(text)
            self.documents, self.words = self.documents + 1, self.words + len(words)
            self._waiting.append(words)
            self._waiting_words += len(words)
            if self._waiting_words >= AT_ONCE:
                self._look()

    def results(self) -> dict[str, Overlap]:
        """What was found of each task."""
        self._look()
        return {name: self._overlap(items) for name, items in self._tasks.items()}

    def _look(self) -> None:
        self._found.update(run for _, run in self._search.find(self._waiting))
        self._waiting.clear()
        self._waiting_words = 0

    def _overlap(self, items: Sequence[Item]) -> Overlap:
        found = [next((run for run in item.runs if run in self._found), None) for item in items]
        answered = sum(item.answered in self._found for item in items)
        overlapping = tuple(bool(run) if item.runs else None for item, run in zip(items, found, strict=True))
        return Overlap(overlapping, answered, " ".join(next((run for run in found if run), ())))


def _items(probes: Sequence[Probe]) -> list[Item]:
    found = []
    for probe, runs in zip(probes, item_runs(probes), strict=True):
        answer = words_of(probe.answer)
        whole = [*words_of(probe.text), *answer]
        last = tuple(whole[-max(LONGEST_RUN, len(answer) + 1) :])
        found.append(Item(runs, last if runs and answer else None))
    return found


def _all_runs(item: Item) -> list[Run]:
    return [*item.runs, *([item.answered] if item.answered else [])]
