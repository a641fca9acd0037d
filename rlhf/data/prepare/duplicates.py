"""Documents that are there twice, or nearly: which of them are dropped, and for which that stays.

Equal texts: the first one stays. Near duplicates (rlhf.data.prepare.sketches says what counts as one) are found in
three passes: bands of signatures that agree give pairs, the pairs' own texts are compared, and of the graph of those
that are alike a document stays unless one that it is like stays already; they are taken in the order of how many they
are like, most first, the earlier of equals. So every document that is dropped is like one that stays (no chains), and
several copies of one text go with it, however they are ordered.

All of it works on arrays that stay on the disk or are read in portions: in memory are 13 bytes for every document with
a sketch, 30 for every pair of like documents, and what sorting 4 million keys takes.
"""

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from rlhf.data.pieces import pieces
from rlhf.data.prepare.filters import PIECE
from rlhf.data.prepare.sketches import (
    WordHashes,
    are_near_duplicates,
    estimated,
    least_similarity,
    margin,
    run_hashes,
    similarity,
)
from rlhf.data.prepare.store import Store
from rlhf.data.prepare.workers import Workers
from rlhf.data.words import words_of
from rlhf.runtime import Bar

AT_ONCE = 2**22  # documents that are sorted at a time
NEIGHBOURS = 32  # documents of a band's bucket that each is paired with, besides the first one
PAIRS_AT_ONCE = 2**16
COMPARED_AT_ONCE = 256  # pairs that a worker is given at a time

DROPPED = np.dtype([("document", "<u8"), ("of", "<u8"), ("similarity", "<f4")])  # similarity 1: equal texts


# Equal texts


def equal_texts(store: Store) -> np.ndarray:
    """DROPPED, for every document whose text stood in an earlier one, by document."""
    found = store.array("equal")
    if found is not None:
        return found
    dropped = [np.zeros(0, dtype=DROPPED)]
    for low, high in _ranges(store.documents, 64):
        digests, numbers = [], []
        for part in store.parts:
            mine = np.asarray(part.rows["digest"])
            chosen = np.flatnonzero((mine[:, 0] >= low) & (mine[:, 0] <= high))
            digests.append(mine[chosen])
            numbers.append(chosen + part.first)
        digest, number = np.concatenate(digests), np.concatenate(numbers)
        order = np.lexsort((number, digest[:, 1], digest[:, 0]))
        digest, number = digest[order], number[order]
        again = np.concatenate([[False], (digest[1:] == digest[:-1]).all(1)])[: len(number)]
        first = np.maximum.accumulate(np.where(again, 0, np.arange(len(number))))
        rows = np.zeros(int(again.sum()), dtype=DROPPED)
        rows["document"], rows["of"], rows["similarity"] = number[again], number[first[again]], 1.0
        dropped.append(rows)
    found = np.sort(np.concatenate(dropped), order="document")
    store.keep_array("equal", found)
    return found


