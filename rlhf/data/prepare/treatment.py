"""What is done with each text on its own, many at a time: mended, judged, searched for test items, masked, sketched.

A worker process runs this; it knows its steps and the texts, and gives back arrays and counts.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlhf.data.overlap import RunSearch
from rlhf.data.pieces import pieces
from rlhf.data.prepare.cleaning import clean
from rlhf.data.prepare.filters import PIECE, Limits, judge
from rlhf.data.prepare.personal import mask
from rlhf.data.prepare.sketches import SLOTS, WordHashes, band_keys, signatures, slot_bytes
from rlhf.data.words import words_of

LONGEST_EXAMPLE = 300  # characters of a removed text that are kept
EXAMPLES = 3  # of each reason for removing
EMPTY, CONTAMINATED = "empty", "decontamination"  # reasons besides the filters' names


class Steps(NamedTuple):
    """What is done, as plain values that can be sent to other processes."""

    cleaning: tuple[str, ...] = ()
    limits: Limits | None = None
    from_words: int = 0  # see rlhf.data.prepare.filters
    personal: tuple[str, ...] = ()
    items: RunSearch | None = None  # runs of words of the evaluation's items
    longest_run: int = 0  # words of such a run, at most
    band_rows: int = 0  # of a sketch; 0: none is made
    sketched_words: int = 0  # documents with fewer words get none


class Removed(NamedTuple):
    """A text that is not used."""

    number: int  # in the chunk
    why: str  # the filter's name, or another reason
    value: float | str  # what was measured; the run of words that an item has as well
    example: str  # its beginning, of some of them


class Treated(NamedTuple):
    """A chunk of texts after all steps. `kept` are the numbers of those that are used; N of them, S have a sketch."""

    kept: np.ndarray  # int64 [N]
    text: bytes  # theirs, one behind the other, UTF-8
    sizes: np.ndarray  # int64 [N], bytes of each
    words: np.ndarray  # int64 [N]
    digests: np.ndarray  # uint64 [N, 2], equal for equal texts
    sketched: np.ndarray  # int64 [S], which of the N have a sketch
    keys: np.ndarray  # uint32 [bands, S]
    slots: np.ndarray  # uint8 [S, SLOTS]
    bytes_before: np.ndarray  # int64, of every text of the chunk
    removed: list[Removed]
    cleaned: Counter[str]  # texts that each step of the cleaning changed
    masked: Counter[str]  # places that were masked, by kind
    masked_texts: Counter[str]  # texts with such a place


_hashes = WordHashes()


def treat(steps: Steps, texts: Sequence[str]) -> Treated:
    """All steps on a chunk of texts. The result of one doesn't depend on the others in the chunk."""
    before = np.array([len(text.encode()) for text in texts], dtype=np.int64)
    cleaned: Counter[str] = Counter()
    documents = []
    for text in texts:
        mended, changed = clean(text, steps.cleaning)
        cleaned.update(changed)
        documents.append(mended)
    words = [[words_of(piece) for piece in pieces(text, PIECE)] for text in documents]
    reasons = _reasons(steps, documents, words)
    examples: Counter[str] = Counter()
    removed = []
    for number, (why, value) in sorted(reasons.items()):
        examples[why] += 1
        shown = documents[number] if why != EMPTY else texts[number]
        removed.append(Removed(number, why, value, shown[:LONGEST_EXAMPLE] if examples[why] <= EXAMPLES else ""))
    kept = [number for number in range(len(texts)) if number not in reasons]
    masked, masked_texts = _mask(steps, documents, words, kept)
    data = [documents[number].encode() for number in kept]
    counts = [sum(map(len, words[number])) for number in kept]
    sketched = [place for place, count in enumerate(counts) if steps.band_rows and count >= steps.sketched_words]
    found = signatures([words[kept[place]][0] for place in sketched], _hashes)
    return Treated(
        np.array(kept, dtype=np.int64),
        b"".join(data),
        np.array([len(one) for one in data], dtype=np.int64),
        np.array(counts, dtype=np.int64),
        np.array([_digest(one) for one in data], dtype=np.uint64).reshape(-1, 2),
        np.array(sketched, dtype=np.int64),
        band_keys(found, steps.band_rows) if steps.band_rows else np.zeros((0, 0), dtype=np.uint32),
        slot_bytes(found) if steps.band_rows else np.zeros((0, SLOTS), dtype=np.uint8),
        before,
        removed,
        cleaned,
        masked,
        masked_texts,
    )


def _reasons(
    steps: Steps, documents: Sequence[str], words: Sequence[Sequence[list[str]]]
) -> dict[int, tuple[str, float | str]]:
    """Why each document that is not used isn't."""
    found: dict[int, tuple[str, float | str]] = {
        number: (EMPTY, 0.0) for number, text in enumerate(documents) if not text.strip()
    }
    if steps.limits:
        for number, verdict in enumerate(judge(documents, words, steps.limits, steps.from_words)):
            if verdict and number not in found:
                found[number] = (verdict.rule, round(verdict.value, 4))
    if steps.items:
        left = [number for number in range(len(documents)) if number not in found]
        owners, pages = [], []
        for number in left:
            tail: list[str] = []  # a run may begin in one piece and end in the next
            for piece in words[number]:
                owners.append(number)
                pages.append([*tail, *piece] if tail else piece)
                tail = pages[-1][1 - steps.longest_run :]
        for place, run in steps.items.find(pages):
            found.setdefault(owners[place], (CONTAMINATED, " ".join(run)))
    return found


def _mask(
    steps: Steps, documents: list[str], words: list[list[list[str]]], kept: Sequence[int]
) -> tuple[Counter[str], Counter[str]]:
    """Masks the documents that are kept, in place, with their words; how many places there were, and documents."""
    places: Counter[str] = Counter()
    texts: Counter[str] = Counter()
    for number in kept if steps.personal else ():
        masked, counts = mask(documents[number], steps.personal)
        if counts:
            documents[number], words[number] = masked, [words_of(piece) for piece in pieces(masked, PIECE)]
            places += counts
            texts.update(counts.keys())
    return places, texts


def _digest(data: bytes) -> tuple[int, int]:
    """128 bits that equal texts share, and no others."""
    digest = hashlib.blake2b(data, digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
