"""Contamination: which items of a task occur in the training texts, by runs of words that both have.

As in Brown et al. 2020 (arXiv:2005.14165, appendix C) an item overlaps where a run of 13 of its words, or all of them
where it has fewer, stands in a training document. Here an item needs 5 words to be looked for, and runs that more than
two items of a task share are the task's own wording and count for none. The words are those of what is asked; where
these don't tell items apart (`Which sentence is right?`), those of the choices behind it, or of an answer of 8 words.

Words are compared in lower case, without punctuation, so layout doesn't hide a copy.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from evaluation.tasks import Probe
from evaluation.words import ngrams, words_of
from rlhf.functional.intervals import proportion_estimate

LONGEST_RUN = 13
SHORTEST_RUN, SHORTEST_ANSWER = 5, 8
OWN_WORDING = 2  # items that may share a run
CONTAMINATED = 0.02  # of the items, and at least two: a task is named
FACTOR = np.uint64(6364136223846793005)  # of the rolling hash (Knuth's, for 64 bits)
AT_ONCE = 2**20  # words

Run = tuple[str, ...]


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
        runs = {run for items in self._tasks.values() for item in items for run in _all_runs(item)}
        words = sorted({word for run in runs for word in run})
        self._numbers = {word: number for number, word in enumerate(words, 1)}  # 0: a word of no item
        self._wanted: dict[int, dict[tuple[int, ...], Run]] = {}
        for run in runs:
            self._wanted.setdefault(len(run), {})[tuple(self._numbers[word] for word in run)] = run
        self._hashes = {
            length: np.unique([_hashes(np.array(run, dtype=np.uint64), length)[0] for run in wanted])
            for length, wanted in self._wanted.items()
        }
        self._found: set[Run] = set()
        self._waiting: list[int] = []
        self.documents = self.words = 0  # that passed by

    def read(self, texts: Iterable[str]) -> None:
        """Looks into more training texts."""
        for text in texts:
            words = words_of(text)
            self.documents, self.words = self.documents + 1, self.words + len(words)
            self._waiting += [self._numbers.get(word, 0) for word in words]
            self._waiting.append(0)  # no run goes on in the next document
            if len(self._waiting) >= AT_ONCE:
                self._look()

    def results(self) -> dict[str, Overlap]:
        """What was found of each task."""
        self._look()
        return {name: self._overlap(items) for name, items in self._tasks.items()}

    def _look(self) -> None:
        numbers = np.array(self._waiting, dtype=np.uint64)
        for length, wanted in self._wanted.items():
            if len(numbers) < length:
                continue
            places = np.flatnonzero(np.isin(_hashes(numbers, length), self._hashes[length]))
            for place in places.tolist():
                run = wanted.get(tuple(self._waiting[place : place + length]))
                if run:  # equal hashes alone prove nothing
                    self._found.add(run)
        self._waiting.clear()

    def _overlap(self, items: Sequence[Item]) -> Overlap:
        found = [next((run for run in item.runs if run in self._found), None) for item in items]
        answered = sum(item.answered in self._found for item in items)
        overlapping = tuple(bool(run) if item.runs else None for item, run in zip(items, found, strict=True))
        return Overlap(overlapping, answered, " ".join(next((run for run in found if run), ())))


def _items(probes: Sequence[Probe]) -> list[Item]:
    asked = [words_of(probe.text) for probe in probes]
    answers = [words_of(probe.answer) for probe in probes]
    own = _telling([_runs(words) for words in asked])
    behind = [
        _runs(words + words_of(" ".join(probe.choices)))
        | _runs(words + answer)
        | (_runs(answer) if len(answer) >= SHORTEST_ANSWER else set())
        if not told
        else set()
        for probe, words, answer, told in zip(probes, asked, answers, own, strict=True)
    ]
    found = []
    for words, answer, told, more in zip(asked, answers, own, _telling(behind), strict=True):
        kept = tuple(sorted(told or more))
        last = tuple([*words, *answer][-max(LONGEST_RUN, len(answer) + 1) :])
        found.append(Item(kept, last if kept and answer else None))
    return found


def _runs(words: Sequence[str]) -> set[Run]:
    return set(ngrams(words, min(LONGEST_RUN, len(words)))) if len(words) >= SHORTEST_RUN else set()


def _telling(runs: Sequence[set[Run]]) -> list[set[Run]]:
    """Of each item the runs that are not the task's own wording."""
    shared = Counter(run for own in runs for run in own)
    return [{run for run in own if shared[run] <= OWN_WORDING} for own in runs]


def _all_runs(item: Item) -> list[Run]:
    return [*item.runs, *([item.answered] if item.answered else [])]


def _hashes(numbers: np.ndarray, length: int) -> np.ndarray:
    """A hash of each run of this length; uint64 arithmetic goes round."""
    count = len(numbers) - length + 1
    found = np.zeros(count, dtype=np.uint64)
    for offset in range(length):
        found = found * FACTOR + numbers[offset : offset + count] + np.uint64(1)
    return found
