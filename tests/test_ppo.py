"""PPO's update against a naive one, episode by episode; and the faults that TRL's PPO had."""

from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

from rlhf.errors import UserError
from rlhf.judge import Conversation, Scores
from rlhf.model import critic_from_policy, critic_from_scorer, load_scorer
from rlhf.recipe import PpoSection
from rlhf.rollout import Response
from rlhf.team import Team
from stages import ppo
from stages.common import Start

PAD, BOS, END, VOCABULARY = 0, 1, 2, 24


def config(**more: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=END,
        **more,
    )


def settings(**more: Any) -> PpoSection:
    values: dict[str, Any] = {
        "prompts": [{"builtin": "tinyworld"}],
        "test_prompts": [{"builtin": "tinyworld"}],
        "updates": 1,
        "episodes_per_update": 6,
        "epochs": 1,
        "minibatches": 2,
        "sampling": {"max_tokens": 6, "temperature": 0.7},
        "learning_rate": 1e-2,
        "kl": {"coefficient": 0.3},
        **more,
    }
    return PpoSection.model_validate(values)


class LengthJudge:
    """Scores a conversation by its number of tokens."""

    def scores(self, conversations: Sequence[Conversation]) -> Scores:
        return Scores([float(len(c.ids)) for c in conversations])


class Device:
    """An Accelerator's face for one process, in float64."""

    device = torch.device("cpu")

    def prepare(self, *things: Any) -> tuple[Any, ...]:
        return things

    def reduce(self, tensor: torch.Tensor, _: str) -> torch.Tensor:
        return tensor

    def no_sync(self, model: Any) -> Any:
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def clip_grad_norm_(self, parameters: Any, largest: float) -> torch.Tensor:
        return torch.nn.utils.clip_grad_norm_(parameters, largest)


def make_learner(section: PpoSection, microbatch: int = 3, dtype: torch.dtype = torch.float64) -> ppo.Learner:
    torch.manual_seed(1)
    policy = LlamaForCausalLM(config()).to(dtype).eval()
    reference = LlamaForCausalLM(config()).to(dtype).eval()
    scorer = LlamaForSequenceClassification(config(num_labels=1)).to(dtype).eval()
    critic = critic_from_scorer(scorer, 0.25)
    roles = ppo.Roles(policy, reference, critic, LengthJudge())
    tokenizer: Any = SimpleNamespace(pad_token_id=PAD)
    device: Any = Device()
    return ppo.Learner(Team(), 5, section, roles, tokenizer, PROMPTS, [END], microbatch, device)


PROMPTS = [ppo.Prompt([{"role": "user", "content": str(i)}], [BOS, *([5 + i] * (i % 3 + 1))]) for i in range(6)]


def episodes(learner: ppo.Learner, temperature: float = 0.7) -> list[Response]:
    """Responses of 1 to 6 tokens with the policy's own log-probabilities, one that does not end among them."""
    rng = np.random.default_rng(0)
    found = []
    for i, prompt in enumerate(PROMPTS):
        ids = [int(token) for token in rng.integers(3, VOCABULARY, i)] + [END if i != 3 else 7]
        logits = learner._roles.policy(input_ids=torch.tensor([prompt.ids + ids])).logits[0].detach() / temperature
        rows = logits.log_softmax(-1)
        logprobs = [float(rows[len(prompt.ids) - 1 + t, token]) for t, token in enumerate(ids)]
        found.append(Response(ids, logprobs, i != 3))
    return found


def evaluated(learner: ppo.Learner, responses: list[Response], scores: list[float]) -> ppo.Trajectory:
    return learner._evaluate(learner._observed(PROMPTS, responses, Scores(scores), [None] * len(PROMPTS)))[0]


