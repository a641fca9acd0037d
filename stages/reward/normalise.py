"""What Bradley-Terry leaves open: where the scores begin, and how far they reach.

Both are set after training, on responses that the reference draws by itself to prompts that are not measured on: there
the score has mean 0 and variance 1. The scale is folded into the head; the means, one a head, travel in the model's
configuration as `score_mean`, since the head has no bias, and every judge takes them off.
"""

import json
from collections.abc import Sequence
from statistics import fmean, pstdev
from typing import Any, NamedTuple

import torch
from torch import nn

from rlhf.data.sources import shuffled
from rlhf.errors import DataError, RecipeError, StageFailed, UserError
from rlhf.job import Job
from rlhf.judge import head_scores
from rlhf.model import score_heads
from rlhf.recipe import Recipe, Sampling
from rlhf.runtime import derive_seed, log
from rlhf.team import Team
from rlhf.templates import Messages
from stages.common import Start, open_data, report_faults
from stages.reward.collect import Collected, Sampled, draw_once, reference_sampling, split_prompts
from stages.reward.reading import Ids, Judge, Pair, Reading, evenly

LEAST_DEVIATION = 1e-6
CHECKED_ROWS, LARGEST_ERROR = 512, 0.01  # in units of score
SPARE = 4  # times as many prompts as are wanted are looked at: some may be too long


class Normalised(NamedTuple):
    """What was found before, and what is there now."""

    deviation: float  # of the scores as training left them: so many of its nats are one unit of the score now
    figures: dict[str, Any]


def reference_way(recipe: Recipe) -> Sampling:
    """How the reference's responses are drawn. Raises RecipeError where nothing says it."""
    assert recipe.reward is not None
    if recipe.reward.sampling:
        return recipe.reward.sampling
    if recipe.reward.collect:
        return reference_sampling(recipe.reward.collect) or recipe.reward.collect.sampling
    for section in (recipe.ppo, recipe.sft):
        if section:
            return section.sampling
    raise RecipeError(
        "reward.sampling: missing; it says how the responses are drawn on which the score gets mean 0 and variance 1 "
        "(for example `sampling: {max_tokens: 256}`)"
    )


def reference_rows(
    job: Job,
    reference: Start,
    judge: Judge,
    reading: Reading,
    collected: Collected | None,
    train: Sequence[Pair],
    test: Sequence[Pair],
) -> list[Ids]:
    """The reference's own responses, as the judge reads them: those that were collected for training, if it drew them
    all in the way that is asked for, else `normalisation_prompts` of them, drawn once.
    """
    settings = job.recipe.reward
    assert settings is not None
    way = reference_way(job.recipe)
    if collected and settings.collect and reference_sampling(settings.collect) == way:
        responses = collected.responses
    else:
        prompts = shuffled(_prompts(job, train, test), derive_seed(job.recipe.seed, "reward", "reference"))
        most = settings.normalisation_prompts
        prompts = prompts[: SPARE * most]
        purpose = ("the reference", "draws")
        drawn = draw_once(job, reference, prompts, 1, way, "responses-reference", "reward.sampling", purpose, most)
        responses = [Sampled(prompts[row.place], row.text, row.ids) for row in drawn]
    reading.counts.clear()
    rows = [reading.conversation(r.prompt, r.text, r.ids if judge.shares_tokens else None) for r in responses]
    fit = [row for row in rows if row is not None]
    if len(fit) < len(rows):
        log(
            f"reward: {len(rows) - len(fit)} of {len(rows)} of the reference's responses are left out of the "
            f"normalisation: {reading.counts['dropped']} are longer than {reading.longest} tokens, and "
            f"{reading.counts['blank']} are blank, which the judge's chat template doesn't show"
        )
    if len(fit) < 2:
        raise DataError(f"reward: {len(fit)} of the reference's responses can be scored, and two are the least")
    return fit


def _prompts(job: Job, train: Sequence[Pair], test: Sequence[Pair]) -> list[Messages]:
    """The different prompts that the reference may be asked: of training if there are any, then those of ppo, and those
    of the held-out comparisons last. Raises RecipeError where there are none.
    """
    recipe = job.recipe
    assert recipe.reward is not None
    if recipe.reward.collect:
        return split_prompts(job, recipe.reward.collect)["train"]
    prompts = [pair.comparison.prompt for pair in train]
    if not prompts and recipe.ppo:
        dataset = open_data(recipe, "reward", recipe.ppo.prompts, "prompts", "train")
        prompts = list(dataset)
        report_faults(dataset)
    prompts = prompts or [pair.comparison.prompt for pair in test]
    if not prompts:
        raise RecipeError(
            "reward: there are no prompts (collect, train, test or ppo.prompts) to normalise the judge on"
        )
    return list({json.dumps(prompt): prompt for prompt in prompts}.values())


@torch.no_grad()
def normalise_score(team: Team, model: Any, rows: Sequence[Ids]) -> Normalised:
    """Gives the score mean 0 and variance 1 on these rows, each head the mean 0; in place.

    All heads are scaled alike: what they say differs in size too. Some rows are scored again afterwards. Raises
    UserError where the score doesn't vary, and StageFailed where it isn't what it should be now.
    """
    before = score_rows(team, model, rows)
    deviation = pstdev(fmean(scores) for scores in before)
    if deviation < LEAST_DEVIATION:
        raise UserError("the reward model gives every response the same score, so nothing can be learned from it")
    layer = score_layer(model)
    for parameter in layer.parameters(recurse=False):
        parameter.div_(deviation)
    means = [fmean(column) / deviation for column in zip(*before, strict=True)]
    model.config.score_mean = means if len(means) > 1 else means[0]
    expected = [fmean(scores) / deviation - fmean(means) for scores in before]
    places = evenly(range(len(rows)), CHECKED_ROWS)
    found = [fmean(scores) - fmean(means) for scores in score_rows(team, model, [rows[place] for place in places])]
    off = max(abs(score - expected[place]) for place, score in zip(places, found, strict=True))
    if not off < LARGEST_ERROR:
        raise StageFailed(f"reward: after the normalisation a score is off by {off:.3g}; is {layer} all of the head?")
    return Normalised(
        deviation,
        {
            "reference_responses": len(rows),
            "reference_score_mean": round(fmean(expected), 6),
            "reference_score_variance": round(pstdev(expected) ** 2, 6),
        },
    )


def score_rows(team: Team, model: Any, rows: Sequence[Ids]) -> list[list[float]]:
    """The raw output of every head for each row of ids; equal rows are read once."""
    distinct = {row.tobytes(): row for row in rows}
    found = team.share(list(distinct.values()), lambda mine: head_scores(model, [row.tolist() for row in mine]))
    scores = dict(zip(distinct, found, strict=True))
    return [scores[row.tobytes()] for row in rows]


def score_layer(model: nn.Module) -> nn.Linear:
    """The layer that gives a classifier's outputs, whatever its name: the last linear one of as many outputs."""
    heads = score_heads(model.config)
    found = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == heads]
    if not found:
        raise UserError(f"{type(model).__name__}: no linear layer gives its {heads} outputs, so they can't be scaled")
    return found[-1]
