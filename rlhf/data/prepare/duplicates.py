"""Documents that are there twice, or nearly: which of them are dropped, and for which that stays.

Equal texts: the first one stays. Near duplicates (rlhf.data.prepare.sketches says what counts as one) are found in
rounds: documents whose signatures agree in a band are in one bucket, those of a bucket are paired, the pairs' own texts
are compared, and of the graph of those that are alike a document stays unless one that it is like stays already; they
are taken in the order of how many they are like, most first, the earlier of equals. So every document that is dropped
is like one that stays (no chains), and several copies of one text go with it, however they are ordered.

The last round pairs documents with 32 neighbours in their buckets. Before it, where buckets are larger than that, all
are compared with the first one in them, so that thousands of copies of one page don't make millions of pairs.

All of it works on arrays that stay on the disk or are read in portions: in memory are 14 bytes for every document with
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
NEIGHBOURS = 32  # documents of a band's bucket that each is paired with
ROUNDS = 3  # the last one pairs neighbours, those before it thin large buckets out
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


def near_duplicates(store: Store, equal: np.ndarray, changed: float, workers: Workers) -> np.ndarray:
    """DROPPED, for every document that is like another one that stays, by document; `equal` are gone already."""
    found = store.array("near")
    if found is not None:
        return found
    sketches = Sketches(store, equal["document"].astype(np.int64))
    dropped = [np.zeros(0, dtype=DROPPED)]
    for number in range(ROUNDS):
        large = number < ROUNDS - 1
        pairs = candidates(sketches, changed, large, f"pairs-{number}")
        if large and not len(pairs):
            continue
        alike = compared(store, pairs, workers, changed, f"alike-{number}")
        new = dropped_of(alike, np.unique(np.concatenate([one["of"] for one in dropped])))
        dropped.append(new)
        sketches.without(new["document"].astype(np.int64))
    found = np.sort(np.concatenate(dropped), order="document")
    store.keep_array("near", found)
    return found


# Pairs to be looked at


class Sketches:
    """The documents with a sketch, by their places among those with one."""

    def __init__(self, store: Store, gone: np.ndarray) -> None:
        """`gone` are numbers of documents that are dropped already."""
        self.store = store
        self.documents = np.concatenate([np.zeros(0, np.int64), *(part.sketched_documents() for part in store.parts)])
        words = [part.rows["words"][part.sketched_documents() - part.first] for part in store.parts]
        self.words = np.concatenate([np.zeros(0, np.uint32), *words])
        self.there = np.ones(len(self.documents), dtype=bool)
        self.bands = next((len(part.keys) for part in store.parts if part.sketched), 0)
        self.without(gone)

    def without(self, gone: np.ndarray) -> None:
        """Leaves documents out."""
        self.there &= ~np.isin(self.documents, gone)

    def slots(self, places: np.ndarray) -> np.ndarray:
        """Their slot bytes, uint8 [places, SLOTS]."""
        parts = self.store.parts
        firsts = np.array([part.first_sketched for part in parts], dtype=np.uint64)
        owners = np.searchsorted(firsts, places, side="right") - 1
        found = np.zeros((len(places), parts[0].slots.shape[1]), dtype=np.uint8)
        for owner in np.unique(owners):
            mine = owners == owner
            found[mine] = parts[owner].slots[places[mine] - firsts[owner]]
        return found

    def likely(self, first: np.ndarray, second: np.ndarray, changed: float) -> np.ndarray:
        """Which of the pairs of places may be near duplicates by what their signatures say."""
        least = least_similarity(np.maximum(self.words[first], self.words[second]).astype(np.float64), changed)
        may: np.ndarray = estimated(self.slots(first), self.slots(second)) >= least - margin(least)
        return may


def candidates(sketches: Sketches, changed: float, large: bool, name: str) -> np.ndarray:
    """Pairs of documents that are probably near duplicates, uint64 [N, 2], the earlier first, in rising order.

    `large`: those of buckets that are too large for pairing all, with the first document in them.
    """
    found = sketches.store.array(name)
    if found is not None:
        return found
    pairs = np.zeros(0, dtype=np.uint64)  # packed
    with Bar("corpus: near duplicates, large groups" if large else "corpus: near duplicates", sketches.bands) as bar:
        for band in range(sketches.bands):
            fresh = [pairs]
            for low, high in _ranges(int(sketches.there.sum()), 32):
                key, place = _sorted_keys(sketches, band, low, high)
                for first, second in _led(key, place) if large else _neighbours(key, place):
                    may = sketches.likely(first, second, changed)
                    fresh.append((first[may] << np.uint64(32)) | second[may])
            pairs = np.unique(np.concatenate(fresh))
            bar.show(band + 1, pairs=len(pairs))
    first, second = sketches.documents[pairs >> np.uint64(32)], sketches.documents[pairs & np.uint64(2**32 - 1)]
    found = np.stack([first, second], axis=1).astype(np.uint64)
    sketches.store.keep_array(name, found)
    return found


def _sorted_keys(sketches: Sketches, band: int, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """The keys of a band in this range, rising, and the places that have them, both uint64.

    Equal keys are ordered by those of the next band: in a large bucket, which documents of one template make, those
    that agree in more than one band are neighbours.
    """
    keys, places = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
    for part in (part for part in sketches.store.parts if part.sketched):
        mine = np.asarray(part.keys[band])
        here = slice(part.first_sketched, part.first_sketched + part.sketched)
        chosen = np.flatnonzero(sketches.there[here] & (mine >= low) & (mine <= high))
        following = part.keys[(band + 1) % sketches.bands][chosen]
        keys.append((mine[chosen].astype(np.uint64) << np.uint64(32)) | following)
        places.append(chosen + part.first_sketched)
    key, place = np.concatenate(keys), np.concatenate(places).astype(np.uint64)
    order = np.argsort(key, kind="stable")
    return key[order] >> np.uint64(32), place[order]


def _led(key: np.ndarray, place: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The places of large buckets, each with the first one of its bucket."""
    if not len(key):
        return
    starts = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
    sizes = np.diff([*starts, len(key)])
    leaders = np.repeat(np.minimum.reduceat(place, starts), sizes)
    yield from _portions(leaders, place, (leaders != place) & np.repeat(sizes > NEIGHBOURS + 1, sizes))