def _ranges(count: int, bits: int) -> Iterator[tuple[int, int]]:
    """Ranges of keys of so many bits, evenly distributed, so that each has about AT_ONCE of so many documents."""
    steps = max(1, -(-count // AT_ONCE))
    edges = [(1 << bits) * step // steps for step in range(steps + 1)]
    for low, high in pairwise(edges):
        yield low, high - 1


# Pairs to be looked at


def candidates(store: Store, equal: np.ndarray, changed: float, what: str) -> np.ndarray:
    """Pairs of documents that are probably near duplicates, uint64 [N, 2], the earlier first, in rising order.

    `equal` are documents that are gone already.
    """
    found = store.array("candidates")
    if found is not None:
        return found
    with_sketch = np.concatenate([np.zeros(0, dtype=np.int64), *(part.sketched_documents() for part in store.parts)])
    there = ~np.isin(with_sketch, equal["document"].astype(np.int64))
    words = np.concatenate([np.zeros(0, dtype=np.uint32), *(part.rows["words"] for part in store.parts)])[with_sketch]
    bands = next((len(part.keys) for part in store.parts if part.sketched), 0)
    pairs = np.zeros(0, dtype=np.uint64)  # packed
    with Bar(what, bands) as bar:
        for band in range(bands):
            fresh = [pairs]
            for low, high in _ranges(int(there.sum()), 32):
                for first, second in _in_one_bucket(store, there, band, bands, low, high):
                    likely = _likely(store, first, second, words, changed)
                    fresh.append((first[likely] << np.uint64(32)) | second[likely])
            pairs = np.unique(np.concatenate(fresh))
            bar.show(band + 1, pairs=len(pairs))
    found = np.stack([with_sketch[pairs >> np.uint64(32)], with_sketch[pairs & np.uint64(2**32 - 1)]], axis=1)
    found = np.sort(found.astype(np.uint64), axis=1)
    store.keep_array("candidates", found)
    return found


def _in_one_bucket(
    store: Store, there: np.ndarray, band: int, bands: int, low: int, high: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of places among the documents with a sketch whose keys of this band agree, uint64, PAIRS_AT_ONCE at most.

    In a bucket those come together that agree in the next band as well, so that in a large one, which documents of one
    template make, the nearest ones are paired.
    """
    keys, places = [], []
    for part in store.parts:
        mine = np.asarray(part.keys[band]) if part.sketched else np.zeros(0, dtype=np.uint32)
        here = slice(part.first_sketched, part.first_sketched + part.sketched)
        chosen = np.flatnonzero(there[here] & (mine >= low) & (mine <= high))
        following = part.keys[(band + 1) % bands][chosen] if part.sketched else mine
        keys.append((mine[chosen].astype(np.uint64) << np.uint64(32)) | following)
        places.append(chosen + part.first_sketched)
    key, place = np.concatenate(keys), np.concatenate(places).astype(np.uint64)
    order = np.argsort(key, kind="stable")
    key, place = key[order] >> np.uint64(32), place[order]
    starts = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))[: len(key)]
    leaders = np.repeat(np.minimum.reduceat(place, starts), np.diff([*starts, len(key)])) if len(key) else place
    yield from _portions(leaders, place, leaders != place)
    for offset in range(1, NEIGHBOURS + 1):
        same = key[offset:] == key[:-offset]
        if not same.any():
            return
        yield from _portions(place[:-offset], place[offset:], same)


def _portions(first: np.ndarray, second: np.ndarray, chosen: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    at = np.flatnonzero(chosen)
    for start in range(0, len(at), PAIRS_AT_ONCE):
        a, b = first[at[start : start + PAIRS_AT_ONCE]], second[at[start : start + PAIRS_AT_ONCE]]
        yield np.minimum(a, b), np.maximum(a, b)


def _likely(store: Store, first: np.ndarray, second: np.ndarray, words: np.ndarray, changed: float) -> np.ndarray:
    """Which of the pairs may be near duplicates by what their signatures say."""
    least = least_similarity(np.maximum(words[first], words[second]).astype(np.float64), changed)
    likely: np.ndarray = estimated(_slots(store, first), _slots(store, second)) >= least - margin(least)
    return likely


def _slots(store: Store, places: np.ndarray) -> np.ndarray:
    """The slot bytes of documents by their places among those with a sketch."""
    firsts = np.array([part.first_sketched for part in store.parts], dtype=np.uint64)
    owners = np.searchsorted(firsts, places, side="right") - 1
    found = np.zeros((len(places), store.parts[0].slots.shape[1]), dtype=np.uint8)
    for owner in np.unique(owners):
        mine = owners == owner
        found[mine] = store.parts[owner].slots[places[mine] - firsts[owner]]
    return found


# Pairs looked at


class Text(NamedTuple):
    """Where a document's text is."""

    path: str
    start: int
    size: int


def near_duplicates(store: Store, pairs: np.ndarray, workers: Workers, changed: float, what: str) -> np.ndarray:
    """The pairs that are near duplicates, DROPPED, in the order of `pairs`; which of the two goes is not said yet."""
    found = store.array("near")
    if found is not None:
        return found
    likeness = [np.zeros(0)]
    with Bar(what, len(pairs)) as bar:
        done = 0
        for batch, similar in workers.in_order(_compare, _batches(store, pairs, changed)):
            likeness.append(similar)
            done += batch
            bar.show(done)
    similar = np.concatenate(likeness)
    chosen = similar > 0
    found = np.zeros(int(chosen.sum()), dtype=DROPPED)
    found["document"], found["of"], found["similarity"] = pairs[chosen, 1], pairs[chosen, 0], similar[chosen]
    store.keep_array("near", found)
    return found


def _batches(
    store: Store, pairs: np.ndarray, changed: float
) -> Iterator[tuple[int, tuple[list[tuple[Text, Text]], float]]]:
    for start in range(0, len(pairs), COMPARED_AT_ONCE):
        mine = np.asarray(pairs[start : start + COMPARED_AT_ONCE])
        first, second = (_places(store, mine[:, side]) for side in (0, 1))
        yield len(mine), (list(zip(first, second, strict=True)), changed)


def _places(store: Store, documents: np.ndarray) -> list[Text]:
    found = []
    for document, owner in zip(documents.tolist(), store.part_of(documents).tolist(), strict=True):
        part = store.parts[owner]
        row = part.rows[document - part.first]
        found.append(Text(str(part.path / "text.bin"), int(row["start"]), int(row["size"])))
    return found


_hashes = WordHashes()


def _compare(_: Any, given: tuple[Sequence[tuple[Text, Text]], float]) -> np.ndarray:
    """The similarity of each pair of texts, 0 where they are no near duplicates. A worker does this."""
    pairs, changed = given

    @lru_cache(maxsize=256)
    def read(text: Text) -> tuple[list[str], np.ndarray]:
        with open(text.path, "rb") as file:
            beginning = next(pieces(os.pread(file.fileno(), text.size, text.start).decode(), PIECE))
        words = words_of(beginning)
        return words, run_hashes([words], _hashes)[0]

    found = np.zeros(len(pairs))
    for number, (first, second) in enumerate(pairs):
        (words, runs), (other_words, other_runs) = read(first), read(second)
        likeness = similarity(runs, other_runs)
        if are_near_duplicates(words, other_words, likeness, changed):
            found[number] = likeness
    return found


# Who stays


def dropped_of(alike: np.ndarray) -> np.ndarray:
    """Of pairs of documents that are alike, those that are dropped, DROPPED, by document; see the module."""
    ends = np.concatenate([alike["document"], alike["of"]])
    documents, counts = np.unique(ends, return_counts=True)
    order = np.lexsort((documents, -counts))
    rank = np.empty(len(documents), dtype=np.int64)
    rank[order] = np.arange(len(documents))
    one, other = (rank[np.searchsorted(documents, alike[side])] for side in ("document", "of"))
    later, earlier = np.maximum(one, other), np.minimum(one, other)
    sequence = np.lexsort((earlier, later))
    stays = np.ones(len(documents), dtype=bool)
    dropped = []
    for edge in sequence.tolist():
        document = later[edge]
        if stays[document] and stays[earlier[edge]]:
            stays[document] = False
            dropped.append(edge)
    chosen = np.array(dropped, dtype=np.int64)
    found = np.zeros(len(chosen), dtype=DROPPED)
    found["document"], found["of"] = documents[order[later[chosen]]], documents[order[earlier[chosen]]]
    found["similarity"] = alike["similarity"][chosen]
    return np.sort(found, order="document")
