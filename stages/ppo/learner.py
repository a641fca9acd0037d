"""One update of PPO: roll out, judge, estimate advantages, then clipped steps on minibatches of whole episodes."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rlhf.errors import StageFailed
from rlhf.functional import ppo as maths
from rlhf.functional.intervals import mean_estimate
from rlhf.functional.masked import masked_mean, masked_moments, mean_and_variance, whiten
from rlhf.judge import mean_figures
from rlhf.recipe import PpoSection
from rlhf.rollout import Drawing, Response, build_engine, uniforms
from rlhf.runtime import derive_seed
from rlhf.team import Team
from stages.ppo.episodes import Episode, Prompt, Trajectory, Vocabulary, microbatches_of, pack_episodes
from stages.ppo.gold import gold_rewards
from stages.ppo.roles import Actors, Roles

ADAM_BETAS, ADAM_EPSILON = (0.9, 0.95), 1e-5

Texts = Callable[[int], Tensor]  # the rows of pretraining text, ids [n, L + 1], of an optimiser step


class Budget(NamedTuple):
    """How much is read at once."""

    tokens: int
    episodes: int


class Drawer:
    """Draws the policy's responses, always in the recipe's way."""

    def __init__(self, actors: Actors, vocabulary: Vocabulary, settings: PpoSection) -> None:
        self._actors = actors
        drawing = Drawing(**settings.sampling.model_dump())
        with actors.drawing() as policy:
            self._engine = build_engine(
                policy, vocabulary.tokenizer, drawing, end_ids=vocabulary.end_ids, kind=settings.engine
            )

    def draw(self, prompts: Sequence[Prompt], uniforms: np.ndarray) -> list[Response]:
        """A response to each prompt; `uniforms` [prompts, max_tokens] decide it."""
        with self._actors.drawing():
            return self._engine.generate([prompt.ids for prompt in prompts], uniforms)


class Learner:
    """The state of the optimisation: roles, optimisers, KL coefficient, running statistics of the scores."""

    def __init__(
        self,
        team: Team,
        seed: int,
        settings: PpoSection,
        roles: Roles,
        vocabulary: Vocabulary,
        drawer: Drawer,
        budget: Budget,
        prompts: list[Prompt],
        accelerator: Accelerator,
        texts: Texts | None = None,
    ) -> None:
        self._team, self._seed, self._settings, self._roles = team, seed, settings, roles
        self._vocabulary, self._drawer, self._budget, self._prompts = vocabulary, drawer, budget, prompts
        self._accelerator, self._texts = accelerator, texts
        rates = (settings.learning_rate, settings.critic_learning_rate or settings.learning_rate)
        parameters = (roles.actors.policy_parameters(), roles.actors.critic_parameters())
        optimizers = [
            torch.optim.AdamW(some, lr=rate, betas=ADAM_BETAS, eps=ADAM_EPSILON, weight_decay=0.0, fused=True)
            for some, rate in zip(parameters, rates, strict=True)
        ]
        self._rates = rates
        self._actors, self._policy_optimizer, self._critic_optimizer = accelerator.prepare(roles.actors, *optimizers)
        self.kl_coefficient = settings.kl.coefficient
        self.rate_scale = 1.0  # the doctor's
        self._scores = maths.RunningMoments()

    # State

    def state(self) -> dict[str, Any]:
        """What the next update depends on."""
        return {
            "actors": {name: p.detach() for name, p in self._roles.actors.named_parameters() if p.requires_grad},
            "policy_optimizer": self._policy_optimizer.state_dict(),
            "critic_optimizer": self._critic_optimizer.state_dict(),
            "kl_coefficient": self.kl_coefficient,
            "rate_scale": self.rate_scale,
            "scores": list(self._scores),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave."""
        with torch.no_grad():
            for name, parameter in self._roles.actors.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(state["actors"][name])
        self._policy_optimizer.load_state_dict(state["policy_optimizer"])
        self._critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.kl_coefficient = state["kl_coefficient"]
        self._scores = maths.RunningMoments(*state["scores"])
        self.scale_rates(state["rate_scale"])

    def scale_rates(self, scale: float) -> None:
        """Multiplies the recipe's learning rates by this from now on."""
        self.rate_scale = scale
        for optimizer, rate in zip((self._policy_optimizer, self._critic_optimizer), self._rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * scale

    def weights(self) -> nn.Module:
        """All that is trained, for ranks to compare."""
        return self._roles.actors

    # One update

    def update(self, number: int) -> tuple[list[Episode], dict[str, float]]:
        """One update; its episodes and figures. The ranks share the rollout, then every rank has all episodes."""
        started = time.monotonic()
        chosen = self._choose_prompts(number)
        episodes = self._team.share(range(len(chosen)), partial(self._roll_out, number, chosen))
        rolled = time.monotonic()
        trajectory, figures = self._evaluate(episodes)
        figures |= self._optimise(trajectory, number)
        self._adapt(figures["kl"], len(episodes))
        gold = [episode.gold for episode in episodes if episode.gold is not None]
        tokens = [len(episode.response.ids) for episode in episodes]
        return episodes, {
            "score": fmean(episode.score for episode in episodes),
            "score_deviation": float(np.std([episode.score for episode in episodes])),
            "score_length_correlation": correlation([episode.score for episode in episodes], tokens),
            **{f"judge/{name}": value for name, value in mean_figures([e.judged for e in episodes]).items()},
            **({"gold": mean_estimate(gold).mean} if gold else {}),
            **figures,
            "response_tokens": float(np.mean(tokens)),
            "ended": float(np.mean([episode.response.ended for episode in episodes])),
            "misplaced": float(sum(self._misplaced(episode.response) for episode in episodes)),
            "rollout_tokens_per_second": sum(tokens) / (rolled - started),
            "episodes_per_second": len(chosen) / (time.monotonic() - started),
            "rollout_seconds": rolled - started,
        }

    def _choose_prompts(self, number: int) -> list[Prompt]:
        """The update's prompts: pass after pass over all of them, each in a new random order."""
        n = self._settings.episodes_per_update
        orders: dict[int, np.ndarray] = {}
        chosen = []
        for place in range(number * n, (number + 1) * n):
            epoch, index = divmod(place, len(self._prompts))
            if epoch not in orders:
                seed = derive_seed(self._seed, "ppo", "prompts")
                orders[epoch] = np.random.default_rng([seed, epoch]).permutation(len(self._prompts))
            chosen.append(self._prompts[int(orders[epoch][index])])
        return chosen

    def _roll_out(self, number: int, chosen: list[Prompt], mine: list[int]) -> list[Episode]:
        """Responses to some of the update's prompts, and what the other models say of them."""
        s = self._settings
        first = number * s.episodes_per_update
        seed = derive_seed(self._seed, "ppo", "rollout")
        draws = uniforms(seed, number, [first + index for index in mine], s.sampling.max_tokens)
        prompts = [chosen[index] for index in mine]
        responses = self._drawer.draw(prompts, draws)
        return observed(self._roles, self._vocabulary, self._budget, prompts, responses)

    def _misplaced(self, response: Response) -> bool:
        """Whether a pad stands in a response, or an end token before its last token."""
        ends = set(self._vocabulary.end_ids)
        return self._vocabulary.pad_id in response.ids or any(token in ends for token in response.ids[:-1])

    # Rewards and advantages

    def _evaluate(self, episodes: Sequence[Episode]) -> tuple[Trajectory, dict[str, float]]:
        """Rewards and advantages of all episodes of the update, whitened over all of them."""
        s = self._settings
        blank = pack_episodes(episodes, self._vocabulary.pad_id, self._roles.actors.policy)
        kl = torch.where(blank.mask, blank.logprobs - blank.reference, 0.0)
        penalties = torch.zeros_like(kl)
        if s.kl.placement == "reward":
            penalties = self.kl_coefficient * maths.kl_estimate(blank.logprobs, blank.reference, s.kl.estimator)
        scores = blank.logprobs.new_tensor(self._shaped(episodes))
        rewards = maths.token_rewards(scores, penalties, blank.mask)
        found = maths.generalised_advantages(rewards, blank.values, blank.mask, s.discount, s.gae_lambda)
        moments = masked_moments(found.advantages, blank.mask)
        whitened = whiten(found.advantages, blank.mask, *mean_and_variance(moments))
        return blank.with_advantages(found._replace(advantages=whitened)), {
            "kl": float(kl.sum(1).mean()),
            "kl_coefficient": self.kl_coefficient,
            "reward": float(rewards.sum(1).mean()),
            "explained_variance": float(maths.explained_variance(blank.values, found.returns, blank.mask)),
        }

    def _shaped(self, episodes: Sequence[Episode]) -> list[float]:
        """The judge's scores as they become rewards: scaled, cut, and for responses that don't end, what that costs.

        The statistics are of what the judge says of all episodes so far, these included.
        """
        s = self._settings
        found = [episode.score for episode in episodes]
        if s.score.scaling == "running":
            self._scores = self._scores.with_values(found)
            deviation = self._scores.deviation or 1.0
            found = [score / deviation for score in found]
        if s.score.clip is not None:
            found = [min(max(score, -s.score.clip), s.score.clip) for score in found]
        for place, episode in enumerate(episodes):
            if not episode.response.ended:
                found[place] = found[place] - s.no_end_penalty if s.no_end_score is None else s.no_end_score
        return found

    def _adapt(self, kl: float, episodes: int) -> None:
        """Moves the KL coefficient towards the target, where there is one."""
        target = self._settings.kl.target
        if target is not None:
            horizon = self._settings.kl.horizon
            self.kl_coefficient = maths.adapted_coefficient(self.kl_coefficient, kl, target, horizon, episodes)

    # Optimisation

    def _optimise(self, trajectory: Trajectory, number: int) -> dict[str, float]:
        """The epochs of clipped steps. Every minibatch is one optimiser step, whatever the microbatches."""
        s = self._settings
        self._actors.train()
        watched: list[dict[str, float]] = []
        for step, minibatch in enumerate(self._minibatches(len(trajectory.ids), number)):
            place = number * s.epochs * s.minibatches + step
            figures = {"text_loss": self._texts_gradient(self._texts, place)} if self._texts else {}
            figures |= self._minibatch_gradient(trajectory, minibatch)
            watched.append(figures | self._clip(number))
            if s.stop_kl is not None and figures["approximate_kl"] > s.stop_kl:
                self._forget_gradients()
                break
            if number >= s.critic_warmup:
                self._policy_optimizer.step()
            self._critic_optimizer.step()
            self._forget_gradients()
        self._actors.eval()
        means = {name: fmean(figures[name] for figures in watched) for name in watched[0]}
        # before the first step the policy is the one that drew: what differs then is rounding, or a fault
        return means | {"drift": watched[0]["drift"], "optimiser_steps": float(len(watched))}

    def _forget_gradients(self) -> None:
        self._policy_optimizer.zero_grad()
        self._critic_optimizer.zero_grad()

    def _clip(self, number: int) -> dict[str, float]:
        """Clips the gradients of policy and critic apart; their norms before."""
        actors, most = self._roles.actors, self._settings.gradient_clipping
        norms = {
            "policy_gradient_norm": float(self._accelerator.clip_grad_norm_(actors.policy_parameters(), most)),
            "value_gradient_norm": float(self._accelerator.clip_grad_norm_(actors.critic_parameters(), most)),
        }
        if not np.isfinite(list(norms.values())).all():
            raise StageFailed(f"ppo: the gradient is not finite in update {number + 1}; try a smaller learning_rate")
        return norms

    def _minibatches(self, episodes: int, number: int) -> Iterator[Tensor]:
        """The places of the episodes of each optimiser step: every epoch in a new random order."""
        order = np.random.default_rng([derive_seed(self._seed, "ppo", "minibatches"), number])
        for _ in range(self._settings.epochs):
            shuffled = torch.from_numpy(order.permutation(episodes))
            yield from shuffled.split(episodes // self._settings.minibatches)

    def _minibatch_gradient(self, trajectory: Trajectory, minibatch: Tensor) -> dict[str, float]:
        """Adds up the gradient of one minibatch, divided once, by its real tokens over all ranks.

        Each rank takes every so-manieth episode of each pass, and all make equally many passes: one that has no episode
        left reads another's for nothing. The ranks' gradients are averaged, and the gradient is the sum of their parts:
        hence the factor.
        """
        tokens = int(trajectory.mask[minibatch].sum())
        lengths = trajectory.lengths[minibatch].tolist()
        passes = microbatches_of(lengths, self._budget.tokens, self._budget.episodes, self._team.size)
        found: dict[str, float] = {}
        for number, part in enumerate(passes, 1):
            mine = part[self._team.rank :: self._team.size]
            places = minibatch[mine or part[:1]]
            with self._synchronised(number == len(passes)):
                losses = self._losses(trajectory.rows(places))
                self._accelerator.backward(losses.pop("loss") * (self._team.size / tokens if mine else 0.0))
            share = int(trajectory.mask[places].sum()) / tokens if mine else 0.0
            for name, value in losses.items():
                found[name] = found.get(name, 0.0) + float(value) * share
        return dict(zip(found, self._team.add(list(found.values())), strict=True))

    def _texts_gradient(self, texts: Texts, step: int) -> float:
        """Adds the gradient of this step's pretraining texts; their loss, nats a token (PPO-ptx, Ouyang et al. 2022).

        It crosses the processes together with that of the episodes, which comes after it.
        """
        rows = texts(step)
        tokens = rows[:, 1:].numel()
        mine = rows[self._team.rank :: self._team.size]
        total = 0.0
        assert self._settings.ptx is not None
        weight = self._settings.ptx.coefficient * self._team.size / tokens
        with self._synchronised(False):
            for part in mine.split(max(1, self._budget.tokens // rows.shape[1])):
                nats = self._actors(texts=part.to(self._accelerator.device))
                self._accelerator.backward(nats * weight)
                total += float(nats)
        return self._team.add([total])[0] / tokens

    @contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        """Gradients cross the processes with the last microbatch of a step only."""
        with ExitStack() as stack:
            if not last:
                stack.enter_context(self._accelerator.no_sync(self._actors))
            yield

    def _losses(self, rows: Trajectory) -> dict[str, Tensor]:
        """The summed loss of some episodes, and means over their tokens of what to watch."""
        s = self._settings
        outputs = self._actors(rows)
        policy = maths.policy_loss(
            outputs.logprobs, rows.logprobs, rows.advantages, rows.mask, s.clip_ratio, s.dual_clip
        )
        value = maths.value_loss(outputs.values, rows.values, rows.returns, rows.mask, s.clip_value)
        loss = policy.total + s.value_coefficient * value.total
        if s.entropy_coefficient:
            loss = loss - s.entropy_coefficient * outputs.entropy.sum()
        if s.kl.placement == "loss":
            kl = maths.kl_estimate(outputs.logprobs, rows.reference, s.kl.estimator)
            loss = loss + self.kl_coefficient * torch.where(rows.mask, kl, 0.0).sum()
        with torch.no_grad():
            counted = rows.mask.sum()
            ratio = outputs.logprobs - rows.logprobs
            watch = {
                "policy_loss": policy.total / counted,
                "value_loss": value.total / counted,
                "clip_fraction": policy.clipped,
                "value_clip_fraction": value.clipped,
                "entropy": masked_mean(outputs.entropy, rows.mask),
                "approximate_kl": masked_mean(maths.kl_estimate(rows.logprobs, outputs.logprobs, "k3"), rows.mask),
                "drift": masked_mean(ratio.abs(), rows.mask),
            }
        return {"loss": loss, **watch}


def correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Pearson's; 0 where one of them doesn't vary."""
    if np.std(first) < 1e-9 or np.std(second) < 1e-9:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


# Shared with measuring


def observed(
    roles: Roles, vocabulary: Vocabulary, budget: Budget, prompts: list[Prompt], responses: list[Response]
) -> list[Episode]:
    """The episodes, with what judge, reference and critic say of them."""
    conversations = [vocabulary.conversation(*pair) for pair in zip(prompts, responses, strict=True)]
    scores = roles.judge.scores(conversations)
    known = gold_rewards([prompt.messages for prompt in prompts], [found.response for found in conversations])
    gold: Sequence[float | None] = known or [None] * len(prompts)
    blank = [
        Episode(prompt, response, score, judged, truth, [], [])
        for prompt, response, score, judged, truth in zip(
            prompts, responses, scores.values, scores.figures_of_each(), gold, strict=True
        )
    ]
    found: list[Episode | None] = [None] * len(blank)
    for part in microbatches_of([episode.tokens for episode in blank], budget.tokens, len(blank), 1):
        rows = pack_episodes([blank[place] for place in part], vocabulary.pad_id, roles.actors.policy)
        reference = roles.reference.logprobs(roles.actors, rows).tolist()
        values = _values(roles.actors, rows).tolist()
        for row, place in enumerate(part):
            count = len(blank[place].response.ids)
            found[place] = blank[place]._replace(reference=reference[row][:count], values=values[row][:count])
    return [episode for episode in found if episode is not None]


@torch.inference_mode()
def _values(actors: Actors, rows: Trajectory) -> Tensor:
    return actors.values(rows)
