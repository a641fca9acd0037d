"""By what documents are compared: their runs of three words, as a multiset, and a MinHash signature of it.

A changed word changes three runs, so of a document of W words (with marks at both ends, W + 2 runs) of which k were
replaced, k being few and apart, the copy shares W + 2 - 3k runs, and the Jaccard similarity of both is

    J = (W + 2 - 3k) / (W + 2 + 3k)

(more where a word was put in or left out, or where changes touch). Copies in which each word was changed with
probability p have at most k = pW + 1.96 sqrt(p(1 - p)W) changed words in 97.5 % of the cases, so a pair counts as near
duplicates from that J on: with p = 0.05 it is 0.57 at 20 words (k = 2), 0.58 at 100 (9), 0.67 at 1,000 (63). Below
1 / p words k is 1. Unrelated texts are below 0.05. Short texts made of the same phrases in another order come near the
limit, so below 50 words the words that differ are counted as well, and must be k at most.

Pairs to be looked at come from locality-sensitive hashing (Indyk & Motwani 1998): of signatures of 128 slots, in bands
of r, a pair of similarity J agrees in one of 128 / r bands with probability 1 - (1 - J^r)^(128 / r). r is the largest
that finds 95 % at 100 words, which is 4 for p = 0.05: 0.99999 of the pairs at J = 0.74 (5 of 100 words), 0.98 at 0.58,
and 0.0002 at 0.05. Signatures are rensa's, whose fast MinHash (Dahlgaard et al. 2017, arXiv:1704.04370) is unbiased on
short documents too.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import rensa

RUN = 3  # words
SLOTS = 128
SEED = 1
UNSURE = 1.96  # standard deviations: 97.5 % of a normal distribution are below
SHORT = 50  # words, below which they are compared one by one
FOUND, FOUND_AT = 0.95, 100  # of the pairs at the limit are to be candidates, in documents of so many words
_FACTOR, _STEP = np.uint64(6364136223846793005), np.uint64(0x9E3779B97F4A7C15)
_DOCUMENT_BITS = np.uint64(16)
_MARK = 0  # stands before the first word and behind the last
_MOST_KNOWN = 2**18  # words whose hashes are kept


class WordHashes(dict[str, int]):
    """64 bits for every word, the same in all processes."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _MOST_KNOWN:
            self.clear()
        found = self[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
        return found


def run_hashes(documents: Sequence[Sequence[str]], hashes: WordHashes) -> tuple[np.ndarray, np.ndarray]:
    """The runs of every document as different numbers, a run that comes again as another one: uint64 [runs], and where
    each document's begin and the last one's end: int64 [documents + 1]. At most 65,536 documents.
    """
    marks = [_MARK] * (RUN - 1)
    flat: list[int] = []
    for words in documents:
        flat += marks
        flat += map(hashes.__getitem__, words)
    numbers = np.array([*flat, *marks], dtype=np.uint64)
    sizes = np.array([len(words) + RUN - 1 for words in documents], dtype=np.int64)
    found = np.zeros(len(flat), dtype=np.uint64)
    for offset in range(RUN):
        found = found * _FACTOR + numbers[offset : offset + len(found)]
    document = np.repeat(np.arange(len(documents), dtype=np.uint64), sizes)
    ordered = np.sort((document << (np.uint64(64) - _DOCUMENT_BITS)) | (_mixed(found) >> _DOCUMENT_BITS))
    places = np.arange(len(ordered))
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(ordered)]
    again = (places - np.maximum.accumulate(np.where(first, places, 0))).astype(np.uint64)
    return _mixed((ordered << _DOCUMENT_BITS) + again * _STEP), np.concatenate([[0], np.cumsum(sizes)])


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Each number as another one, all bits of which depend on all of its bits (splitmix64)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        numbers = (numbers ^ (numbers >> np.uint64(shift))) * np.uint64(factor)
    return numbers


def signatures(documents: Sequence[Sequence[str]], hashes: WordHashes) -> np.ndarray:
    """The MinHash signature of each document of words, uint32 [documents, SLOTS]."""
    if not documents:
        return np.zeros((0, SLOTS), dtype=np.uint32)
    found, bounds = run_hashes(documents, hashes)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(found, bounds.astype(np.uint64), SLOTS, SEED)
    return np.array(matrix.to_rows(), dtype=np.uint32)


def similarity(first: np.ndarray, second: np.ndarray) -> float:
    """The Jaccard similarity of two documents' runs, each different from the others of its document."""
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / max(len(first) + len(second) - shared, 1)


def most_changed(words: np.ndarray, changed: float) -> np.ndarray:
    """How many words of near duplicates of so many words may differ, int64; see above."""
    most = changed * words + UNSURE * np.sqrt(changed * (1 - changed) * words)
    return np.where(words < 1 / changed, 1, most).astype(np.int64)


def least_similarity(words: np.ndarray, changed: float) -> np.ndarray:
    """From which similarity on documents of so many words count as near duplicates, float64; see above."""
    most, runs = RUN * most_changed(words, changed), words + RUN - 1
    return np.maximum(runs - most, 1) / (runs + most)


def are_near_duplicates(first: Sequence[str], second: Sequence[str], likeness: float, changed: float) -> bool:
    """Whether documents of these words, whose runs are so similar, differ in few enough words."""
    words = np.array(max(len(first), len(second)))
    if likeness < float(least_similarity(words, changed)):
        return False
    return int(words) >= SHORT or words_apart(first, second) <= int(most_changed(words, changed))


def words_apart(first: Sequence[str], second: Sequence[str]) -> int:
    """How many words must be replaced, put in or left out to make one of the other (Levenshtein's distance)."""
    before = list(range(len(second) + 1))
    for row, word in enumerate(first, 1):
        now = [row]
        for column, other in enumerate(second, 1):
            now.append(min(before[column] + 1, now[-1] + 1, before[column - 1] + (word != other)))
        before = now
    return before[-1]


def band_rows(changed: float) -> int:
    """How many slots of a signature make a band."""
    at = float(least_similarity(np.array([FOUND_AT]), changed)[0])
    finds = [rows for rows in range(1, 9) if 1 - (1 - at**rows) ** (SLOTS // rows) >= FOUND]
    return max(finds)


def band_keys(found: np.ndarray, rows: int) -> np.ndarray:
    """A key for each band of signatures [N, SLOTS]: uint32 [bands, N]; equal bands have equal keys."""
    bands = SLOTS // rows
    keys = np.zeros((len(found), bands), dtype=np.uint64)
    for row in range(rows):
        keys = _mixed(keys + found[:, row : bands * rows : rows].astype(np.uint64) + _STEP)
    return np.ascontiguousarray((keys >> np.uint64(32)).astype(np.uint32).T)


def slot_bytes(found: np.ndarray) -> np.ndarray:
    """One byte of each slot, uint8 [N, SLOTS]: b-bit MinHash (Li & König 2010), from which similarity is estimated."""
    return _mixed(found.astype(np.uint64)).astype(np.uint8)


def estimated(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The similarity of pairs estimated from their slot bytes [N, SLOTS], of which some agree by chance."""
    agree = (first == second).mean(1)
    return (agree - 1 / 256) / (1 - 1 / 256)


def margin(similarity: np.ndarray) -> np.ndarray:
    """Three standard deviations of such an estimate."""
    return 3 * np.sqrt(similarity * (1 - similarity) / SLOTS)
