"""How a policy does on prompts that it doesn't learn on: score, second judge, KL, length, gold where it is known."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from rlhf.functional.intervals import Estimate, mean_estimate
from rlhf.judge import Judge, mean_figures
from rlhf.recipe import PpoSection
from rlhf.rollout import uniforms
from rlhf.runtime import derive_seed
from rlhf.team import Team
from stages.ppo.episodes import Episode, Prompt, Vocabulary
from stages.ppo.learner import Budget, Drawer, observed
from stages.ppo.roles import Roles


class Measured(NamedTuple):
    """Means over the prompts, each with its interval."""

    score: Estimate
    judged: dict[str, float]  # means of the judge's further figures
    second: Estimate | None  # of the second judge
    kl: Estimate  # of the whole response, nats
    response_tokens: Estimate
    ended: Estimate
    gold: Estimate | None
    examples: list[list[str]]  # prompt and response

    def line(self) -> str:
        """For the terminal."""
        second = f", second judge {self.second.mean:.3f}" if self.second else ""
        gold = f", gold {self.gold.mean:.3f}" if self.gold else ""
        return (
            f"score {self.score.mean:.3f}{second}{gold}, KL {self.kl.mean:.2f}, "
            f"{self.response_tokens.mean:.1f} tokens, {self.ended.mean:.0%} ended"
        )

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

    def __init__(
        self,
        team: Team,
        seed: int,
        settings: PpoSection,
        roles: Roles,
        vocabulary: Vocabulary,
        drawer: Drawer,
        budget: Budget,
        prompts: Sequence[Prompt],
        purpose: str,
    ) -> None:
        self._team, self._settings, self._roles, self._vocabulary = team, settings, roles, vocabulary
        self._drawer, self._budget, self._prompts = drawer, budget, list(prompts)
        self._seed = derive_seed(seed, "ppo", purpose)

    def measure(self, examples: int = 1) -> Measured:
        """How the policy does now."""
        episodes = self.draw()
        second = self._second(episodes)
        gold = [episode.gold for episode in episodes if episode.gold is not None]
        return Measured(
            mean_estimate([episode.score for episode in episodes]),
            mean_figures([episode.judged for episode in episodes]),
            mean_estimate(second) if second else None,
            mean_estimate([divergence(episode) for episode in episodes]),
            mean_estimate([float(len(episode.response.ids)) for episode in episodes]),
            mean_estimate([float(episode.response.ended) for episode in episodes]),
            mean_estimate(gold) if gold else None,
            [list(self.told(episode)) for episode in episodes[:examples]],
        )

    def draw(self, round_number: int = 0) -> list[Episode]:
        """A response of the policy to every prompt; other ones in another round."""

        def answer(mine: list[int]) -> list[Episode]:
            prompts = [self._prompts[index] for index in mine]
            draws = uniforms(self._seed, round_number, mine, self._settings.sampling.max_tokens)
            return observed(self._roles, self._vocabulary, self._budget, prompts, self._drawer.draw(prompts, draws))

        return self._team.share(range(len(self._prompts)), answer)

    def told(self, episode: Episode) -> tuple[str, str]:
        """The last message of the prompt, and the response, as text."""
        response = self._vocabulary.conversation(episode.prompt, episode.response).response
        return episode.prompt.messages[-1]["content"], response

    def _second(self, episodes: Sequence[Episode]) -> list[float]:
        judge: Judge | None = self._roles.second_judge
        if judge is None:
            return []

        def scores(mine: list[Episode]) -> list[float]:
            return judge.scores([self._vocabulary.conversation(e.prompt, e.response) for e in mine]).values

        return self._team.share(episodes, scores)


def divergence(episode: Episode) -> float:
    """An estimate of KL(policy || reference) of a whole response, nats: the sum of its tokens' k1."""
    drawn = torch.tensor(episode.response.logprobs, dtype=torch.float64)
    return float((drawn - torch.tensor(episode.reference, dtype=torch.float64)).sum())
