"""The ppo stage: proximal policy optimisation of the SFT model against a judge, our own loop on Accelerate.

One update: roll out a response to each prompt; score them; spread the score and the KL penalty over the tokens;
estimate advantages; then, for some epochs, clipped policy and value steps on minibatches of whole episodes.

Where it departs from Schulman et al. 2017 (arXiv:1707.06347), as RLHF does since Ziegler et al. 2019:
  - an episode is one response, an action one token; the score falls on the last real token;
  - a KL penalty of every token against the frozen SFT model keeps the policy near it;
  - advantages are whitened over all of an update's tokens; losses are divided by a minibatch's real tokens, so that
    neither microbatches nor processes change a gradient;
  - policy and critic are models of their own, their gradients clipped apart; no entropy bonus.
"""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.errors import StageFailed, UserError
from rlhf.functional import ppo as maths
from rlhf.functional.intervals import Estimate, mean_estimate
from rlhf.functional.masked import masked_mean, masked_moments, mean_and_variance, whiten
from rlhf.judge import Conversation, Judge, RewardModelJudge, score_mean
from rlhf.model import (
    Critic,
    count_parameters,
    critic_from_policy,
    critic_from_scorer,
    load_causal_lm,
    load_scorer,
    model_card,
    save_model,
)
from rlhf.recipe import PpoSection, Recipe
from rlhf.rollout import CacheEngine, Response, uniforms
from rlhf.rundir import RunDir
from rlhf.runtime import Bar, MetricsLog, derive_seed, log, make_accelerator
from rlhf.tinyworld.dialogues import questions
from rlhf.tinyworld.oracle import best_response, gold_reward
from rlhf.tokenizer import Messages, encode_prompt, load_tokenizer, visible
from stages.common import accumulation, card_facts, open_data, report_faults, starting_model

ADAM_BETAS, ADAM_EPSILON = (0.9, 0.95), 1e-5


class Roles(NamedTuple):
    """The four models of PPO."""

    policy: PreTrainedModel
    reference: PreTrainedModel
    critic: Critic
    judge: Judge


class Prompt(NamedTuple):
    """A prompt as messages and as the ids after which the policy answers."""

    messages: Messages
    ids: list[int]


class Trajectory(NamedTuple):
    """The episodes of one update, rows of equal shape. B episodes, L positions of prompt and response, T of response.

    Prompt and response stand at the left, padding at the right. `mask` [B, T] is True for real response tokens, the
    end token included; behind it the other [B, T] tensors hold zeros.
    """

    ids: Tensor  # [B, L] int64
    prompt_lengths: Tensor  # [B] int64
    mask: Tensor  # [B, T] bool
    logprobs: Tensor  # [B, T] of the policy that sampled
    values: Tensor  # [B, T] of the critic before the update
    advantages: Tensor  # [B, T] whitened
    returns: Tensor  # [B, T]

    def rows(self, index: Tensor) -> "Trajectory":
        """The episodes at these places, cut to the longest of them."""
        picked = Trajectory(*(field[index] for field in self))
        longest = int(picked.mask.sum(1).max())
        whole = int((picked.prompt_lengths + picked.mask.sum(1)).max())
        return Trajectory(picked.ids[:, :whole], picked.prompt_lengths, *(field[:, :longest] for field in picked[2:]))


