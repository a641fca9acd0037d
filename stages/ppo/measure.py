"""How a policy does on prompts that it doesn't learn on: score, second judge, KL, length, gold where it is known."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch

from rlhf.functional.intervals import Estimate, mean_estimate
from rlhf.functional.ppo import RunningMoments
from rlhf.judge import mean_figures
from rlhf.runtime import derive_seed
from stages.ppo.episodes import Episode, Prompt
from stages.ppo.rollout import Rollout, Setup, shaped


class Measured(NamedTuple):
    """Means over the prompts, each with its interval."""

    score: Estimate
    judged: dict[str, float]  # means of the judge's further figures
    second: Estimate | None  # of the second judge
    kl: Estimate  # of the whole response, nats
    response_tokens: Estimate
    ended: Estimate
    gold: Estimate | None
    net_score: float  # less what not ending costs
    each: dict[str, list[float]]  # score, second and gold of every prompt, in order

    def line(self) -> str:
        """For the terminal."""
        second = f", second judge {self.second.mean:.3f}" if self.second else ""
        gold = f", gold {self.gold.mean:.3f}" if self.gold else ""
        unfinished = self.net_score != self.score.mean
        net = f" ({self.net_score:.3f} less what not ending costs)" if unfinished else ""
        return (
            f"score {self.score.mean:.3f}{net}{second}{gold}, KL {self.kl.mean:.2f}, "
            f"{self.response_tokens.mean:.1f} tokens, {self.ended.mean:.0%} ended"
        )

    def gain_over(self, before: "Measured", what: str) -> Estimate | None:
        """How much better than before, prompt by prompt: narrower than two intervals, since prompts differ; None where
        it isn't known.
        """
        pairs = list(zip(self.each[what], before.each[what], strict=True))
        return mean_estimate([now - then for now, then in pairs]) if pairs else None

    def facts(self) -> dict[str, Any]:
        """As JSON holds it."""
        return self._asdict()

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> "Measured":
        """What `facts` gave."""
        estimates = {
            name: Estimate(*facts[name])
            for name in ("score", "second", "kl", "response_tokens", "ended", "gold")
            if facts[name] is not None
        }
        return cls(**{**facts, **estimates})


class Examiner:
    """Measures the policy, always on the same prompts with the same draws."""

    def __init__(self, setup: Setup, rollout: Rollout, prompts: Sequence[Prompt], purpose: str) -> None:
        self._rollout, self._prompts, self._settings = rollout, list(prompts), setup.settings
        self._seed = derive_seed(setup.seed, "ppo", purpose)

    def measure(self) -> Measured:
        """How the policy does now."""
        episodes = self.draw()
        second = self._rollout.second_scores(episodes)
        gold = [episode.gold for episode in episodes if episode.gold is not None]
        return Measured(
            mean_estimate([episode.score for episode in episodes]),
            mean_figures([episode.judged for episode in episodes]),
            mean_estimate(second) if second else None,
            mean_estimate([divergence(episode) for episode in episodes]),
            mean_estimate([float(len(episode.response.ids)) for episode in episodes]),
            mean_estimate([float(episode.response.ended) for episode in episodes]),
            mean_estimate(gold) if gold else None,
            self._net_score(episodes),
            {"score": [episode.score for episode in episodes], "second": second, "gold": gold},
        )

    def _net_score(self, episodes: Sequence[Episode]) -> float:
        """The mean of what would become rewards, in the judge's unit: where training divides the scores by their
        deviation, it is here that of these.
        """
        s = self._settings
        moments = RunningMoments().with_values([episode.score for episode in episodes])
        unit = moments.unit if s.score.scaling == "running" else 1.0
        return unit * fmean(shaped(s, episode.score, unit, episode.response.ended) for episode in episodes)

    def draw(self, round_number: int = 0) -> list[Episode]:
        """A response of the policy to every prompt; other ones in another round, those of `measure` in round 0."""
        return self._rollout.episodes(self._prompts, self._seed, round_number)

    def second_scores(self, episodes: Sequence[Episode]) -> list[float]:
        """What the second judge says of them; nothing where there is none."""
        return self._rollout.second_scores(episodes)


def divergence(episode: Episode) -> float:
    """An estimate of KL(policy || reference) of a whole response, nats: the sum of its tokens' k1."""
    drawn = torch.tensor(episode.response.logprobs, dtype=torch.float64)
    return float((drawn - torch.tensor(episode.reference, dtype=torch.float64)).sum())