def _neighbours(key: np.ndarray, place: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Places of one bucket that stand near each other."""
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


# Pairs looked at


class Text(NamedTuple):
    """Where a document's text is."""

    path: str
    start: int
    size: int


def compared(store: Store, pairs: np.ndarray, workers: Workers, changed: float, name: str) -> np.ndarray:
    """The pairs that are near duplicates, DROPPED, in the order of `pairs`; which of the two goes is not said yet."""
    found = store.array(name)
    if found is not None:
        return found
    likeness = [np.zeros(0)]
    with Bar("corpus: comparing", len(pairs)) as bar:
        done = 0
        for batch, similar in workers.in_order(_compare, _batches(store, pairs, changed)):
            likeness.append(similar)
            done += batch
            bar.show(done)
    similar = np.concatenate(likeness)
    chosen = similar > 0
    found = np.zeros(int(chosen.sum()), dtype=DROPPED)
    found["document"], found["of"], found["similarity"] = pairs[chosen, 1], pairs[chosen, 0], similar[chosen]
    store.keep_array(name, found)
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


def dropped_of(alike: np.ndarray, needed: np.ndarray | None = None) -> np.ndarray:
    """Of pairs of documents that are alike, those that are dropped, DROPPED, by document; see the module.

    `needed` are documents for which others have gone already: they stay.
    """
    ends = np.concatenate([alike["document"], alike["of"]])
    documents, counts = np.unique(ends, return_counts=True)
    free = ~np.isin(documents, needed) if needed is not None else np.ones(len(documents), dtype=bool)
    order = np.lexsort((documents, -counts, free))
    rank = np.empty(len(documents), dtype=np.int64)
    rank[order] = np.arange(len(documents))
    one, other = (rank[np.searchsorted(documents, alike[side])] for side in ("document", "of"))
    later, earlier = np.maximum(one, other), np.minimum(one, other)
    sequence = np.lexsort((earlier, later))
    stays = np.ones(len(documents), dtype=bool)
    may_go = free[order]
    dropped = []
    for edge in sequence.tolist():
        document = later[edge]
        if may_go[document] and stays[document] and stays[earlier[edge]]:
            stays[document] = False
            dropped.append(edge)
    chosen = np.array(dropped, dtype=np.int64)
    found = np.zeros(len(chosen), dtype=DROPPED)
    found["document"], found["of"] = documents[order[later[chosen]]], documents[order[earlier[chosen]]]
    found["similarity"] = alike["similarity"][chosen]
    return np.sort(found, order="document")
