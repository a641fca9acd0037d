"""The arithmetic of PPO against constants worked by hand and naive float64 loops."""

import itertools
import math
import statistics

import pytest
import torch
from torch import Tensor

from rlhf.functional import masked, ppo
from rlhf.functional.best_of_n import best_of_n_kl, best_of_n_mean


def naive_advantages(
    rewards: list[list[float]], values: list[list[float]], lengths: list[int], discount: float, lam: float
) -> list[list[float]]:
    """GAE from its definition: a discounted sum of temporal differences, each row on its own, no recursion."""
    found = []
    for reward, value, n in zip(rewards, values, lengths, strict=True):
        deltas = [reward[t] + discount * (value[t + 1] if t + 1 < n else 0.0) - value[t] for t in range(n)]
        row = [sum((discount * lam) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]
        found.append(row + [0.0] * (len(reward) - n))
    return found


def mask_of(lengths: list[int], width: int) -> Tensor:
    return torch.arange(width) < torch.tensor(lengths).unsqueeze(1)


@pytest.mark.parametrize(("discount", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.7, 0.0)])
def test_advantages_equal_the_definition(discount: float, lam: float) -> None:
    torch.manual_seed(0)
    lengths, width = [5, 1, 7, 3], 7
    rewards, values = torch.randn(4, width, dtype=torch.float64), torch.randn(4, width, dtype=torch.float64)
    mask = mask_of(lengths, width)
    found = ppo.generalised_advantages(rewards, values, mask, discount, lam)
    expected = torch.tensor(
        naive_advantages(rewards.tolist(), values.tolist(), lengths, discount, lam), dtype=torch.float64
    )
    torch.testing.assert_close(found.advantages, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.returns, torch.where(mask, expected + values, 0.0), rtol=1e-12, atol=1e-12)


def test_advantages_by_hand() -> None:
    # discount 0.5, lambda 0.5; rewards 1, 2; values 3, 4: delta_1 = 2 - 4 = -2; delta_0 = 1 + 0.5*4 - 3 = 0;
    # A_1 = -2; A_0 = 0 + 0.25 * -2 = -0.5
    found = ppo.generalised_advantages(
        torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([[True, True]]), 0.5, 0.5
    )
    assert found.advantages.tolist() == [[-0.5, -2.0]]
    assert found.returns.tolist() == [[2.5, 2.0]]


def test_what_stands_behind_the_mask_never_counts() -> None:
    lengths, width = [2, 4], 4
    mask = mask_of(lengths, width)
    clean = torch.arange(8.0).reshape(2, 4)
    dirty = clean.clone()
    dirty[~mask] = float("nan")
    for first, second in zip(
        ppo.generalised_advantages(clean, clean, mask, 0.9, 0.9),
        ppo.generalised_advantages(dirty, dirty, mask, 0.9, 0.9),
        strict=True,
    ):
        assert torch.equal(first, second)
    assert torch.equal(masked.masked_sum(clean, mask), masked.masked_sum(dirty, mask))
    a = ppo.policy_loss(clean * 0.1, clean * 0.0, clean, mask, 0.2)
    b = ppo.policy_loss(dirty * 0.1, dirty * 0.0, dirty, mask, 0.2)
    assert torch.equal(a.total, b.total)
    c = ppo.value_loss(clean, clean * 0.5, clean * 2, mask, 0.2)
    d = ppo.value_loss(dirty, dirty * 0.5, dirty * 2, mask, 0.2)
    assert torch.equal(c.total, d.total)


