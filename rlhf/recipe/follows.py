"""What follows from a recipe: batch arithmetic, what a stage stands on, what it needs from outside."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from rlhf.errors import RecipeError
from rlhf.recipe.base import STAGES, Source, StageName
from rlhf.recipe.shared import JudgeSection, Sampling
from rlhf.recipe.whole import Recipe, evaluating_judges


def training_sources(recipe: Recipe) -> dict[str, tuple[Source, ...]]:
    """What the evaluate stage looks into for its tasks' items, by the key that names it."""
    if recipe.evaluate and recipe.evaluate.training:
        return {"evaluate.training": recipe.evaluate.training}
    found: dict[str, tuple[Source, ...]] = {}
    if recipe.pretrain and "pretrain" in recipe.stages:
        found["pretrain.train"] = recipe.pretrain.train
        if recipe.pretrain.replay:
            found["pretrain.replay.train"] = recipe.pretrain.replay.train
    if recipe.sft and "sft" in recipe.stages:
        found["sft.train"] = recipe.sft.train
    return found


def evaluating_sampling(recipe: Recipe) -> Sampling:
    """How the evaluate stage draws responses: as it says itself, or as ppo or sft does."""
    for section in (recipe.evaluate, recipe.ppo, recipe.sft):
        if section and section.sampling:
            return section.sampling
    return Sampling(max_tokens=256)


def microbatches(recipe: Recipe, stage: StageName, processes: int) -> tuple[int, int]:
    """(rows of one forward pass on one process, forward passes of one optimiser step) of a stage that trains.

    Raises RecipeError where the rows of a step don't divide evenly; nothing is rounded in silence. (In ppo rows are as
    long as the policy makes them, and any number of them is shared.)
    """
    section: Any = getattr(recipe, stage)
    if stage == "pretrain":
        rows, what = section.tokens_per_step // section.sequence_length, "tokens_per_step / sequence_length"
        first = section.ramp.from_ // section.sequence_length if section.ramp else rows
        if first % processes:
            raise RecipeError(
                f"pretrain: {'ramp.from' if section.ramp else 'tokens_per_step'} / sequence_length is {first}, which "
                f"is not a multiple of the {processes} processes"
            )
    else:
        what = "dialogues_per_step" if stage == "sft" else "pairs_per_step"
        rows = getattr(section, what)
    if rows % processes:
        raise RecipeError(f"{stage}: {what} is {rows}, which is not a multiple of the {processes} processes")
    mine = rows // processes
    size = min(section.microbatch_size or mine, mine)
    if mine % size:
        share = f"the share of each of {processes} processes in " if processes > 1 else ""
        raise RecipeError(f"{stage}.microbatch_size: {size} does not divide {mine}, {share}{what}")
    return size, mine // size


# What a stage stands on

_UPSTREAM: dict[str, tuple[StageName, ...]] = {
    "tokenizer": (),
    "pretrain": ("tokenizer",),
    "sft": ("pretrain",),
    "reward": ("sft",),
    "ppo": ("sft", "reward"),
    "evaluate": ("pretrain", "sft", "ppo"),
}


def upstream(recipe: Recipe, stage: StageName) -> tuple[StageName, ...]:
    """The stages of this recipe whose models the stage reads."""
    judged = stage == "evaluate" and any(judge.model == "reward" for judge in evaluating_judges(recipe)[1])
    names = {*_UPSTREAM[stage], *(("reward",) if judged else ())}
    return tuple(name for name in STAGES if name in names and name in recipe.stages)


def needs_base(recipe: Recipe, stage: StageName) -> bool:
    """Whether the stage reads the recipe's `base` itself."""
    if recipe.base is None:
        return False
    if stage in ("pretrain", "evaluate"):
        return stage == "pretrain" or "pretrain" not in recipe.stages
    return stage in ("sft", "reward", "ppo") and not {"pretrain", "sft"} & set(upstream(recipe, stage))


class External(NamedTuple):
    """Something from outside the run's directory and the data sources that a stage reads."""

    key: str  # of the recipe
    value: str  # directory, hub id, file, or MODULE:FUNCTION
    kind: Literal["causal_lm", "judge", "base", "python", "file"]


def externals(recipe: Recipe, stage: StageName) -> list[External]:
    """The models, files and Python functions that a stage's section names."""
    found: list[External] = []
    if needs_base(recipe, stage) and recipe.base:
        found.append(External("base", recipe.base, "causal_lm"))
    if stage == "sft" and recipe.sft and recipe.sft.chat_template not in ("rlhf", "chatml"):
        found.append(External("sft.chat_template", recipe.sft.chat_template, "file"))
    if stage == "reward" and recipe.reward:
        section = recipe.reward
        if section.from_:
            found.append(External("reward.from", section.from_, "judge"))
        if section.start:
            found.append(External("reward.start", section.start, "base"))
        if section.collect:
            kind, _, rest = section.collect.labeller.partition(":")
            if kind in ("file", "python"):
                found.append(External("reward.collect.labeller", rest, "file" if kind == "file" else "python"))
            others = [sampler.model for sampler in section.collect.samplers if sampler.model != "sft"]
            found += [External("reward.collect.samplers", model, "causal_lm") for model in others]
    judges: list[tuple[str, JudgeSection]] = []
    if stage == "ppo" and recipe.ppo:
        judges = [("ppo.judge", judge) for judge in (*recipe.ppo.judge, *recipe.ppo.second_judge)]
    if stage == "evaluate" and recipe.evaluate and (recipe.evaluate.prompts or recipe.evaluate.comparisons):
        key, sections = evaluating_judges(recipe)
        judges = [(key, judge) for judge in sections]
    for key, judge in judges:
        if judge.python:
            found.append(External(key, judge.python, "python"))
        elif judge.model and judge.model != "reward":
            found.append(External(key, judge.model, "judge"))
        if judge.chat_template:
            found.append(External(f"{key}.chat_template", judge.chat_template, "file"))
    return found
