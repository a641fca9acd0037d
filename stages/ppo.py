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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.checkpoint import load_tree
from rlhf.errors import StageFailed, UserError
from rlhf.functional import ppo as maths
from rlhf.functional.intervals import Estimate, mean_estimate
from rlhf.functional.masked import masked_mean, masked_moments, mean_and_variance, whiten
from rlhf.job import Job
from rlhf.judge import Conversation, Judge, Scores, mean_figures
from rlhf.model import Critic, count_parameters, end_ids, model_card, save_model
from rlhf.recipe import PpoSection, Recipe, microbatches
from rlhf.rollout import CacheEngine, Response, uniforms
from rlhf.rundir import RunDir
from rlhf.runtime import Bar, derive_seed, log, make_accelerator
from rlhf.saver import Saver, once
from rlhf.team import Team
from rlhf.tinyworld.dialogues import questions
from rlhf.tinyworld.oracle import best_response, gold_reward
from rlhf.tokenizer import Messages, encode_prompt
from stages.common import Start, card_facts, context_of, fitting, open_data, report_faults, starting_model
from stages.judges import build_critic, build_judge

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


class Episode(NamedTuple):
    """A prompt with its response, and what the models say of it; a float for each of the response's tokens."""

    prompt: Prompt
    response: Response
    score: float
    judged: dict[str, float]  # further figures of the judge
    gold: float | None
    reference: list[float]  # log-probabilities of the reference
    values: list[float]  # of the critic


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


def run(job: Job) -> dict[str, Any]:
    """Optimises the SFT model against the judge and saves it in ppo/model."""
    recipe, run, directory = job.recipe, job.run, job.directory
    settings = recipe.ppo
    assert settings is not None
    accelerator = make_accelerator()
    start = starting_model(recipe, run, "ppo")
    tokenizer = start.tokenizer()
    roles = _load_roles(recipe, run, start, tokenizer, accelerator)
    prompts = _prompts(recipe, settings, tokenizer, roles.policy, "train")
    test = _prompts(recipe, settings, tokenizer, roles.policy, "test")
    minibatch = settings.episodes_per_update // settings.minibatches
    size, passes = microbatches(recipe, "ppo", job.team.size)
    log(
        f"ppo: policy {count_parameters(roles.policy):,} and critic {count_parameters(roles.critic):,} parameters; "
        f"{settings.updates} updates of {settings.episodes_per_update} episodes, {settings.epochs} epochs x "
        f"{settings.minibatches} minibatches of {minibatch} episodes ({job.team.size} processes x {passes} "
        f"microbatches x {size}); "
        f"{len(prompts):,} prompts, {len(test):,} test prompts"
    )
    ends = end_ids(roles.policy, tokenizer)
    measure = partial(_measure, job.team, roles, tokenizer, test, settings, recipe.seed, ends)
    before = Measured.from_facts(once(job, "before", lambda _: measure().facts()).facts)
    log(f"ppo: before: {before.line()}")
    learner = Learner(job.team, recipe.seed, settings, roles, tokenizer, prompts, ends, size, accelerator)
    metrics = job.metrics()
    saver = Saver(job, metrics)
    found = saver.resume()
    first = 0
    if found:
        learner.load(load_tree(found.path, "state"))
        first = found.step
    with saver.training(), Bar("ppo", settings.updates, first) as bar:
        for update in range(first, settings.updates):
            figures = learner.update(update)
            bar.show(
                update + 1,
                **{name: figures[name] for name in ("score", "kl", "entropy", "response_tokens", "ended")},
            )
            if (update + 1) % settings.log_every == 0 or update + 1 == settings.updates:
                metrics.log(update=update + 1, **figures)
            saver.after_step(update + 1, settings.updates, learner.state, learner.weights())
        seconds = saver.seconds()
    after = measure()
    log(f"ppo: after:  {after.line()}")
    summary = {
        "parameters": count_parameters(roles.policy),
        "updates": settings.updates,
        "episodes": settings.updates * settings.episodes_per_update,
        "episodes_per_second": round(settings.updates * settings.episodes_per_update / seconds, 2),
        **before.score.as_keys("score_before", 4),
        **after.score.as_keys("score_after", 4),
        "judge_before": {name: round(value, 4) for name, value in before.judged.items()},
        "judge_after": {name: round(value, 4) for name, value in after.judged.items()},
        **after.kl.as_keys("kl", 4),
        **after.response_tokens.as_keys("response_tokens", 2),
        **after.ended.as_keys("responses_ended", 4),
        **_gold_figures(before, after, test),
    }
    card = model_card(
        f"{recipe.name}: aligned chat model (PPO)",
        f"Optimised with PPO against {' + '.join(judge.title for judge in settings.judge)}, from the SFT model on.",
        card_facts(summary, "parameters", "updates", "score_before", "score_after", "kl", "gold_before", "gold_after"),
    )
    if job.team.is_main:
        save_model(roles.policy, tokenizer, directory.model, card)
    return summary


