"""The loss of a reward model on comparisons. B pairs, M heads; scores [B, M] of the chosen and of the rejected."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhf.functional.masked import widened


def pair_losses(chosen: Tensor, rejected: Tensor, margins: Tensor, label_smoothing: float) -> Tensor:
    """Minus the log-likelihood of each choice, nats, at least float32 [B, M]; margins [B] in units of score.

    Bradley and Terry 1952: P(chosen is better) = sigmoid(d) with d the difference of the scores. A margin m asks for a
    larger one, sigmoid(d - m) (Touvron et al. 2023, arXiv:2307.09288, equation 2). Where a share e of the labels is
    taken to be the wrong way round, each counts as 1 - e of a choice and e of the opposite one (label smoothing,
    Szegedy et al. 2016, arXiv:1512.00567, section 7), so that the scores of a pair don't grow apart without bound.
    """
    differences = widened(chosen) - widened(rejected) - margins.unsqueeze(1)
    return -(1 - label_smoothing) * logsigmoid(differences) - label_smoothing * logsigmoid(-differences)


def preference_loss(
    chosen: Tensor, rejected: Tensor, margins: Tensor, weights: Tensor, label_smoothing: float, centering: float
) -> Tensor:
    """The mean over pairs and heads of weight times loss, plus `centering` times the mean squared sum of the scores.

    `weights` [B, M] have the mean 1 over the whole training set, so that dividing by the pairs of a batch, and not by
    its weights, makes the sum over all batches the loss of the set, however they are cut. Centering keeps the scores
    of a pair around 0 (Eisenstein et al. 2023, arXiv:2312.09244); weights leave it alone.
    """
    losses = weights * pair_losses(chosen, rejected, margins, label_smoothing)
    if centering == 0:
        return losses.mean()
    return losses.mean() + centering * (widened(chosen) + widened(rejected)).square().mean()


def bootstrap_weights(weights: Tensor, heads: int, seed: int) -> Tensor:
    """What each pair counts for each head, float64 [B, M], the mean over the pairs 1 for every head; weights [B] > 0.

    A single head has the weights as they are. Each of several has a bootstrap of its own: a pair is drawn as often as
    a Poisson variable of mean 1 says, the limit of drawing with replacement (Oza and Russell 2001).
    """
    spread = weights.double().unsqueeze(1).expand(-1, heads)
    if heads > 1:
        generator = torch.Generator().manual_seed(seed)
        spread = spread * torch.poisson(torch.ones(spread.shape, dtype=torch.float64), generator=generator)
    # with hardly any pairs a head may have drawn none: it learns nothing, as it should, instead of dividing by 0
    means = spread.mean(0)
    return spread / torch.where(means > 0, means, 1.0)