def naive_gradient(learner: ppo.Learner, responses: list[Response], minibatch: list[int], s: PpoSection) -> Any:
    """The loss of a minibatch from its definition: one episode at a time, Python loops, no padding anywhere."""
    roles = learner._roles
    every: list[dict[str, Any]] = []
    for prompt, response in zip(PROMPTS, responses, strict=True):
        ids = torch.tensor([prompt.ids + response.ids])
        start, n = len(prompt.ids), len(response.ids)
        with torch.no_grad():
            reference = (roles.reference(input_ids=ids).logits[0] / s.sampling.temperature).log_softmax(-1)
            values = roles.critic(ids)[0, start - 1 : start + n - 1].tolist()
        kl = [response.logprobs[t] - float(reference[start - 1 + t, response.ids[t]]) for t in range(n)]
        rewards = [-s.kl.coefficient * k for k in kl]
        rewards[-1] += float(ids.shape[1]) - (0.0 if response.ended else s.no_end_penalty)
        advantages, following = [0.0] * n, 0.0
        for t in reversed(range(n)):
            after = values[t + 1] if t + 1 < n else 0.0
            following = rewards[t] + s.discount * after - values[t] + s.discount * s.gae_lambda * following
            advantages[t] = following
        every.append({"ids": ids, "start": start, "n": n, "values": values, "advantages": advantages})
    flat = np.concatenate([e["advantages"] for e in every])
    mean, deviation = flat.mean(), np.sqrt(flat.var() + 1e-8)
    tokens = sum(every[i]["n"] for i in minibatch)
    loss = torch.zeros((), dtype=torch.float64)
    for i in minibatch:
        e, response = every[i], responses[i]
        rows = (roles.policy(input_ids=e["ids"]).logits[0] / s.sampling.temperature).log_softmax(-1)
        new_values = roles.critic(e["ids"])[0]
        for t in range(e["n"]):
            place = e["start"] - 1 + t
            ratio = (rows[place, response.ids[t]] - response.logprobs[t]).exp()
            advantage = (e["advantages"][t] - mean) / deviation
            loss = loss - torch.min(ratio * advantage, ratio.clamp(1 - s.clip_ratio, 1 + s.clip_ratio) * advantage)
            target = e["advantages"][t] + e["values"][t]
            near = e["values"][t] + (new_values[place] - e["values"][t]).clamp(-s.clip_value, s.clip_value)
            worse = torch.max((new_values[place] - target) ** 2, (near - target) ** 2)
            loss = loss + s.value_coefficient * 0.5 * worse
    (loss / tokens).backward()
    gradients = [p.grad.clone() for p in (*roles.policy.parameters(), *roles.critic.parameters()) if p.grad is not None]
    for module in (roles.policy, roles.critic):
        module.zero_grad()
    return gradients


def our_gradient(learner: ppo.Learner, responses: list[Response], minibatch: list[int]) -> Any:
    scores = [float(len(p.ids) + len(r.ids)) for p, r in zip(PROMPTS, responses, strict=True)]
    trajectory = evaluated(learner, responses, scores)
    learner._minibatch_gradient(trajectory, torch.tensor(minibatch))
    modules = (learner._roles.policy, learner._roles.critic)
    gradients = [p.grad.clone() for m in modules for p in m.parameters() if p.grad is not None]
    for module in modules:
        module.zero_grad()
    return gradients


@pytest.mark.parametrize("minibatch", [[0, 1, 2, 3, 4, 5], [3, 0, 5], [4]])
def test_the_gradient_equals_a_naive_one(minibatch: list[int]) -> None:
    section = settings()
    learner = make_learner(section)
    responses = episodes(learner)
    ours, expected = our_gradient(learner, responses, minibatch), naive_gradient(learner, responses, minibatch, section)
    scale = max(float(g.abs().max()) for g in expected)
    assert scale > 1e-3
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11 * scale)