def run(recipe: Recipe, run: RunDir) -> dict[str, Any]:
    """Optimises the SFT model against the reward model and saves it in ppo/model."""
    settings = recipe.ppo
    assert settings is not None
    directory = run.stage("ppo")
    accelerator = make_accelerator()
    start = starting_model(recipe, run, "ppo")
    tokenizer = load_tokenizer(start)
    roles = _load_roles(settings, start, str(run.stage("reward").model), tokenizer, recipe.seed, accelerator)
    prompts = _prompts(recipe, settings, tokenizer, "train")
    test = _prompts(recipe, settings, tokenizer, "test")
    minibatch = settings.episodes_per_update // settings.minibatches
    size, passes = accumulation(minibatch, settings.microbatch_size, 1, "episodes_per_update / minibatches")
    log(
        f"ppo: policy {count_parameters(roles.policy):,} and critic {count_parameters(roles.critic):,} parameters; "
        f"{settings.updates} updates of {settings.episodes_per_update} episodes, {settings.epochs} epochs x "
        f"{settings.minibatches} minibatches of {minibatch} episodes ({passes} microbatches x {size}); "
        f"{len(prompts):,} prompts, {len(test):,} test prompts"
    )
    end_ids = _end_ids(roles.policy, tokenizer)
    before = _measure(roles, tokenizer, test, settings, recipe.seed, end_ids)
    log(f"ppo: before: {before.line()}")
    learner = Learner(recipe.seed, settings, roles, tokenizer, prompts, end_ids, size, accelerator)
    metrics = MetricsLog(directory.metrics)
    started = time.monotonic()
    with Bar("ppo", settings.updates) as bar:
        for update in range(settings.updates):
            figures = learner.update(update)
            bar.show(
                update + 1,
                **{name: figures[name] for name in ("score", "kl", "entropy", "response_tokens", "ended")},
            )
            if (update + 1) % settings.log_every == 0:
                metrics.log(update=update + 1, **figures)
    seconds = time.monotonic() - started
    after = _measure(roles, tokenizer, test, settings, recipe.seed, end_ids)
    log(f"ppo: after:  {after.line()}")
    summary = {
        "parameters": count_parameters(roles.policy),
        "updates": settings.updates,
        "episodes": settings.updates * settings.episodes_per_update,
        "episodes_per_second": round(settings.updates * settings.episodes_per_update / seconds, 2),
        **before.score.as_keys("score_before", 4),
        **after.score.as_keys("score_after", 4),
        **after.kl.as_keys("kl", 4),
        **after.response_tokens.as_keys("response_tokens", 2),
        **after.ended.as_keys("responses_ended", 4),
        **_gold_figures(before, after, test),
    }
    card = model_card(
        f"{recipe.name}: aligned chat model (PPO)",
        "Optimised against a reward model with PPO, starting from the SFT model.",
        card_facts(summary, "parameters", "updates", "score_before", "score_after", "kl", "gold_before", "gold_after"),
    )
    save_model(roles.policy, tokenizer, directory.model, card)
    return {**summary, "_accelerator": accelerator}


# Before the first update


def _load_roles(
    settings: PpoSection,
    start: str,
    judge: str,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    accelerator: Accelerator,
) -> Roles:
    policy, reference, scorer = load_causal_lm(start), load_causal_lm(start), load_scorer(judge)
    if settings.critic_from == "reward":
        critic = critic_from_scorer(load_scorer(judge), score_mean(scorer))
    else:
        critic = critic_from_policy(load_causal_lm(start))
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is None or pad == end:
        raise UserError(f"{start}: pad and end token must be different tokens (pad {pad}, end {end})")
    for frozen in (reference, scorer):
        frozen.requires_grad_(False)
        frozen.eval().to(accelerator.device)
    return Roles(policy.to(accelerator.device), reference, critic.to(accelerator.device), RewardModelJudge(scorer))


def _prompts(recipe: Recipe, settings: PpoSection, tokenizer: PreTrainedTokenizerBase, split: Any) -> list[Prompt]:
    sources = settings.prompts if split == "train" else settings.test_prompts
    dataset = open_data(recipe, "ppo", sources, "prompts", split)
    found = [Prompt(messages, encode_prompt(tokenizer, messages)) for messages in dataset]
    report_faults(dataset)
    return found