# Before the first update


def _load_roles(
    recipe: Recipe, run: RunDir, start: Start, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator
) -> Roles:
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is None or pad == end:
        raise UserError(f"{start.name}: pad and end token must be different tokens (pad {pad}, end {end})")
    policy, reference = start.causal_lm().to(accelerator.device), start.causal_lm().to(accelerator.device)
    reference.requires_grad_(False).eval()
    context = context_of(policy)
    judge = build_judge(recipe, run, tokenizer, context, accelerator.device)
    critic = build_critic(recipe, run, start, tokenizer, context).to(accelerator.device)
    return Roles(policy, reference, critic, judge)


def _prompts(
    recipe: Recipe, settings: PpoSection, tokenizer: PreTrainedTokenizerBase, policy: PreTrainedModel, split: Any
) -> list[Prompt]:
    sources = settings.prompts if split == "train" else settings.test_prompts
    dataset = open_data(recipe, "ppo", sources, "prompts", split)
    found = [Prompt(messages, encode_prompt(tokenizer, messages)) for messages in dataset]
    report_faults(dataset)
    key = "ppo.prompts" if split == "train" else "ppo.test_prompts"
    return fitting(found, lambda prompt: len(prompt.ids), policy, settings.sampling.max_tokens, key)


# One update


class Learner:
    """The state of the optimisation: roles, optimisers, and the place in the prompts."""

    def __init__(
        self,
        team: Team,
        seed: int,
        settings: PpoSection,
        roles: Roles,
        tokenizer: PreTrainedTokenizerBase,
        prompts: list[Prompt],
        ends: list[int],
        microbatch: int,
        accelerator: Accelerator,
    ) -> None:
        self._settings, self._roles, self._tokenizer, self._prompts = settings, roles, tokenizer, prompts
        self._seed, self._ends, self._microbatch = seed, ends, microbatch
        self._team, self._accelerator = team, accelerator
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

    def state(self) -> dict[str, Any]:
        """What the next update depends on."""
        return {
            "policy": self._roles.policy.state_dict(),
            "critic": self._roles.critic.state_dict(),
            "policy_optimizer": self._policy_optimizer.state_dict(),
            "critic_optimizer": self._critic_optimizer.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave."""
        self._roles.policy.load_state_dict(state["policy"])
        self._roles.critic.load_state_dict(state["critic"])
        self._policy_optimizer.load_state_dict(state["policy_optimizer"])
        self._critic_optimizer.load_state_dict(state["critic_optimizer"])

    def weights(self) -> nn.Module:
        """All that is trained, for ranks to compare."""
        return nn.ModuleList((self._roles.policy, self._roles.critic))

    def update(self, number: int) -> dict[str, float]:
        """One update; returns its figures. The ranks share the rollout, then every rank has all episodes."""
        started = time.monotonic()
        chosen = self._choose_prompts(number)
        episodes = self._team.share(range(len(chosen)), partial(self._roll_out, number, chosen))
        rolled = time.monotonic()
        trajectory, figures = self._evaluate(episodes)
        figures |= self._optimise(trajectory, number)
        seconds = time.monotonic() - started
        gold = [episode.gold for episode in episodes if episode.gold is not None]
        return {
            "score": mean_estimate([episode.score for episode in episodes]).mean,
            **{f"judge/{name}": value for name, value in mean_figures([e.judged for e in episodes]).items()},
            **({"gold": mean_estimate(gold).mean} if gold else {}),
            **figures,
            "response_tokens": float(np.mean([len(episode.response.ids) for episode in episodes])),
            "ended": float(np.mean([episode.response.ended for episode in episodes])),
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

    def _roll_out(self, number: int, chosen: list[Prompt], mine: list[int]) -> list[Episode]:
        """Responses to some of the update's prompts, and what the other models say of them."""
        s = self._settings
        prompts = [chosen[index] for index in mine]
        first = number * s.episodes_per_update
        draws = uniforms(
            derive_seed(self._seed, "ppo", "rollout"),
            number,
            [first + index for index in mine],
            s.sampling.max_tokens,
        )
        engine = _engine(self._roles.policy, self._tokenizer, s, self._ends)
        responses = engine.generate([prompt.ids for prompt in prompts], draws)
        conversations = [_conversation(self._tokenizer, *pair) for pair in zip(prompts, responses, strict=True)]
        scores = self._roles.judge.scores(conversations)
        gold: Sequence[float | None] = _gold(prompts, conversations) or [None] * len(mine)
        return self._observed(prompts, responses, scores, gold)

    def _observed(
        self,
        prompts: list[Prompt],
        responses: list[Response],
        scores: Scores,
        gold: Sequence[float | None],
    ) -> list[Episode]:
        """The episodes, with what reference and critic say of them."""
        blank = _pack(prompts, responses, self._tokenizer.pad_token_id, self._roles.policy)
        reference: list[list[float]] = []
        values: list[list[float]] = []
        for part in torch.arange(len(prompts), device=blank.ids.device).split(self._microbatch * 2):
            rows = blank.rows(part)
            counts = rows.mask.sum(1).tolist()
            for found, tensor in (
                (reference, _logprobs_without_gradient(self._roles.reference, rows, self._settings)),
                (values, _values_without_gradient(self._roles.critic, rows)),
            ):
                found += [row[:count] for row, count in zip(tensor.tolist(), counts, strict=True)]
        judged = (scores.values, scores.figures_of_each())
        return [Episode(*each) for each in zip(prompts, responses, *judged, gold, reference, values, strict=True)]

    def _evaluate(self, episodes: list[Episode]) -> tuple[Trajectory, dict[str, float]]:
        """Rewards and advantages of all episodes of the update, whitened over all of them."""
        s = self._settings
        responses = [episode.response for episode in episodes]
        pad = self._tokenizer.pad_token_id
        blank = _pack([episode.prompt for episode in episodes], responses, pad, self._roles.policy)
        penalties = [0.0 if response.ended else s.no_end_penalty for response in responses]
        scores = [episode.score for episode in episodes]
        final_scores = blank.logprobs.new_tensor(scores) - blank.logprobs.new_tensor(penalties)
        reference = _rows_of([episode.reference for episode in episodes], blank.logprobs)
        values = _rows_of([episode.values for episode in episodes], blank.logprobs)
        kl = torch.where(blank.mask, blank.logprobs - reference, 0.0)
        rewards = maths.token_rewards(final_scores, kl, blank.mask, s.kl.coefficient)
        found = maths.generalised_advantages(rewards, values, blank.mask, s.discount, s.gae_lambda)
        moments = masked_moments(found.advantages, blank.mask)
        whitened = whiten(found.advantages, blank.mask, *mean_and_variance(moments))
        trajectory = blank._replace(values=values, advantages=whitened, returns=found.returns)
        return trajectory, {
            "kl": float(kl.sum(1).mean()),
            "reward": float(rewards.sum(1).mean()),
            "explained_variance": float(maths.explained_variance(values, found.returns, blank.mask)),
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
        """Adds up the gradient of one minibatch, rows of like length together; divided once, by its real tokens.

        Each rank takes every so-manieth episode. Accelerate takes the mean of the ranks' gradients, and the gradient
        is the sum of their parts: hence the factor.
        """
        lengths = trajectory.mask[minibatch].sum(1) + trajectory.prompt_lengths[minibatch]
        minibatch = minibatch[lengths.argsort(descending=True, stable=True)]
        tokens = trajectory.mask[minibatch].sum()
        parts = minibatch[self._team.rank :: self._team.size].split(self._microbatch)
        found: dict[str, float] = {}
        for number, part in enumerate(parts, 1):
            with self._synchronised(number == len(parts)):
                losses = self._losses(trajectory.rows(part))
                self._accelerator.backward(losses.pop("loss") * self._team.size / tokens)
            share = float(trajectory.mask[part].sum() / tokens)
            for name, value in losses.items():
                found[name] = found.get(name, 0.0) + float(value) * share
        return dict(zip(found, self._team.add(list(found.values())), strict=True))

    @contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        """Gradients cross the processes with the last microbatch of a step only."""
        with ExitStack() as stack:
            if not last:
                stack.enter_context(self._accelerator.no_sync(self._policy))
                stack.enter_context(self._accelerator.no_sync(self._critic))
            yield

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


def _rows_of(values: list[list[float]], like: Tensor) -> Tensor:
    """Ragged rows as a tensor of the shape and kind of `like`, zeros behind them."""
    rows = torch.zeros(like.shape, dtype=like.dtype)
    for row, found in zip(rows, values, strict=True):
        row[: len(found)] = torch.tensor(found, dtype=like.dtype)
    return rows.to(like.device)


def _engine(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: PpoSection, ends: list[int]
) -> CacheEngine:
    return CacheEngine(
        policy,
        end_ids=ends,
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
    judged: dict[str, float]  # means of the judge's further figures
    kl: Estimate
    response_tokens: Estimate
    ended: Estimate
    gold: Estimate | None
    example: str

    def line(self) -> str:
        """For the terminal."""
        gold = f", gold {self.gold.mean:.3f}" if self.gold else ""
        return (
            f"score {self.score.mean:.3f}{gold}, KL {self.kl.mean:.2f}, {self.response_tokens.mean:.1f} tokens; "
            f"{self.example}"
        )

    def facts(self) -> dict[str, Any]:
        """As JSON holds it."""
        return self._asdict()

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> "Measured":
        """What `facts` gave."""
        return cls._make(
            Estimate(*facts[name]) if isinstance(facts[name], list | tuple) else facts[name] for name in cls._fields
        )


def _measure(
    team: Team,
    roles: Roles,
    tokenizer: PreTrainedTokenizerBase,
    test: list[Prompt],
    settings: PpoSection,
    seed: int,
    ends: list[int],
) -> Measured:
    """Samples a response to every test prompt, with the same draws each time, and scores them."""
    draw_seed = derive_seed(seed, "ppo", "test")

    def answer(mine: list[int]) -> list[tuple[Response, Conversation, float, dict[str, float], float]]:
        prompts = [test[index] for index in mine]
        draws = uniforms(draw_seed, 0, mine, settings.sampling.max_tokens)
        responses = _engine(roles.policy, tokenizer, settings, ends).generate([p.ids for p in prompts], draws)
        conversations = [_conversation(tokenizer, *pair) for pair in zip(prompts, responses, strict=True)]
        blank = _pack(prompts, responses, tokenizer.pad_token_id, roles.policy)
        kl: list[float] = []
        for part in torch.arange(len(mine), device=blank.ids.device).split(64):
            rows = blank.rows(part)
            reference = _logprobs_without_gradient(roles.reference, rows, settings)
            kl += torch.where(rows.mask, rows.logprobs - reference, 0.0).double().sum(1).tolist()
        scores = roles.judge.scores(conversations)
        return list(zip(responses, conversations, scores.values, scores.figures_of_each(), kl, strict=True))

    responses, conversations, scores, judged, kl = zip(*team.share(range(len(test)), answer), strict=True)
    gold = _gold(test, conversations)
    first = conversations[0]
    return Measured(
        mean_estimate(scores),
        mean_figures(judged),
        mean_estimate(kl),
        mean_estimate([float(len(response.ids)) for response in responses]),
        mean_estimate([float(response.ended) for response in responses]),
        mean_estimate(gold) if gold else None,
        f"{first.prompt[-1]['content']} -> {first.response}",
    )


def _gold(prompts: Sequence[Prompt], conversations: Sequence[Conversation]) -> list[float]:
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