@pytest.mark.parametrize("microbatch", [1, 2, 6])
def test_the_microbatch_changes_nothing(microbatch: int) -> None:
    section = settings()
    responses = episodes(make_learner(section))
    everyone = [0, 1, 2, 3, 4, 5]
    ours = our_gradient(make_learner(section, microbatch), responses, everyone)
    whole = our_gradient(make_learner(section, 6), responses, everyone)
    for a, b in zip(ours, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_what_the_padding_holds_changes_nothing() -> None:
    section = settings()
    learner = make_learner(section)
    responses = episodes(learner)
    trajectory = evaluated(learner, responses, [1.0] * 6)
    places = torch.arange(trajectory.ids.shape[1])
    real = places < (trajectory.prompt_lengths + trajectory.mask.sum(1)).unsqueeze(1)
    garbage = trajectory._replace(
        ids=torch.where(real, trajectory.ids, 17),
        logprobs=torch.where(trajectory.mask, trajectory.logprobs, float("nan")),
        values=torch.where(trajectory.mask, trajectory.values, float("inf")),
        advantages=torch.where(trajectory.mask, trajectory.advantages, float("nan")),
        returns=torch.where(trajectory.mask, trajectory.returns, float("nan")),
    )
    found = []
    for batch in (trajectory, garbage):
        figures = learner._minibatch_gradient(batch, torch.arange(6))
        gradients = [p.grad.clone() for p in learner._roles.policy.parameters() if p.grad is not None]
        found.append((figures, gradients))
        learner._roles.policy.zero_grad()
    assert found[0][0] == found[1][0]  # the logged entropy, KL and clip fraction too
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(a, b)


def test_every_minibatch_is_an_optimiser_step_whatever_the_microbatch() -> None:
    """TRL: num_mini_batches had no effect under gradient accumulation."""
    section = settings(epochs=3, minibatches=2)
    for microbatch in (1, 3):
        learner = make_learner(section, microbatch)
        steps: list[int] = []
        step = learner._policy_optimizer.step
        learner._policy_optimizer.step = lambda steps=steps, step=step: (steps.append(1), step())
        trajectory = evaluated(learner, episodes(learner), [1.0] * 6)
        learner._optimise(trajectory, 0)
        assert len(steps) == 6


def test_gradients_are_clipped() -> None:
    """TRL: max_grad_norm was ignored."""
    section = settings(gradient_clipping=1e-3, minibatches=1)
    learner = make_learner(section)
    norms = []
    step = learner._policy_optimizer.step

    def watched() -> None:
        total = sum(float(p.grad.square().sum()) for p in learner._roles.policy.parameters() if p.grad is not None)
        norms.append(total**0.5)
        step()

    learner._policy_optimizer.step = watched  # type: ignore[method-assign]
    trajectory = evaluated(learner, episodes(learner), [1.0] * 6)
    figures = learner._optimise(trajectory, 0)
    assert figures["policy_gradient_norm"] > 1e-2  # what is logged is the norm before clipping
    assert norms == [pytest.approx(1e-3, rel=1e-3)]


def test_minibatches_hold_every_episode_once_an_epoch_in_new_orders() -> None:
    learner = make_learner(settings(epochs=2, minibatches=3))
    found = [part.tolist() for part in learner._minibatches(6, 0)]
    assert [len(part) for part in found] == [2] * 6
    first = [place for part in found[:3] for place in part]
    second = [place for part in found[3:] for place in part]
    assert sorted(first) == sorted(second) == list(range(6))
    assert first != second
    assert [part.tolist() for part in learner._minibatches(6, 0)] == found
    assert [part.tolist() for part in learner._minibatches(6, 1)] != found


def test_the_score_of_a_response_falls_on_its_end_token_not_behind_it() -> None:
    """TRL: the score landed one token after EOS."""
    learner = make_learner(settings(kl={"coefficient": 0.0}, gae_lambda=0.0, discount=1.0))
    responses = episodes(learner)
    for parameter in learner._roles.critic.parameters():
        parameter.data.zero_()
    learner._roles.critic.mean = 0.0
    trajectory = evaluated(learner, responses, [100.0 + i for i in range(6)])
    # with lambda 0, no values and no KL, a token's return is its reward
    for row, response in enumerate(responses):
        last = len(response.ids) - 1
        assert trajectory.ids[row, len(PROMPTS[row].ids) + last] == response.ids[-1]
        expected = [0.0] * last + [100.0 + row - (0.0 if response.ended else 1.0)]
        assert trajectory.returns[row, : last + 1].tolist() == expected
        assert not trajectory.returns[row, last + 1 :].any()


def test_a_critic_from_the_policy_begins_at_zero_and_one_from_the_judge_at_its_scores(tmp_path: Any) -> None:
    torch.manual_seed(0)
    ids = torch.tensor([[BOS, 5, 6, 7], [BOS, 9, 10, END]])
    assert not critic_from_policy(LlamaForCausalLM(config()))(ids).any()
    scorer: PreTrainedModel = LlamaForSequenceClassification(config(num_labels=1)).eval()
    scorer.save_pretrained(tmp_path)
    loaded = load_scorer(tmp_path)
    expected = loaded(input_ids=ids).logits[:, 0].detach() - 0.5
    values = critic_from_scorer(load_scorer(tmp_path), 0.5)(ids)[:, -1].detach()
    torch.testing.assert_close(values, expected)


def test_a_critic_from_an_ensemble_begins_at_the_mean_of_its_heads(tmp_path: Any) -> None:
    torch.manual_seed(0)
    ids = torch.tensor([[BOS, 5, 6, 7], [BOS, 9, 10, END]])
    LlamaForSequenceClassification(config(num_labels=3, score_heads=3)).save_pretrained(tmp_path)
    logits = load_scorer(tmp_path)(input_ids=ids).logits.detach()
    expected = [sum(float(row[k]) - (0.5, -1.0, 2.0)[k] for k in range(3)) / 3 for row in logits]
    values = critic_from_scorer(load_scorer(tmp_path), (0.5 - 1.0 + 2.0) / 3)(ids)[:, -1].tolist()
    assert values == pytest.approx(expected, abs=1e-6)


def test_equal_pad_and_end_are_refused(tmp_path: Any) -> None:
    """TRL: pad == eos corrupted the masks."""
    tokenizer: Any = SimpleNamespace(pad_token_id=END, eos_token_id=END)
    nothing: Any = None  # it is refused before anything is loaded
    with pytest.raises(UserError, match="pad and end token must be different"):
        ppo._load_roles(nothing, nothing, Start(str(tmp_path), False), tokenizer, nothing)
