"""Memorisation: does a model go on with a training document word for word?

As in Carlini et al. 2023 (arXiv:2202.07646, definition 3.1): the model reads the beginning of a training document, and
the document is extractable where the likeliest continuation is the document's own. The likeliest continuation isn't
drawn: it is the document's exactly where each token of the document is the likeliest after those before it, and one
forward pass tells that. Documents that no model has read are the control: what can be guessed is not memorised.
"""

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from evaluation.scoring import Request, Scorer
from rlhf.functional.intervals import proportion_estimate
from rlhf.tokenizer import begin_id, encode_texts

LEAST_TOKENS = 8  # of a continuation
BUCKETS = ((1, "1"), (9, "2-9"), (49, "10-49"), (2**62, "50+"))  # copies, up to
SHOWN = 20  # memorised documents
SHOWN_CHARACTERS = 300


class Document(NamedTuple):
    """A document, and how often it stands in the training texts; 0 for one that doesn't."""

    text: str
    copies: int


class DocumentSample:
    """Chooses documents from training texts, which pass by once: those with the most copies, and random ones."""

    def __init__(self, repeated: int, random: int, seed: int) -> None:
        self._repeated, self._random, self._key = repeated, random, seed.to_bytes(8, "big")
        self._copies: Counter[bytes] = Counter()
        self._again: dict[bytes, str] = {}  # texts that were seen twice
        self._lowest: list[tuple[int, str]] = []  # the random ones: of all, those with the lowest hashes, as -hash

    def read(self, texts: Iterable[str]) -> None:
        """Takes notice of more training texts."""
        for text in texts:
            digest = hashlib.blake2b(text.encode(), digest_size=12, key=self._key).digest()
            self._copies[digest] += 1
            if self._copies[digest] == 2:
                self._again[digest] = text
            if self._copies[digest] == 1:
                place = (-int.from_bytes(digest, "big"), text)
                if len(self._lowest) < self._random:
                    heapq.heappush(self._lowest, place)
                else:
                    heapq.heappushpop(self._lowest, place)

    def documents(self) -> list[Document]:
        """The sample, the most repeated first; the random ones are a fair sample of the different documents."""
        repeated = sorted(self._again, key=lambda digest: (-self._copies[digest], digest))[: self._repeated]
        chosen = {self._again[digest]: self._copies[digest] for digest in repeated}
        for _, text in sorted(self._lowest, reverse=True):
            digest = hashlib.blake2b(text.encode(), digest_size=12, key=self._key).digest()
            chosen.setdefault(text, self._copies[digest])
        return [Document(text, copies) for text, copies in chosen.items()]


class Recall(NamedTuple):
    """How a model went on with a document."""

    document: Document
    tokens: int  # of the continuation
    matched: int  # of these, how many of the first are the model's own

    @property
    def verbatim(self) -> bool:
        """Whether it is the document's, word for word."""
        return self.matched == self.tokens


def recall(
    scorer: Scorer,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[Document],
    *,
    prompt_tokens: int,
    continuation_tokens: int,
) -> list[Recall | None]:
    """What the model recalls of each document; None for those too short to tell.

    It reads BOS and the first `prompt_tokens`, at most half of the document.
    """
    begin = begin_id(tokenizer)
    requests: list[Request | None] = []
    for ids in encode_texts(tokenizer, [document.text for document in documents]):
        read = min(prompt_tokens, len(ids) // 2)
        continuation = ids[read : read + continuation_tokens]
        enough = len(continuation) >= min(LEAST_TOKENS, continuation_tokens)
        requests.append(Request([begin, *ids[:read]], continuation) if enough and read else None)
    matched = iter(scorer.matches([request for request in requests if request]))
    return [
        Recall(document, len(request.continuation), next(matched)) if request else None
        for document, request in zip(documents, requests, strict=True)
    ]


def summarise(training: Sequence[Recall | None], held_out: Sequence[Recall | None]) -> dict[str, Any]:
    """The share that is recalled word for word, of training documents, by their copies, and of the control."""
    known = [found for found in training if found]
    figures: dict[str, Any] = {"too_short": len(training) - len(known)}
    if not known:
        return figures
    unseen = [found for found in held_out if found]
    low = 0
    buckets: dict[str, Sequence[Recall]] = {}
    for most, name in BUCKETS:
        buckets[name] = [found for found in known if low < found.document.copies <= most]
        low = most
    memorised = sorted((found for found in known if found.verbatim), key=lambda found: -found.document.copies)
    shown = [
        {"text": found.document.text[:SHOWN_CHARACTERS], "copies": found.document.copies, "tokens": found.tokens}
        for found in memorised[:SHOWN]
    ]
    return {
        **figures,
        "training": _share(known),
        **({"held_out": _share(unseen)} if unseen else {}),
        "by_copies": {name: _share(found) for name, found in buckets.items() if found},
        "memorised": shown,
    }


def _share(found: Sequence[Recall]) -> dict[str, Any]:
    verbatim = proportion_estimate(sum(each.verbatim for each in found), len(found))
    matched = fmean(each.matched / each.tokens for each in found)
    return {"documents": len(found), **verbatim.as_keys("verbatim", 4), "matched": round(matched, 4)}
