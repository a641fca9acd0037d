"""Scores from a classifier's outputs. N conversations, M heads of an ensemble, K classes."""

from typing import NamedTuple

import torch
from torch import Tensor


class HeadScores(NamedTuple):
    """What an ensemble says."""

    scores: Tensor  # [N]
    spread: Tensor  # [N] standard deviation over the heads, 0 with a single one


def score_of_heads(logits: Tensor, means: Tensor, penalty: float) -> HeadScores:
    """The mean over the heads of (logit - the head's mean), less `penalty` times their spread. [N, M] and [M] go in.

    A conversation on which the heads disagree is one that the comparisons say little of, and where a policy finds
    scores that are too high (Coste et al. 2023, arXiv:2310.02743, section 3; they take the variance where we take the
    standard deviation, which has the score's own unit). It is that of the M heads, divided by M.
    """
    centred = logits - means
    spread = centred.std(dim=1, correction=0)
    return HeadScores(centred.mean(1) - penalty * spread, spread)


def log_odds(logits: Tensor, label: int) -> Tensor:
    """ln(p / (1 - p)) of one class under the softmax over all K; logits [N, K] with K at least 2, result [N]."""
    others = torch.cat((logits[:, :label], logits[:, label + 1 :]), dim=1)
    return logits[:, label] - others.logsumexp(1)