def _end_ids(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that end a response: the tokenizer's EOS and what the generation configuration adds."""
    configured = policy.generation_config.eos_token_id if policy.generation_config else None
    more = configured if isinstance(configured, list) else [configured]
    return sorted({int(token) for token in (tokenizer.eos_token_id, *more) if token is not None})


# One update


class Learner:
    """The state of the optimisation: roles, optimisers, and the place in the prompts."""

    def __init__(
        self,
        seed: int,
        settings: PpoSection,
        roles: Roles,
        tokenizer: PreTrainedTokenizerBase,
        prompts: list[Prompt],
        end_ids: list[int],
        microbatch: int,
        accelerator: Accelerator,
    ) -> None:
        self._settings, self._roles, self._tokenizer, self._prompts = settings, roles, tokenizer, prompts
        self._seed, self._end_ids, self._microbatch = seed, end_ids, microbatch
        self._accelerator = accelerator
        policy_optimizer = torch.optim.AdamW(
            roles.policy.parameters(),
            lr=settings.learning_rate,
            betas=ADAM_BETAS,
            eps=ADAM_EPSILON,
            weight_decay=0.0,
        )
        critic_optimizer = torch.optim.AdamW(
            roles.critic.parameters(),
            lr=settings.critic_learning_rate or settings.learning_rate,
            betas=ADAM_BETAS,
            eps=ADAM_EPSILON,
            weight_decay=0.0,
        )
        self._policy, self._critic, self._policy_optimizer, self._critic_optimizer = accelerator.prepare(
            roles.policy, roles.critic, policy_optimizer, critic_optimizer
        )

    def update(self, number: int) -> dict[str, float]:
        """One update; returns its figures."""
        started = time.monotonic()
        chosen = self._choose_prompts(number)
        responses = self._roll_out(chosen, number)
        rolled = time.monotonic()
        conversations = [_conversation(self._tokenizer, *pair) for pair in zip(chosen, responses, strict=True)]
        scores = self._roles.judge.scores(conversations)
        trajectory, figures = self._evaluate(chosen, responses, scores)
        figures |= self._optimise(trajectory, number)
        seconds = time.monotonic() - started
        gold = _gold(chosen, conversations)
        return {
            "score": mean_estimate(scores).mean,
            **({"gold": mean_estimate(gold).mean} if gold else {}),
            **figures,
            "response_tokens": float(np.mean([len(response.ids) for response in responses])),
            "ended": float(np.mean([response.ended for response in responses])),
            "episodes_per_second": len(chosen) / seconds,
            "rollout_seconds": rolled - started,
        }

    def _choose_prompts(self, number: int) -> list[Prompt]:
        """The update's prompts: pass after pass over all of them, each in a new random order."""
        n = self._settings.episodes_per_update
        places = range(number * n, (number + 1) * n)
        orders: dict[int, np.ndarray] = {}
        chosen = []
        for place in places:
            epoch, index = divmod(place, len(self._prompts))
            if epoch not in orders:
                seed = derive_seed(self._seed, "ppo", "prompts")
                orders[epoch] = np.random.default_rng([seed, epoch]).permutation(len(self._prompts))
            chosen.append(self._prompts[int(orders[epoch][index])])
        return chosen

    def _roll_out(self, chosen: list[Prompt], number: int) -> list[Response]:
        n = self._settings.episodes_per_update
        episodes = range(number * n, number * n + len(chosen))
        draws = uniforms(
            derive_seed(self._seed, "ppo", "rollout"), number, episodes, self._settings.sampling.max_tokens
        )
        return _engine(self._roles.policy, self._tokenizer, self._settings, self._end_ids).generate(
            [prompt.ids for prompt in chosen], draws
        )

    def _evaluate(
        self, chosen: list[Prompt], responses: list[Response], scores: list[float]
    ) -> tuple[Trajectory, dict[str, float]]:
        """Reference log-probabilities, values, rewards and advantages of the episodes."""
        s = self._settings
        blank = _pack(chosen, responses, self._tokenizer.pad_token_id, self._roles.policy)
        reference, values = [], []
        for part in torch.arange(len(chosen), device=blank.ids.device).split(self._microbatch * 2):
            rows = blank.rows(part)
            reference.append(_pad_to(_logprobs_without_gradient(self._roles.reference, rows, s), blank.mask))
            values.append(_pad_to(_values_without_gradient(self._roles.critic, rows), blank.mask))
        penalties = [0.0 if response.ended else s.no_end_penalty for response in responses]
        final_scores = blank.logprobs.new_tensor(scores) - blank.logprobs.new_tensor(penalties)
        kl = torch.where(blank.mask, blank.logprobs - torch.cat(reference), 0.0)
        rewards = maths.token_rewards(final_scores, kl, blank.mask, s.kl.coefficient)
        all_values = torch.where(blank.mask, torch.cat(values), 0.0)
        found = maths.generalised_advantages(rewards, all_values, blank.mask, s.discount, s.gae_lambda)
        moments = self._accelerator.reduce(masked_moments(found.advantages, blank.mask), "sum")
        whitened = whiten(found.advantages, blank.mask, *mean_and_variance(moments))
        trajectory = blank._replace(values=all_values, advantages=whitened, returns=found.returns)
        return trajectory, {
            "kl": float(kl.sum(1).mean()),
            "reward": float(rewards.sum(1).mean()),
            "explained_variance": float(maths.explained_variance(all_values, found.returns, blank.mask)),
        }

    def _optimise(self, trajectory: Trajectory, number: int) -> dict[str, float]:
        """The epochs of clipped steps. Every minibatch is one optimiser step, whatever the microbatch."""
        s = self._settings
        self._policy.train()
        self._critic.train()
        watched: list[dict[str, float]] = []
        for minibatch in self._minibatches(len(trajectory.ids), number):
            figures = self._minibatch_gradient(trajectory, minibatch)
            figures["policy_gradient_norm"] = float(
                self._accelerator.clip_grad_norm_(self._policy.parameters(), s.gradient_clipping)
            )
            figures["value_gradient_norm"] = float(
                self._accelerator.clip_grad_norm_(self._critic.parameters(), s.gradient_clipping)
            )
            if not np.isfinite([figures["policy_gradient_norm"], figures["value_gradient_norm"]]).all():
                raise StageFailed(
                    f"ppo: the gradient is not finite in update {number + 1}; try a smaller learning_rate"
                )
            if number >= s.critic_warmup:
                self._policy_optimizer.step()
            self._critic_optimizer.step()
            self._policy_optimizer.zero_grad()
            self._critic_optimizer.zero_grad()
            watched.append(figures)
        self._policy.eval()
        self._critic.eval()
        return {name: float(np.mean([figures[name] for figures in watched])) for name in watched[0]}

    def _minibatches(self, episodes: int, number: int) -> Iterator[Tensor]:
        """The places of the episodes of each optimiser step: every epoch in a new random order."""
        order = np.random.default_rng([derive_seed(self._seed, "ppo", "minibatches"), number])
        for _ in range(self._settings.epochs):
            shuffled = torch.from_numpy(order.permutation(episodes)).to(self._accelerator.device)
            yield from shuffled.split(episodes // self._settings.minibatches)

    def _minibatch_gradient(self, trajectory: Trajectory, minibatch: Tensor) -> dict[str, float]:
        """Adds up the gradient of one minibatch, rows of like length together; divided once, by its real tokens."""
        lengths = trajectory.mask[minibatch].sum(1) + trajectory.prompt_lengths[minibatch]
        minibatch = minibatch[lengths.argsort(descending=True, stable=True)]
        tokens = trajectory.mask[minibatch].sum()
        found: dict[str, float] = {}
        for part in minibatch.split(self._microbatch):
            losses = self._losses(trajectory.rows(part))
            self._accelerator.backward(losses.pop("loss") / tokens)
            share = float(trajectory.mask[part].sum() / tokens)
            for name, value in losses.items():
                found[name] = found.get(name, 0.0) + float(value) * share
        return found

    def _losses(self, rows: Trajectory) -> dict[str, Tensor]:
        """The summed loss of some episodes, and means over their tokens of what to watch."""
        s = self._settings
        logits = _response_logits(self._policy, rows)
        logprobs = maths.token_logprobs(logits, _response_tokens(rows), s.sampling.temperature)
        values = _response_values(self._critic, rows)
        policy = maths.policy_loss(logprobs, rows.logprobs, rows.advantages, rows.mask, s.clip_ratio)
        value = maths.value_loss(values, rows.values, rows.returns, rows.mask, s.clip_value)
        with torch.no_grad():
            counted = rows.mask.sum()
            watch = {
                "policy_loss": policy.total / counted,
                "value_loss": value.total / counted,
                "clip_fraction": policy.clipped,
                "value_clip_fraction": value.clipped,
                "entropy": masked_mean(maths.entropy(logits, s.sampling.temperature), rows.mask),
                "approximate_kl": masked_mean(maths.kl_estimate_k3(logprobs, rows.logprobs), rows.mask),
            }
        return {"loss": policy.total + s.value_coefficient * value.total, **watch}


# Episodes as tensors


def _pack(chosen: list[Prompt], responses: list[Response], pad: int, policy: PreTrainedModel) -> Trajectory:
    """The episodes as one Trajectory, on the policy's device, whose values, advantages and returns are still zero."""
    dtype = torch.promote_types(policy.dtype, torch.float32)
    lengths = [len(prompt.ids) for prompt in chosen]
    counts = [len(response.ids) for response in responses]
    whole, longest = max(a + b for a, b in zip(lengths, counts, strict=True)), max(counts)
    ids = torch.full((len(chosen), whole), pad)
    mask = torch.zeros(len(chosen), longest, dtype=torch.bool)
    logprobs = torch.zeros(len(chosen), longest, dtype=dtype)
    for row, (prompt, response) in enumerate(zip(chosen, responses, strict=True)):
        ids[row, : lengths[row] + counts[row]] = torch.tensor(prompt.ids + response.ids)
        mask[row, : counts[row]] = True
        logprobs[row, : counts[row]] = torch.tensor(response.logprobs, dtype=dtype)
    zeros = torch.zeros_like(logprobs)
    tensors = (ids, torch.tensor(lengths), mask, logprobs, zeros, zeros, zeros)
    return Trajectory(*(tensor.to(policy.device) for tensor in tensors))


def _window(rows: Trajectory, offset: int) -> Tensor:
    """Positions [B, T] of the response's tokens, moved by `offset`; those behind the mask point at some real place."""
    steps = torch.arange(rows.mask.shape[1], device=rows.ids.device)
    return (rows.prompt_lengths.unsqueeze(1) + steps + offset).clamp(max=rows.ids.shape[1] - 1)


def _response_tokens(rows: Trajectory) -> Tensor:
    """The response's token ids, [B, T]."""
    return rows.ids.gather(1, _window(rows, 0))


def _response_logits(model: nn.Module, rows: Trajectory) -> Tensor:
    """Logits [B, T, V] from which the response's tokens were drawn: those of the place before each."""
    logits = model(input_ids=rows.ids, use_cache=False).logits
    return logits.gather(1, _window(rows, -1).unsqueeze(-1).expand(-1, -1, logits.shape[-1]))


def _response_values(critic: nn.Module, rows: Trajectory) -> Tensor:
    """Values [B, T] of the states before each of the response's tokens."""
    values: Tensor = critic(rows.ids)
    return values.gather(1, _window(rows, -1))


@torch.inference_mode()
def _logprobs_without_gradient(model: PreTrainedModel, rows: Trajectory, settings: PpoSection) -> Tensor:
    logits = _response_logits(model, rows)
    return maths.token_logprobs(logits, _response_tokens(rows), settings.sampling.temperature)


@torch.inference_mode()
def _values_without_gradient(critic: Critic, rows: Trajectory) -> Tensor:
    return _response_values(critic, rows)


def _pad_to(values: Tensor, mask: Tensor) -> Tensor:
    return nn.functional.pad(values, (0, mask.shape[1] - values.shape[1]))


def _engine(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: PpoSection, end_ids: list[int]
) -> CacheEngine:
    return CacheEngine(
        policy,
        end_ids=end_ids,
        pad_id=tokenizer.pad_token_id,
        max_tokens=settings.sampling.max_tokens,
        temperature=settings.sampling.temperature,
    )


def _conversation(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, response: Response) -> Conversation:
    text = tokenizer.decode(response.ids, skip_special_tokens=True)
    return Conversation(prompt.messages, text, prompt.ids + response.ids)


# Measuring


class Measured(NamedTuple):
    """How the policy does on the test prompts."""

    score: Estimate
    kl: Estimate
    response_tokens: Estimate
    ended: Estimate
    gold: Estimate | None
    conversations: list[Conversation]

    def line(self) -> str:
        """For the terminal."""
        gold = f", gold {self.gold.mean:.3f}" if self.gold else ""
        shown = self.conversations[0]
        return (
            f"score {self.score.mean:.3f}{gold}, KL {self.kl.mean:.2f}, {self.response_tokens.mean:.1f} tokens; "
            f"{visible(shown.prompt[-1]['content'])} -> {visible(shown.response)}"
        )


def _measure(
    roles: Roles,
    tokenizer: PreTrainedTokenizerBase,
    test: list[Prompt],
    settings: PpoSection,
    seed: int,
    end_ids: list[int],
) -> Measured:
    """Samples a response to every test prompt, with the same draws each time, and scores them."""
    draws = uniforms(derive_seed(seed, "ppo", "test"), 0, range(len(test)), settings.sampling.max_tokens)
    responses = _engine(roles.policy, tokenizer, settings, end_ids).generate([prompt.ids for prompt in test], draws)
    conversations = [_conversation(tokenizer, *pair) for pair in zip(test, responses, strict=True)]
    blank = _pack(test, responses, tokenizer.pad_token_id, roles.policy)
    kl: list[float] = []
    for part in torch.arange(len(test), device=blank.ids.device).split(64):
        rows = blank.rows(part)
        reference = _logprobs_without_gradient(roles.reference, rows, settings)
        kl += torch.where(rows.mask, rows.logprobs - reference, 0.0).double().sum(1).tolist()
    gold = _gold(test, conversations)
    return Measured(
        mean_estimate(roles.judge.scores(conversations)),
        mean_estimate(kl),
        mean_estimate([float(len(response.ids)) for response in responses]),
        mean_estimate([float(response.ended) for response in responses]),
        mean_estimate(gold) if gold else None,
        conversations,
    )


def _gold(prompts: list[Prompt], conversations: list[Conversation]) -> list[float]:
    """The gold reward of each response, where the built-in world knows every prompt; else nothing."""
    asked = [prompt.messages[-1]["content"] if len(prompt.messages) == 1 else "" for prompt in prompts]
    if not all(text in questions() for text in asked):
        return []
    return [gold_reward(text, found.response) for text, found in zip(asked, conversations, strict=True)]


def _gold_figures(before: Measured, after: Measured, test: list[Prompt]) -> dict[str, Any]:
    if before.gold is None or after.gold is None:
        return {}
    asked = [prompt.messages[-1]["content"] for prompt in test]
    best = mean_estimate([gold_reward(text, best_response(text)) for text in asked]).mean
    return {
        **before.gold.as_keys("gold_before", 4),
        **after.gold.as_keys("gold_after", 4),
        "gold_best": round(best, 4),
    }