def test_the_score_lands_on_the_last_real_token() -> None:
    kl = torch.tensor([[1.0, 2.0, 9.0], [4.0, 5.0, 6.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    rewards = ppo.token_rewards(torch.tensor([10.0, 20.0]), 0.5 * kl, mask)
    assert rewards.tolist() == [[-0.5, 9.0, 0.0], [-2.0, -2.5, 17.0]]


def test_policy_loss_by_hand() -> None:
    # ratios e^0.5 = 1.6487, e^-0.5 = 0.6065, 1; advantages 1, -1, 2; epsilon 0.2
    # token 0: max(-1.6487, -1.2) = -1.2 (clipped); token 1: max(0.6065, 0.8) = 0.8 (clipped); token 2: -2
    new = torch.tensor([[0.5, -0.5, 0.0]])
    found = ppo.policy_loss(
        new, torch.zeros(1, 3), torch.tensor([[1.0, -1.0, 2.0]]), torch.ones(1, 3, dtype=torch.bool), 0.2
    )
    assert found.total.item() == pytest.approx(-1.2 + 0.8 - 2.0, rel=1e-6)
    assert found.clipped.item() == pytest.approx(2 / 3)


def test_the_policy_gradient_at_ratio_one_is_minus_the_advantage() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    advantages = torch.tensor([[0.5, -1.5, 7.0]])
    mask = torch.tensor([[True, True, False]])
    ppo.policy_loss(logprobs, logprobs.detach(), advantages, mask, 0.2).total.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[-0.5, 1.5, 0.0]]


def test_value_loss_by_hand() -> None:
    # value 1.0, old 0.0, return 2.0, clip 0.2: free (1-2)^2 = 1, bounded (0.2-2)^2 = 3.24 -> 0.5 * 3.24
    # value 0.1, old 0.0, return 0.0: free 0.01, bounded 0.01 -> 0.5 * 0.01
    found = ppo.value_loss(
        torch.tensor([[1.0, 0.1]]),
        torch.zeros(1, 2),
        torch.tensor([[2.0, 0.0]]),
        torch.ones(1, 2, dtype=torch.bool),
        0.2,
    )
    assert found.total.item() == pytest.approx(0.5 * 3.24 + 0.5 * 0.01, rel=1e-6)
    assert found.clipped.item() == pytest.approx(0.5)


def test_logprobs_and_entropy_against_torch_distributions() -> None:
    torch.manual_seed(1)
    logits, tokens = torch.randn(3, 4, 11), torch.randint(0, 11, (3, 4))
    for temperature in (1.0, 0.7):
        oracle = torch.distributions.Categorical(logits=logits / temperature)
        torch.testing.assert_close(ppo.token_logprobs(logits, tokens, temperature), oracle.log_prob(tokens))
        torch.testing.assert_close(ppo.entropy(logits, temperature), oracle.entropy())


def test_whitened_values_have_mean_zero_and_variance_one() -> None:
    torch.manual_seed(2)
    values, mask = torch.randn(6, 9) * 5 + 3, mask_of([9, 4, 1, 7, 2, 5], 9)
    found = masked.whiten(values, mask, *masked.mean_and_variance(masked.masked_moments(values, mask)))
    kept = found[mask]
    assert kept.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert kept.var(correction=0).item() == pytest.approx(1.0, rel=1e-5)
    assert found[~mask].abs().max().item() == 0.0


def test_moments_of_parts_add_up_to_those_of_the_whole() -> None:
    torch.manual_seed(3)
    values, mask = torch.randn(8, 5), mask_of([5, 3, 1, 2, 5, 4, 3, 1], 5)
    parts = sum(masked.masked_moments(values[i : i + 2], mask[i : i + 2]) for i in range(0, 8, 2))
    assert isinstance(parts, Tensor)
    mean, variance = masked.mean_and_variance(parts)
    assert mean.item() == pytest.approx(values[mask].mean().item(), rel=1e-6)
    assert variance.item() == pytest.approx(values[mask].var(correction=0).item(), rel=1e-5)


def test_explained_variance_of_perfect_and_constant_critics() -> None:
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, 99.0]]), torch.tensor([[True, True, True, False]])
    assert ppo.explained_variance(returns, returns, mask).item() == pytest.approx(1.0)
    assert ppo.explained_variance(torch.full((1, 4), 7.0), returns, mask).item() == pytest.approx(0.0)


def test_k3_estimates_the_kl_divergence() -> None:
    torch.manual_seed(4)
    p, q = (
        torch.distributions.Categorical(logits=torch.randn(6)),
        torch.distributions.Categorical(logits=torch.zeros(6)),
    )
    drawn = p.sample((200_000,))
    estimate = ppo.kl_estimate(p.log_prob(drawn), q.log_prob(drawn), "k3")
    exact = torch.distributions.kl_divergence(p, q).item()
    assert estimate.min().item() >= -1e-6
    assert estimate.mean().item() == pytest.approx(exact, abs=4 * estimate.std().item() / math.sqrt(200_000))


def test_kl_estimates_by_hand() -> None:
    # policy's log-probability -1, other's -1.5: log r = -0.5, r = 0.60653
    logprobs, other = torch.tensor([-1.0]), torch.tensor([-1.5])
    assert ppo.kl_estimate(logprobs, other, "k1").item() == pytest.approx(0.5)
    assert ppo.kl_estimate(logprobs, other, "k2").item() == pytest.approx(0.125)
    assert ppo.kl_estimate(logprobs, other, "k3").item() == pytest.approx(0.6065307 - 1 + 0.5, abs=1e-6)


