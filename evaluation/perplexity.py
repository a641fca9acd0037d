"""Perplexity of documents: nats per token, and bits per byte, which compares models with different tokenizers."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from evaluation.scoring import Request, Scorer
from rlhf.errors import DataError, StageFailed
from rlhf.functional.intervals import Estimate, ratio_estimate
from rlhf.tokenizer import begin_id, encode_texts

WHITE_SPACE = re.compile(r"\s+")


class DocumentScore(NamedTuple):
    """One document: its negative log-likelihood in nats, its tokens, its bytes of UTF-8, its words.

    Words are what stands between white space, as lm-evaluation-harness counts them.
    """

    nats: float
    tokens: int
    bytes: int
    words: int = 1


class Perplexity(NamedTuple):
    """Documents together. Intervals are over documents."""

    nats_per_token: Estimate
    bits_per_byte: Estimate
    nats_per_word: float
    tokens: int
    documents: int

    @property
    def perplexity(self) -> float:
        """exp of the nats per token."""
        return _exp(self.nats_per_token.mean)

    def summary(self) -> dict[str, Any]:
        """As summaries write it: perplexity by token, by word and by byte."""
        return {
            **self.nats_per_token.as_keys("nats_per_token"),
            "perplexity": round(self.perplexity, 4),
            **self.bits_per_byte.as_keys("bits_per_byte"),
            "byte_perplexity": round(_exp(self.bits_per_byte.mean * math.log(2)), 6),
            "word_perplexity": round(_exp(self.nats_per_word), 4),
            "documents": self.documents,
            "tokens": self.tokens,
        }


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))


class Window(NamedTuple):
    """What one forward pass reads, and the tokens whose probabilities are taken: the last `len(targets)` places."""

    inputs: list[int]
    targets: list[int]


def rolling_windows(tokens: list[int], begin: int, context: int, stride: int | None = None) -> list[Window]:
    """Windows in which every token is predicted exactly once, none reading more than `context` tokens.

    With `context` 4 and tokens a b c d e f:

        window  reads          predicts
        1       begin a b c    a b c d
        2       b c d e        e f        (the last one moves back, to see as much as it can)

    A window behind the first predicts `stride` tokens, by default as many as it reads; fewer see more before them.
    """
    stride = min(stride or context, context)
    first = tokens[:context]
    windows = [Window([begin, *first[:-1]], first)]
    done = len(first)
    while done < len(tokens):
        end = min(done + stride, len(tokens))
        windows.append(Window(tokens[end - context - 1 : end - 1], tokens[done:end]))
        done = end
    return windows


def score_documents(
    scorer: Scorer,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    *,
    context: int,
    stride: int | None = None,
    control: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[DocumentScore]:
    """Each document's score; every document begins with BOS, which is not predicted. Empty texts score zero tokens.

    `control`: whether what looks like a control token is one.
    """
    begin = begin_id(tokenizer)
    requests: list[Request] = []
    owners: list[int] = []
    encoded = encode_texts(tokenizer, texts, control=control)
    for owner, ids in enumerate(encoded):
        for window in rolling_windows(ids, begin, context, stride) if ids else []:
            cut = len(window.inputs) - len(window.targets) + 1
            requests.append(Request(window.inputs[:cut], [*window.inputs[cut:], window.targets[-1]]))
            owners.append(owner)
    nats = [0.0] * len(texts)
    for owner, logprob in zip(owners, scorer.logprobs(requests, progress), strict=True):
        nats[owner] -= logprob
    return [
        DocumentScore(nat, len(ids), len(text.encode()), len(WHITE_SPACE.split(text)))
        for nat, ids, text in zip(nats, encoded, texts, strict=True)
    ]


def perplexity(scores: list[DocumentScore]) -> Perplexity:
    """All documents together: sums first, one division.

    Raises DataError where there is no token, StageFailed where the model's scores are not numbers.
    """
    if not any(score.tokens for score in scores):
        raise DataError("the held-out texts are all empty: there is nothing to measure")
    if not all(math.isfinite(score.nats) for score in scores):
        raise StageFailed("the model's log-probabilities on the held-out texts are not numbers: its weights are broken")
    nats = [score.nats for score in scores]
    bits = [score.nats / math.log(2) for score in scores]
    return Perplexity(
        ratio_estimate(nats, [float(score.tokens) for score in scores]),
        ratio_estimate(bits, [float(score.bytes) for score in scores]),
        math.fsum(nats) / sum(score.words for score in scores),
        sum(score.tokens for score in scores),
        len(scores),
    )
