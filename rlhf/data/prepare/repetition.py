"""How much of a document repeats itself, by runs of words (Rae et al. 2021, arXiv:2112.11446, table A1).

    top n, n = 2, 3, 4          the commonest run of n words: its characters times how often it is there, twice at least
    duplicate n, n = 5 ... 10   characters of words in a run of n words that was there before; none counts twice

each over the characters of all words. In scripts without spaces a word is one sign, and two signs count as a word here:
a Chinese word has about two. Runs are told apart exactly, many documents at a time: a run is the number of its first
n - 1 words with the number of its last one, and only runs whose parts come twice can come twice themselves.
"""

from collections.abc import Sequence

import numpy as np

TOP, DUPLICATE = (2, 3, 4), (5, 6, 7, 8, 9, 10)
NAMES = (*(f"top_{n}gram" for n in TOP), *(f"duplicate_{n}grams" for n in DUPLICATE))


def repeated_shares(documents: Sequence[Sequence[str]], unit: int = 1) -> np.ndarray:
    """The shares named by NAMES, float64 [documents, 9], of documents of words; 0 for one without words.

    `unit` is how many of what the documents hold count as a word.
    """
    numbers: dict[str, int] = {}
    ids = np.array([numbers.setdefault(w, len(numbers)) for words in documents for w in words], dtype=np.int64)
    document = np.repeat(np.arange(len(documents)), [len(words) for words in documents])
    lengths = np.array([len(word) for word in numbers], dtype=np.int64)[ids] if len(ids) else ids
    characters = np.concatenate([[0], np.cumsum(lengths)])  # in front of each word
    total = np.maximum(np.bincount(document, lengths, len(documents)), 1)
    shares = np.zeros((len(NAMES), len(documents)))
    run = document * len(numbers) + ids  # of each word on: the number of the run of n - 1 words that begins there
    repeated = np.ones(len(ids), dtype=bool)  # whether it comes twice
    for length in range(2, min(unit * DUPLICATE[-1], len(ids)) + 1):
        starts = np.flatnonzero(repeated[: 1 - length] & repeated[1 : len(ids) - length + 2])
        starts = starts[document[starts] == document[starts + length - 1]]
        keys = run[starts] * len(numbers) + ids[starts + length - 1]
        _, first, which, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
        again = counts[which] > 1
        run, repeated = np.zeros_like(ids), np.zeros_like(repeated)
        run[starts], repeated[starts] = which, again
        n, rest = divmod(length, unit)
        if rest == 0 and n in TOP:
            often = starts[first[counts > 1]]
            sizes = (characters[often + length] - characters[often]) * counts[counts > 1]
            np.maximum.at(shares[n - TOP[0]], document[often], sizes)
        elif rest == 0 and n in DUPLICATE:
            again[first] = False
            shares[n - TOP[0]] = _covered(starts[again], length, lengths, document, len(documents))
    return (shares / total).T


def _covered(starts: np.ndarray, length: int, lengths: np.ndarray, document: np.ndarray, documents: int) -> np.ndarray:
    """The characters of each document's words that lie in runs of this length at these places."""
    edges = np.zeros(len(lengths) + 1, dtype=np.int64)
    edges[starts] += 1  # each place stands there once
    np.subtract.at(edges, starts + length, 1)
    inside = np.cumsum(edges[:-1]) > 0
    return np.bincount(document[inside], lengths[inside], documents)