def test_k1_and_k3_are_unbiased_and_k3_varies_less() -> None:
    torch.manual_seed(0)
    p = torch.distributions.Categorical(logits=torch.tensor([0.3, -0.2, 0.1, 0.0]))
    q = torch.distributions.Categorical(logits=torch.zeros(4))
    drawn = p.sample((200_000,))
    exact = torch.distributions.kl_divergence(p, q).item()
    found = {
        name: ppo.kl_estimate(p.log_prob(drawn), q.log_prob(drawn), name)  # type: ignore[arg-type]
        for name in ("k1", "k3")
    }
    for values in found.values():
        assert values.mean().item() == pytest.approx(exact, abs=4 * values.std().item() / math.sqrt(200_000))
    assert found["k3"].std() < 0.5 * found["k1"].std()


def test_the_gradient_of_k2_is_that_of_the_kl() -> None:
    """Why k1 in the loss is refused, and k2 isn't: the mean over tokens of the gradient of each estimate."""
    logits = torch.tensor([0.3, -0.2, 0.1, 0.5], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([0.1, 0.4, -0.3, 0.0], dtype=torch.float64).log_softmax(0)
    logprobs = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((logprobs.exp() * (logprobs - other)).sum(), logits, retain_graph=True)
    weights = logprobs.exp().detach()  # the mean over tokens that the policy draws
    for name, expected in (("k1", torch.zeros(4, dtype=torch.float64)), ("k2", exact)):
        loss = (weights * ppo.kl_estimate(logprobs, other, name)).sum()  # type: ignore[arg-type]
        (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
        torch.testing.assert_close(found, expected)


def test_dual_clip_by_hand() -> None:
    # advantage -1, ratio e^2 = 7.389: free loss 7.389, dual clip 3 -> 3; ratio e^0.5 = 1.6487 stays; advantage 1 stays
    new = torch.tensor([[2.0, 0.5, 2.0]], requires_grad=True)
    advantages = torch.tensor([[-1.0, -1.0, 1.0]])
    found = ppo.policy_loss(new, torch.zeros(1, 3), advantages, torch.ones(1, 3, dtype=torch.bool), 0.2, 3.0)
    assert found.total.item() == pytest.approx(3.0 + 1.648721 - 1.2, rel=1e-6)
    assert found.clipped.item() == pytest.approx(2 / 3)
    found.total.backward()
    assert new.grad is not None
    assert new.grad.tolist() == [[0.0, pytest.approx(1.648721, rel=1e-6), 0.0]]


def test_the_adaptive_coefficient_by_hand() -> None:
    # KL 9 of a target of 6: error 0.5, cut to 0.2; 100 of 1,000 episodes: 0.1 * (1 + 0.02)
    assert ppo.adapted_coefficient(0.1, 9.0, 6.0, 1000, 100) == pytest.approx(0.102)
    assert ppo.adapted_coefficient(0.1, 6.6, 6.0, 1000, 100) == pytest.approx(0.101)  # error 0.1
    assert ppo.adapted_coefficient(0.1, 0.0, 6.0, 1000, 100) == pytest.approx(0.098)  # error -1, cut to -0.2
    assert ppo.adapted_coefficient(0.1, 6.0, 6.0, 1000, 100) == 0.1


def test_running_moments_equal_those_of_all_numbers_at_once() -> None:
    numbers = [1e6 + (i * 37 % 11) / 7 for i in range(50)]
    assert ppo.RunningMoments().with_values([0.1] * 12).unit == 1.0  # whose mean is not quite 0.1
    assert ppo.RunningMoments().with_values([1e-7, 3e-7]).unit == pytest.approx(1e-7)
    moments = ppo.RunningMoments()
    assert moments.deviation == 0.0
    for start in (0, 3, 4, 20):
        moments = moments.with_values(numbers[start : {0: 3, 3: 4, 4: 20, 20: 50}[start]])
    moments = moments.with_values([])
    assert moments.n == 50
    assert moments.mean == pytest.approx(statistics.fmean(numbers), rel=1e-14)
    assert moments.deviation == pytest.approx(statistics.pstdev(numbers), rel=1e-9)


def test_best_of_n_equals_the_mean_over_all_sets() -> None:
    scores, values = [0.3, -1.0, 2.0, 0.9, 1.5], [10.0, 20.0, 5.0, 7.0, 1.0]
    for n in range(1, 6):
        bests = [max(chosen, key=lambda i: scores[i]) for chosen in itertools.combinations(range(5), n)]
        expected = statistics.fmean(values[i] for i in bests)
        assert best_of_n_mean(scores, values, n) == pytest.approx(expected)
    assert best_of_n_kl(1) == 0.0
    assert best_of_n_kl(4) == pytest.approx(1.386294 - 0.75, abs=1e-6)
