"""Runs of words that texts share with the items of tasks: contamination is measured by them, documents removed.

As in Brown et al. 2020 (arXiv:2005.14165, appendix C) an item is looked for by its runs of 13 words, or by all of its
words where it has fewer. Here an item needs 5 words to be looked for, and runs that more than two items of a task share
are the task's own wording and count for none. Where what is asked doesn't tell items apart (as in `Which sentence is
right?`), the choices are read behind it, and an answer of 8 words counts alone. Words are compared in lower case,
without punctuation.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from rlhf.data.words import ngrams, words_of

LONGEST_RUN = 13
SHORTEST_RUN, SHORTEST_ANSWER = 5, 8
OWN_WORDING = 2  # items that may share a run
FACTOR = np.uint64(6364136223846793005)  # of the rolling hash (Knuth's, for 64 bits)
MARK_BITS = np.uint64(22)  # of a hash that say at a glance whether it may be one that is looked for

Run = tuple[str, ...]


class Probe(NamedTuple):
    """What of an item should not occur in training."""

    text: str  # what is asked, without instruction and demonstrations where these aren't the item's own
    answer: str
    choices: tuple[str, ...] = ()


def item_runs(probes: Sequence[Probe], longest: int = LONGEST_RUN) -> list[tuple[Run, ...]]:
    """The runs by which each item of a task is looked for, sorted; none where it can't be told from the others."""
    asked = [words_of(probe.text) for probe in probes]
    own = _telling([_runs(words, longest) for words in asked])
    behind = [
        set() if told else _runs_behind(words, probe, longest)
        for probe, words, told in zip(probes, asked, own, strict=True)
    ]
    return [tuple(sorted(told or more)) for told, more in zip(own, _telling(behind), strict=True)]


def _runs_behind(asked: list[str], probe: Probe, longest: int) -> set[Run]:
    """Those of what is asked with the right answer, and with all choices, behind it."""
    answer = words_of(probe.answer)
    alone = _runs(answer, longest) if len(answer) >= SHORTEST_ANSWER else set()
    return _runs(asked + answer, longest) | _runs(asked + words_of(" ".join(probe.choices)), longest) | alone


def _runs(words: list[str], longest: int) -> set[Run]:
    return set(ngrams(words, min(longest, len(words)))) if len(words) >= min(SHORTEST_RUN, longest) else set()


def _telling(runs: Sequence[set[Run]]) -> list[set[Run]]:
    """Of each item the runs that are not the task's own wording."""
    shared = Counter(run for own in runs for run in own)
    return [{run for run in own if shared[run] <= OWN_WORDING} for own in runs]


class _Wanted(NamedTuple):
    """The runs of one length, by their hashes."""

    hashes: np.ndarray  # uint64 [N], rising
    rows: np.ndarray  # int32 [N, length], the numbers of their words


class RunSearch:
    """Looks for many runs at once. It holds arrays alone, so it is small, and can be sent to other processes."""

    def __init__(self, runs: Iterable[Run]) -> None:
        by_length: dict[int, set[Run]] = {}
        for run in runs:
            by_length.setdefault(len(run), set()).add(run)
        self._words = sorted({word for found in by_length.values() for run in found for word in run})
        self._numbers = {word: number for number, word in enumerate(self._words, 1)}  # 0: a word of no run
        self._marks = np.zeros(2 ** int(MARK_BITS), dtype=bool)
        self._wanted = {length: self._prepared(length, by_length[length]) for length in sorted(by_length)}

    def _prepared(self, length: int, runs: set[Run]) -> _Wanted:
        rows = np.array([[self._numbers[word] for word in run] for run in runs], dtype=np.int32)
        hashes = np.zeros(len(rows), dtype=np.uint64)
        for word in rows.T:
            hashes = _with(hashes, word.astype(np.uint64))
        self._marks[_marks(hashes)] = True
        order = np.argsort(hashes)
        return _Wanted(hashes[order], rows[order])

    def find(self, documents: Sequence[Sequence[str]]) -> list[tuple[int, Run]]:
        """Every run in documents of words, with the number of the document; once for each place where it stands."""
        get = self._numbers.get
        flat: list[int] = []
        starts = []
        for words in documents:
            starts.append(len(flat))
            flat += [get(word, 0) for word in words]
            flat.append(0)  # no run goes on in the next document
        numbers = np.array(flat, dtype=np.uint64)
        found: list[tuple[int, Run]] = []
        for length, wanted in self._wanted.items():
            for place, row in _places(numbers, length, wanted, self._marks):
                document = int(np.searchsorted(starts, place, side="right")) - 1
                found.append((document, tuple(self._words[number - 1] for number in wanted.rows[row])))
        return found


def _places(numbers: np.ndarray, length: int, wanted: _Wanted, marks: np.ndarray) -> list[tuple[int, int]]:
    """Where runs of this length stand in the numbers of words, and which they are."""
    if len(numbers) < length:
        return []
    hashes = _hashes(numbers, length)
    places = np.flatnonzero(marks[_marks(hashes)])
    rows = np.searchsorted(wanted.hashes, hashes[places])
    known = rows < len(wanted.hashes)
    known[known] = wanted.hashes[rows[known]] == hashes[places[known]]
    windows = np.lib.stride_tricks.sliding_window_view(numbers, length)
    found = zip(places[known].tolist(), rows[known].tolist(), strict=True)
    return [(place, row) for place, row in found if (windows[place] == wanted.rows[row]).all()]  # hashes prove nothing


def _marks(hashes: np.ndarray) -> np.ndarray:
    return (hashes * FACTOR) >> (np.uint64(64) - MARK_BITS)


def _hashes(numbers: np.ndarray, length: int) -> np.ndarray:
    """A hash of each run of this length; uint64 arithmetic goes round."""
    count = len(numbers) - length + 1
    found = np.zeros(count, dtype=np.uint64)
    for offset in range(length):
        found = _with(found, numbers[offset : offset + count])
    return found


def _with(hashes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The hashes of runs with one more word each."""
    return hashes * FACTOR + numbers + np.uint64(1)
