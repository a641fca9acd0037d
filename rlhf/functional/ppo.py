"""The arithmetic of PPO for language models.

Legend: B episodes, T response tokens (padded on the right), all tensors [B, T] unless said otherwise; masks are bool,
True counts. Position t of a response is the action "emit token t"; its value is that of the state before token t.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rlhf.functional.masked import masked_mean, masked_sum, widened

Estimator = Literal["k1", "k2", "k3"]


class Advantages(NamedTuple):
    """Advantages and returns, [B, T], zero where the mask does not count."""

    advantages: Tensor
    returns: Tensor


class Loss(NamedTuple):
    """A loss summed over the tokens that count (a scalar to divide once, globally), and what to watch of it."""

    total: Tensor
    clipped: Tensor  # share of the tokens whose gradient the clipping stopped


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each token, nats, at least float32 [..., T] from logits [..., T, V] and tokens [..., T]."""
    scaled = widened(logits) / temperature
    chosen = scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return chosen - scaled.logsumexp(-1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of each position's distribution, nats, at least float32 [..., T] from logits [..., T, V]."""
    logprobs = (widened(logits) / temperature).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def last_counted(mask: Tensor) -> Tensor:
    """The index of the last position that counts in each row, int64 [B]; rows hold at least one."""
    positions = torch.arange(mask.shape[-1], device=mask.device)
    return torch.where(mask, positions, -1).amax(-1)


def token_rewards(scores: Tensor, penalties: Tensor, mask: Tensor) -> Tensor:
    """Reward of each token: minus its penalty [B, T], plus the episode's score [B] on its last real token.

    Ziegler et al. 2019 (arXiv:1909.08593), section 2: R = r - beta * log(pi/rho), spread over the tokens.
    """
    rewards = torch.where(mask, -penalties, 0.0)
    return rewards.scatter_add(1, last_counted(mask).unsqueeze(1), scores.to(rewards.dtype).unsqueeze(1))


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, discount: float, gae_lambda: float
) -> Advantages:
    """Generalised advantage estimation, Schulman et al. 2015 (arXiv:1506.02438), equation 16.

    Episodes end at their last real token: the value after it is zero. `values` behind the mask are never read.
    """
    rewards = torch.where(mask, rewards, 0.0)
    values = torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(rewards)
    following = rewards.new_zeros(rewards.shape[0])
    next_value = rewards.new_zeros(rewards.shape[0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + discount * next_value - values[:, t]
        following = torch.where(mask[:, t], delta + discount * gae_lambda * following, 0.0)
        advantages[:, t] = following
        next_value = values[:, t]
    return Advantages(advantages, torch.where(mask, advantages + values, 0.0))


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_ratio: float,
    dual_clip: float | None = None,
) -> Loss:
    """The clipped surrogate objective, Schulman et al. 2017 (arXiv:1707.06347), equation 7, negated and summed.

    With `dual_clip` c > 1 the objective of a token with a negative advantage is at least c times that, however large
    its ratio (Ye et al. 2020, arXiv:1912.09729, equation 5).
    """
    logprobs, old_logprobs, advantages = (torch.where(mask, x, 0.0) for x in (logprobs, old_logprobs, advantages))
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    free = -advantages * ratio
    bounded = -advantages * ratio.clamp(1.0 - clip_ratio, 1.0 + clip_ratio)
    losses, stopped = torch.maximum(free, bounded), bounded > free
    if dual_clip is not None:
        most = -advantages * dual_clip
        far = (advantages < 0) & (losses > most)
        losses, stopped = torch.where(far, most, losses), stopped | far
    return Loss(masked_sum(losses, mask), masked_mean(stopped.float(), mask))


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_value: float) -> Loss:
    """Half the squared error to the returns, the worse of free and clipped (Schulman's baselines ppo2), summed.

    The clipping is absolute, in units of the score; Engstrom et al. 2020 (arXiv:2005.12729) discuss it.
    """
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    bounded = old_values + (values - old_values).clamp(-clip_value, clip_value)
    free_error, bounded_error = (values - returns).square(), (bounded - returns).square()
    loss = 0.5 * masked_sum(torch.maximum(free_error, bounded_error), mask)
    return Loss(loss, masked_mean((bounded_error > free_error).float(), mask))


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the tokens that count: 1 is a perfect critic, 0 a constant one."""
    kept_returns, kept_values = returns[mask].double(), values[mask].double()
    variance = kept_returns.var(correction=0)
    return 1.0 - (kept_returns - kept_values).var(correction=0) / variance.clamp(min=1e-12)


def kl_estimate(logprobs: Tensor, other: Tensor, estimator: Estimator) -> Tensor:
    """An estimate of each token's KL(policy || other), nats, from log-probabilities of tokens that the policy drew.

    Schulman 2020, "Approximating KL divergence", with r = other / policy: k1 = -log r, unbiased; k2 = (log r)^2 / 2,
    biased, of little variance; k3 = r - 1 - log r, unbiased and never negative.
    """
    log_ratio = other - logprobs
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    return log_ratio.exp() - 1.0 - log_ratio


def adapted_coefficient(coefficient: float, kl: float, target: float, horizon: int, episodes: int) -> float:
    """The KL coefficient after so many episodes with a mean KL (nats an episode), drawn towards the target.

    Ziegler et al. 2019 (arXiv:1909.08593), section 2.2: the relative error is cut to within 20 %.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coefficient * (1.0 + error * episodes / horizon)


class RunningMoments(NamedTuple):
    """Count, mean and sum of squared deviations of all numbers so far, float64."""

    n: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def with_values(self, values: list[float]) -> "RunningMoments":
        """With some more numbers (Chan, Golub and LeVeque 1979: nothing cancels)."""
        if not values:
            return self
        mean = math.fsum(values) / len(values)
        squares = math.fsum((value - mean) ** 2 for value in values)
        n, apart = self.n + len(values), mean - self.mean
        return RunningMoments(
            n,
            self.mean + apart * len(values) / n,
            self.squares + squares + apart**2 * self.n * len(values) / n,
        )

    @property
    def deviation(self) -> float:
        """The standard deviation of the population; 0 where there is none."""
        return math.sqrt(self.squares / self.n) if self.n else 0.0

    @property
    def unit(self) -> float:
        """What to divide by: the deviation, or 1 where all are equal but for rounding."""
        return self.deviation if self.deviation > 1e-9 * abs(self.mean) else 1.0
