"""Episodes: the policy's responses to prompts, and what judge, reference and critic say of them."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.judge import Scores
from rlhf.model import accelerator_bytes, tokens_fitting
from rlhf.recipe import PpoSection
from rlhf.rollout import Drawing, Response, build_engine, uniforms
from rlhf.sharding import Holding, gathered
from rlhf.team import Team
from stages.gold import gold_rewards
from stages.ppo.episodes import Episode, Prompt, Trajectory, Vocabulary, microbatches_of, pack_episodes
from stages.ppo.roles import Actors, HeldRoles, Roles

ACTIVATIONS = 2**28  # bytes of a microbatch; on an accelerator:
ACTIVATIONS_SHARE = 1 / 16  # of its memory


class Budget(NamedTuple):
    """How much is read at once, on each rank."""

    tokens: int
    episodes: int

    @classmethod
    def of(cls, settings: PpoSection, model: PreTrainedModel) -> "Budget":
        """The recipe's; or else as many tokens as have about those ACTIVATIONS in a Transformer."""
        fitting = max(256, tokens_fitting(model, accelerator_bytes(model.device, ACTIVATIONS_SHARE) or ACTIVATIONS))
        return cls(settings.microbatch_tokens or fitting, settings.microbatch_size or settings.episodes_per_update)


class Setup(NamedTuple):
    """What learning and measuring have in common."""

    team: Team
    seed: int
    settings: PpoSection
    roles: Roles
    vocabulary: Vocabulary
    budget: Budget
    accelerator: Accelerator
    holding: Holding
    held: HeldRoles


class Rollout:
    """Makes episodes, always in the recipe's way; the ranks share the work."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self.drawing_seconds = 0.0  # of this rank, the last time
        drawing = Drawing(**setup.settings.sampling.model_dump())
        with setup.held.actors.gathered(), setup.roles.actors.drawing() as policy:
            self._engine = build_engine(
                policy,
                setup.vocabulary.tokenizer,
                drawing,
                end_ids=setup.vocabulary.end_ids,
                kind=setup.settings.engine,
                batch_size=setup.settings.rollout_batch_size,
            )

    def episodes(self, prompts: Sequence[Prompt], seed: int, number: int, first: int = 0) -> list[Episode]:
        """An episode of each prompt, decided by seed, number, and its own number: `first` and its place."""
        setup = self._setup
        mine = range(len(prompts))[setup.team.rank :: setup.team.size]
        chosen = [prompts[place] for place in mine]
        draws = uniforms(seed, number, [first + place for place in mine], setup.settings.sampling.max_tokens)
        with setup.holding.computing():  # as the training passes are
            responses = self._drawn(chosen, draws)
            found = observed(setup, chosen, responses)
        return setup.team.share(range(len(prompts)), lambda _: found)

    def _drawn(self, prompts: list[Prompt], draws: Tensor) -> list[Response]:
        """This process's responses. All processes come here, those without a prompt too: weights are gathered."""
        setup = self._setup
        began = time.monotonic()
        with setup.held.actors.gathered(), setup.roles.actors.drawing():
            found = self._engine.generate([prompt.ids for prompt in prompts], draws) if prompts else []
        self.drawing_seconds = time.monotonic() - began
        return found

    def second_scores(self, episodes: Sequence[Episode]) -> list[float]:
        """What the second judge says of the responses; nothing where there is none."""
        setup = self._setup
        judge = setup.roles.second_judge
        if judge is None:
            return []

        def scores(mine: list[Episode]) -> list[float]:
            return judge.scores([setup.vocabulary.conversation(e.prompt, e.response) for e in mine]).values

        with gathered(*setup.held.second_judge):
            return setup.team.share(episodes, scores)


def observed(setup: Setup, prompts: list[Prompt], responses: list[Response]) -> list[Episode]:
    """The episodes, with what judge, reference and critic say of them, one model after the other.

    All processes come here, those without an episode too: weights are gathered.
    """
    roles, vocabulary, held = setup.roles, setup.vocabulary, setup.held
    conversations = [vocabulary.conversation(*pair) for pair in zip(prompts, responses, strict=True)]
    with gathered(*held.judge):
        scores = roles.judge.scores(conversations) if conversations else Scores([], {})
    gold = gold_rewards([prompt.messages for prompt in prompts], [found.response for found in conversations])
    blank = [
        Episode(prompt, response, score, judged, truth, [], [])
        for prompt, response, score, judged, truth in zip(
            prompts, responses, scores.values, scores.figures_of_each(), gold, strict=True
        )
    ]
    with held.reference.gathered():
        reference = _read(setup, blank, partial(roles.reference.logprobs, roles.actors))
    with held.actors.gathered():
        values = _read(setup, blank, partial(_values, roles.actors))
    return [
        episode._replace(reference=logprobs, values=value)
        for episode, logprobs, value in zip(blank, reference, values, strict=True)
    ]


def _read(setup: Setup, episodes: list[Episode], model: Callable[[Trajectory], Tensor]) -> list[list[float]]:
    """What a model says of each token of each response."""
    found: list[list[float]] = [[] for _ in episodes]
    lengths = [episode.tokens for episode in episodes]
    for part in microbatches_of(lengths, setup.budget.tokens, len(episodes), 1):
        rows = pack_episodes([episodes[place] for place in part], setup.vocabulary.pad_id, setup.roles.actors.policy)
        for place, said in zip(part, model(rows).tolist(), strict=True):
            found[place] = said[: len(episodes[place].response.ids)]
    return found


def shaped(settings: PpoSection, score: float, unit: float, ended: bool) -> float:
    """A judge's score as it becomes a reward: divided by the unit, cut, less what not ending costs, or what is given
    in its place.
    """
    found, most = score / unit, settings.score.clip
    if most is not None:
        found = min(max(found, -most), most)
    if ended:
        return found
    return found - settings.no_end_penalty if settings.no_end_score is None else settings.no_end_score


@torch.inference_mode()
def _values(actors: Actors, rows: Trajectory) -> Tensor:
    return actors.values(rows)
