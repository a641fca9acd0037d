"""Drawing tokens from logits, given numbers in [0, 1). B rows, V vocabulary."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf.functional.masked import widened
from rlhf.rollout.protocol import Drawing

BLOCK = 128  # tokens that are first looked at together
BELOW_ONE = 1.0 - 2.0**-52


class Drawn(NamedTuple):
    """One token a row."""

    tokens: Tensor  # int64 [B]
    logprobs: Tensor  # nats, float32 or finer [B]
    support: Tensor | None  # bool [B, V]: True can be drawn; None: the whole vocabulary, but for banned tokens


def draw_tokens(logits: Tensor, draws: Tensor, drawing: Drawing, ban: tuple[Tensor, Tensor] | None = None) -> Drawn:
    """A token for each row of logits [B, V], by inverting the cumulative distribution at `draws`.

    `draws`, float64 [B], are in [0, 1). `ban` is (rows, bool [B]; tokens, int64): those tokens can't be drawn in those
    rows. The log-probabilities are those after ban, temperature, top-k and top-p.
    """
    scores = widened(logits)
    if drawing.temperature != 1.0:
        scores = scores / drawing.temperature
    if ban is not None:
        rows, tokens = ban
        scores = scores.clone()
        scores[:, tokens] = scores[:, tokens].masked_fill(rows.unsqueeze(1), float("-inf"))
    if not drawing.restricted:
        return Drawn(*_invert(scores, draws), None)
    support = restrict(scores, drawing.top_k, drawing.top_p)
    return Drawn(*_invert(scores.masked_fill(~support, float("-inf")), draws), support)


def restrict(scores: Tensor, top_k: int, top_p: float) -> Tensor:
    """Which tokens can be drawn, bool [B, V], from scores [B, V] after the temperature.

    The `top_k` most likely (0: all), and of their distribution the fewest that together reach `top_p` (Holtzman et al.
    2020, arXiv:1904.09751, section 3.1), at least one. A token as likely as the least of them stays too: what can be
    drawn does not depend on how a sort breaks ties.
    """
    ranked = scores.topk(top_k).values if 0 < top_k < scores.shape[-1] else _falling(scores)
    least = ranked[:, -1:]
    if top_p < 1.0:
        shares = ranked.softmax(-1)
        before = shares.cumsum(-1, dtype=torch.float64) - shares
        least = ranked.gather(1, (before < top_p).sum(-1, keepdim=True) - 1)
    return (scores >= least) & (scores > float("-inf"))


def _invert(scores: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and log-probabilities. First the block of the vocabulary is found, then the token in it.

    So only the sums of the blocks and one block a row are added up one by one in float64, and not [B, V].
    """
    shares = scores.softmax(-1)
    if shares.shape[1] % BLOCK:
        shares = F.pad(shares, (0, -shares.shape[1] % BLOCK))
    blocks = shares.unflatten(1, (-1, BLOCK))
    reached = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    total = reached[:, -1:]
    # never quite the whole, so that rounding can't lead to a token without probability behind the last that has one
    target = draws.unsqueeze(1).clamp(max=BELOW_ONE) * total
    # where the logits are no numbers the search finds nothing; the log-probability tells it
    block = torch.searchsorted(reached, target, right=True).clamp(max=blocks.shape[1] - 1)
    inside = blocks.gather(1, block.unsqueeze(2).expand(-1, -1, BLOCK)).squeeze(1).cumsum(-1, dtype=torch.float64)
    end = inside[:, -1:]
    rest = (target - reached.gather(1, block) + end).clamp(min=0).minimum(end * BELOW_ONE)
    place = torch.searchsorted(inside, rest, right=True)
    tokens = (block * BLOCK + place).clamp(max=scores.shape[1] - 1)
    logprobs = (shares.gather(1, tokens) / total).log()
    return tokens.squeeze(1), logprobs.squeeze(1).to(scores.dtype)


def _falling(scores: Tensor) -> Tensor:
    """The values of each row, the largest first."""
    if scores.device.type != "cpu":
        return scores.sort(descending=True).values
    # torch sorts the places too, which takes up to fifty times as long on a CPU
    return torch.from_numpy(np.sort(scores.numpy(), axis=-1)).flip(-1)
