"""One update of PPO: roll out, judge, estimate advantages, then clipped steps on minibatches of whole episodes."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rlhf.errors import StageFailed
from rlhf.functional import ppo as maths
from rlhf.functional.intervals import mean_estimate
from rlhf.functional.masked import masked_mean, masked_moments, mean_and_variance, whiten
from rlhf.judge import mean_figures
from rlhf.pieces import learned, pieces, put_in
from rlhf.rollout import Response
from rlhf.runtime import derive_seed
from rlhf.sharding import Moving
from stages.ppo.episodes import Episode, Prompt, Trajectory, microbatches_of, pack_episodes
from stages.ppo.roles import Actors, Outputs, Pass, Who
from stages.ppo.rollout import Rollout, Setup, shaped

ADAM_BETAS, ADAM_EPSILON = (0.9, 0.95), 1e-5
CRITIC_RATE = 5.0  # times the policy's, by default
VALUE_COEFFICIENT, ON_A_SHARED_TRUNK = 0.5, 0.01  # by default
WARMUP_ON_A_SHARED_TRUNK = 2  # updates, by default

Texts = Callable[[int], Tensor]  # the rows of pretraining text, ids [n, L + 1], of an optimiser step


class Learning(NamedTuple):
    """A pass with what moves its parameters: an optimiser for each of those whom it is of."""

    who: tuple[Who, ...]
    moving: Moving


class Learner:
    """The state of the optimisation: roles, optimisers, KL coefficient, running statistics of the scores."""

    def __init__(
        self,
        setup: Setup,
        rollout: Rollout,
        prompts: list[Prompt],
        texts: Texts | None = None,
    ) -> None:
        self._setup, self._team, self._settings = setup, setup.team, setup.settings
        self._actors: Actors = setup.held.actors.learner
        self._rollout, self._prompts, self._accelerator, self._texts = rollout, prompts, setup.accelerator, texts
        s = setup.settings
        self._rates: dict[Who, float] = {
            "policy": s.learning_rate,
            "critic": s.critic_learning_rate or CRITIC_RATE * s.learning_rate,
        }
        by_default = min(WARMUP_ON_A_SHARED_TRUNK, s.updates // 10) if s.layout == "shared" else 0
        self._warmup = by_default if s.critic_warmup is None else s.critic_warmup
        self._value_coefficient = s.value_coefficient
        if s.value_coefficient is None:
            self._value_coefficient = ON_A_SHARED_TRUNK if s.layout == "shared" else VALUE_COEFFICIENT
        self._passes = [self._prepared(each) for each in self._actors.passes(setup.held.actors.called)]
        self.kl_coefficient = setup.settings.kl.coefficient
        self._scores = maths.RunningMoments()

    def _prepared(self, part: Pass) -> Learning:
        how: dict[str, Any] = {"betas": ADAM_BETAS, "eps": ADAM_EPSILON, "weight_decay": 0.0, "fused": True}
        optimizers = {
            str(who): torch.optim.AdamW(part.trained[who].parameters(), lr=self._rates[who], **how) for who in part.who
        }
        return Learning(part.who, self._setup.held.actors.moving(part, optimizers))

    # State

    def state(self) -> dict[str, Any]:
        """What the next update depends on."""
        return {
            "actors": pieces(learned(self._actors)),
            "optimizers": {who: state for part in self._passes for who, state in part.moving.state().items()},
            "kl_coefficient": self.kl_coefficient,
            "scores": list(self._scores),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave."""
        put_in(learned(self._actors), state["actors"])
        for part in self._passes:
            part.moving.load(state["optimizers"])
        self.kl_coefficient = state["kl_coefficient"]
        self._scores = maths.RunningMoments(*state["scores"])

    def _set_rates(self, number: int, scale: float) -> dict[str, float]:
        """The learning rates of this update."""
        s = self._settings
        share = scale * (1 - number / s.updates if s.schedule == "linear" else 1)
        for part in self._passes:
            for who in part.who:
                part.moving.set_rate(self._rates[who] * share, who)
        return {"learning_rate": self._rates["policy"] * share, "critic_learning_rate": self._rates["critic"] * share}

    def weights(self) -> nn.Module:
        """All that is trained, for ranks to compare."""
        return self._actors

    # One update

    def update(self, number: int, rate_scale: float = 1.0) -> tuple[list[Episode], dict[str, float]]:
        """One update; its episodes and figures. The ranks share the rollout, then every rank has all episodes.

        `rate_scale` is what the doctor leaves of the learning rates.
        """
        started = time.monotonic()
        chosen = self._choose_prompts(number)
        seed = derive_seed(self._setup.seed, "ppo", "rollout")
        episodes = self._rollout.episodes(chosen, seed, number, number * len(chosen))
        rolled = time.monotonic()
        trajectory, figures = self._evaluate(episodes)
        figures |= self._set_rates(number, rate_scale)
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
            **self._timings(started, rolled, len(chosen), sum(tokens)),
        }

    def _timings(self, started: float, rolled: float, episodes: int, tokens: int) -> dict[str, float]:
        ended, drawing = time.monotonic(), self._rollout.drawing_seconds
        return {
            "episodes_per_second": episodes / (ended - started),
            "rollout_tokens_per_second": tokens / drawing,
            "drawing_seconds": drawing,
            "observing_seconds": rolled - started - drawing,  # judge, reference and critic
            "learning_seconds": ended - rolled,
        }

    def _choose_prompts(self, number: int) -> list[Prompt]:
        """The update's prompts: pass after pass over all of them, each in a new random order."""
        n = self._settings.episodes_per_update
        orders: dict[int, np.ndarray] = {}
        chosen = []
        for place in range(number * n, (number + 1) * n):
            epoch, index = divmod(place, len(self._prompts))
            if epoch not in orders:
                seed = derive_seed(self._setup.seed, "ppo", "prompts")
                orders[epoch] = np.random.default_rng([seed, epoch]).permutation(len(self._prompts))
            chosen.append(self._prompts[int(orders[epoch][index])])
        return chosen

    def _misplaced(self, response: Response) -> bool:
        """Whether a pad stands in a response, or an end token before its last token."""
        ends = set(self._setup.vocabulary.end_ids)
        return self._setup.vocabulary.pad_id in response.ids or any(token in ends for token in response.ids[:-1])

    # Rewards and advantages

    def _evaluate(self, episodes: Sequence[Episode]) -> tuple[Trajectory, dict[str, float]]:
        """Rewards and advantages of all episodes of the update, whitened over all of them."""
        s = self._settings
        blank = pack_episodes(episodes, self._setup.vocabulary.pad_id, self._actors.policy)
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
        """The judge's scores as they become rewards.

        The statistics are of what the judge says of all episodes so far, these included.
        """
        self._scores = self._scores.with_values([episode.score for episode in episodes])
        unit = self._scores.unit if self._settings.score.scaling == "running" else 1.0
        return [shaped(self._settings, episode.score, unit, episode.response.ended) for episode in episodes]

    def _adapt(self, kl: float, episodes: int) -> None:
        """Moves the KL coefficient towards the target, where there is one."""
        target = self._settings.kl.target
        if target is not None:
            horizon = self._settings.kl.horizon
            self.kl_coefficient = maths.adapted_coefficient(self.kl_coefficient, kl, target, horizon, episodes)

    # Optimisation

    def _optimise(self, trajectory: Trajectory, number: int) -> dict[str, float]:
        """The epochs of clipped steps. Every minibatch is one step of each optimiser, whatever the microbatches."""
        s = self._settings
        self._actors.train()
        watched: list[dict[str, float]] = []
        first = number * s.epochs * s.minibatches
        for step, minibatch in enumerate(self._minibatches(len(trajectory.ids), number)):
            figures, far = self._step(trajectory, minibatch, number, first + step, may_stop=step > 0)
            watched.append(figures)
            if far:
                break
        self._actors.eval()
        means = {name: fmean(figures[name] for figures in watched if name in figures) for name in watched[0]}
        # before the first step the policy is the one that drew: what differs then is rounding, or a fault
        return means | {"drift": watched[0]["drift"], "optimiser_steps": float(len(watched))}

    def _step(
        self, trajectory: Trajectory, minibatch: Tensor, number: int, step: int, *, may_stop: bool
    ) -> tuple[dict[str, float], bool]:
        """Pass after pass, the minibatch's gradient and a step on it. Its figures, and whether the policy is too far.

        Where it is, by `stop_kl`, nothing is moved. Not so in an update's first step: no step was made yet.
        """
        s = self._settings
        figures: dict[str, float] = {}
        for part in self._passes:
            if self._texts and "policy" in part.who:
                figures["text_loss"] = self._texts_gradient(part, self._texts(step))
            figures |= self._minibatch_gradient(part, trajectory, minibatch)
            figures |= self._clip(part, number)
            if may_stop and s.stop_kl is not None and figures["approximate_kl"] > s.stop_kl:
                part.moving.forget()
                return figures, True
            for who in part.who:
                if who == "critic" or number >= self._warmup:
                    part.moving.step(who)
            part.moving.forget()
        return figures, False

    def _clip(self, part: Learning, number: int) -> dict[str, float]:
        """Clips the gradients of policy and critic apart; their norms before."""
        most = self._settings.gradient_clipping
        norms = {f"{who}_gradient_norm": part.moving.clip(most, who) for who in part.who}
        if not np.isfinite(list(norms.values())).all():
            raise StageFailed(f"ppo: the gradient is not finite in update {number + 1}; try a smaller learning_rate")
        return norms

    def _minibatches(self, episodes: int, number: int) -> Iterator[Tensor]:
        """The places of the episodes of each optimiser step: every epoch in a new random order."""
        order = np.random.default_rng([derive_seed(self._setup.seed, "ppo", "minibatches"), number])
        for _ in range(self._settings.epochs):
            shuffled = torch.from_numpy(order.permutation(episodes))
            yield from shuffled.split(episodes // self._settings.minibatches)

    def _minibatch_gradient(self, part: Learning, trajectory: Trajectory, minibatch: Tensor) -> dict[str, float]:
        """Adds up a pass's gradient of one minibatch, divided once, by its real tokens over all ranks.

        Each rank takes every so-manieth episode of each microbatch, and all have equally many: one that has no episode
        left reads another's for nothing. The ranks' gradients are averaged, and the gradient is the sum of their parts:
        hence the factor.
        """
        tokens = int(trajectory.mask[minibatch].sum())
        lengths = trajectory.lengths[minibatch].tolist()
        microbatches = microbatches_of(lengths, self._setup.budget.tokens, self._setup.budget.episodes, self._team.size)
        found: dict[str, float] = {}
        for number, rows in enumerate(microbatches, 1):
            mine = rows[self._team.rank :: self._team.size]
            places = minibatch[mine or rows[:1]]
            with self._synchronised(part, number == len(microbatches)):
                losses = self._losses(part.moving.module, trajectory.rows(places))
                part.moving.backward(losses.pop("loss") * (self._team.size / tokens if mine else 0.0))
            share = int(trajectory.mask[places].sum()) / tokens if mine else 0.0
            for name, value in losses.items():
                found[name] = found.get(name, 0.0) + float(value) * share
        return dict(zip(found, self._team.add(list(found.values())), strict=True))

    def _texts_gradient(self, part: Learning, rows: Tensor) -> float:
        """Adds the gradient of pretraining texts [n, L + 1]; their loss, nats a token (PPO-ptx, Ouyang et al. 2022).

        It crosses the processes together with that of the episodes, which comes after it. All ranks do equally many
        passes, since each may be a meeting: one that has no row left reads another's for nothing.
        """
        tokens, ranks = rows[:, 1:].numel(), self._team.size
        at_once = max(1, self._setup.budget.tokens // rows.shape[1])
        total = 0.0
        assert self._settings.ptx is not None
        weight = self._settings.ptx.coefficient * ranks / tokens
        with self._synchronised(part, False):
            for texts in rows.split(at_once * ranks):
                mine = texts[self._team.rank :: ranks]
                nats = part.moving.module(texts=(mine if len(mine) else rows[:1]).to(self._accelerator.device))
                part.moving.backward(nats * (weight if len(mine) else 0.0))
                total += float(nats) if len(mine) else 0.0
        return self._team.add([total])[0] / tokens

    @contextmanager
    def _synchronised(self, part: Learning, last: bool) -> Iterator[None]:
        """Gradients cross the processes with the last microbatch of a step only."""
        with ExitStack() as stack:
            if not last:
                stack.enter_context(part.moving.accumulating())
            yield

    def _losses(self, model: Any, rows: Trajectory) -> dict[str, Tensor]:
        """The summed loss of some episodes, and means over their tokens of what to watch."""
        s = self._settings
        outputs: Outputs = model(rows)
        found: dict[str, Tensor] = {"loss": torch.zeros((), dtype=rows.logprobs.dtype, device=rows.ids.device)}
        counted = rows.mask.sum()
        if outputs.likelihoods:
            logprobs, entropy = outputs.likelihoods
            policy = maths.policy_loss(logprobs, rows.logprobs, rows.advantages, rows.mask, s.clip_ratio, s.dual_clip)
            found["loss"] = found["loss"] + policy.total
            if s.entropy_coefficient:
                found["loss"] = found["loss"] - s.entropy_coefficient * entropy.sum()
            if s.kl.placement == "loss":
                kl = torch.where(rows.mask, maths.kl_estimate(logprobs, rows.reference, s.kl.estimator), 0.0).sum()
                found["loss"] = found["loss"] + self.kl_coefficient * kl
                found["kl_loss"] = kl.detach() / counted
            with torch.no_grad():
                moved = maths.kl_estimate(rows.logprobs, logprobs, "k3")
                found |= {
                    "policy_loss": policy.total / counted,
                    "clip_fraction": policy.clipped,
                    "entropy": masked_mean(entropy, rows.mask),
                    "approximate_kl": masked_mean(moved, rows.mask),
                    "drift": masked_mean((logprobs - rows.logprobs).abs(), rows.mask),
                }
        if outputs.values is not None:
            value = maths.value_loss(outputs.values, rows.values, rows.returns, rows.mask, s.clip_value)
            found["loss"] = found["loss"] + self._value_coefficient * value.total
            found |= {"value_loss": value.total.detach() / counted, "value_clip_fraction": value.clipped}
        return found


def correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Pearson's; 0 where one of them doesn't vary."""
    if np.std(first) < 1e-9 or np.std(second) < 1e-9:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])
