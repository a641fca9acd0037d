"""What a recipe's judges and `ppo.critic_from` mean: what ppo learns from and evaluate asks, and ppo's critic."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.errors import RecipeError, UserError
from rlhf.judge import ClassifierJudge, FunctionJudge, Judge, Part, RewardModelJudge, WeightedSum, score_means
from rlhf.judge.classifier import label_index
from rlhf.model import (
    Critic,
    check_vocabulary,
    critic_from_policy,
    critic_from_scorer,
    load_classifier,
    load_scorer,
    score_heads,
)
from rlhf.plugins import load_function
from rlhf.recipe import JudgeSection, Recipe
from rlhf.rundir import RunDir
from rlhf.runtime import log
from stages.common import Start, context_of, named_model, runs_code, starting_model


def build_judge(
    recipe: Recipe,
    run: RunDir | None,
    tokenizer: PreTrainedTokenizerBase | None,
    context: int,
    device: torch.device,
    sections: Sequence[JudgeSection],
    what: str,
    lent: PreTrainedModel | None = None,
    key: str = "ppo.judge",
) -> WeightedSum:
    """The weighted sum of the sections, its models on the device. Nothing is loaded that they don't name.

    `tokenizer` and `context` are the policy's; without them every judge reads text. `what` the sum is called; `lent` is
    the reward stage's model where it is loaded already; `key` names the sections. Raises UserError, naming the judge,
    where one can't be had.
    """
    parts, told = [], []
    for section in sections:
        judge, how = _judge(section, recipe, run, tokenizer, context, device, lent, key)
        parts.append(Part(section.title, section.weight, judge))
        told.append(f"{section.weight:g} x {section.title} ({how})")
    log(f"{what} = {' + '.join(told)}")
    return WeightedSum(parts)


def _judge(
    section: JudgeSection,
    recipe: Recipe,
    run: RunDir | None,
    tokenizer: PreTrainedTokenizerBase | None,
    context: int,
    device: torch.device,
    lent: PreTrainedModel | None,
    key: str,
) -> tuple[Judge, str]:
    """One judge, and in words how it reads a conversation."""
    if section.python:
        function = load_function(key, section.python, Path(recipe.data.root))
        return FunctionJudge(section.python, function), "a Python function"
    assert section.model is not None
    ours, who = section.model == "reward", f"{key} {section.title}"
    if ours and run is None:
        raise UserError(f"{key}: `reward` is the judge of a run; name a directory")
    start = reward_start(recipe, run) if ours and run else named_model(recipe, section.model)
    if ours and lent is not None:
        model = lent
    else:
        stored = device.type == "cuda" and not ours
        dtype = "auto" if stored else torch.float32
        model = load_classifier(start.name, dtype, remote_code=start.remote_code, attention=start.attention)
        model.requires_grad_(False).eval().to(device)
    heads = score_heads(model.config)
    many = f", {heads} heads" if heads > 1 else ""
    if ours and not section.chat_template and not _misfit(start, model, tokenizer, context):
        label_index(who, model, section.label)  # refuses a label
        return RewardModelJudge(model, section.uncertainty_penalty), f"a model that reads the policy's own tokens{many}"
    own = start.tokenizer()
    if section.chat_template:
        own.chat_template = _template(key, section.chat_template, Path(recipe.data.root))
    check_vocabulary(model, own, start.name)
    judge = ClassifierJudge(who, model, own, label=section.label, uncertainty_penalty=section.uncertainty_penalty)
    way = "through its own chat template" if own.chat_template else "as a pair of prompt and response"
    return judge, f"a model that reads text {way}{many}"


def reward_start(recipe: Recipe, run: RunDir) -> Start:
    """The reward stage's model. Code that it brings is run where the recipe allows that of what it was made of."""
    assert recipe.reward is not None
    origin = recipe.reward.from_ or recipe.reward.start
    code = runs_code(recipe, origin) if origin else starting_model(recipe, run, "ppo").remote_code
    return named_model(recipe, str(run.stage("reward").model))._replace(remote_code=code)


def _misfit(start: Start, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, context: int) -> str:
    """Why a model can't read the policy's own tokens; nothing where it can."""
    if tokenizer is None:
        return "is to read text"
    own = start.tokenizer()
    if own.get_vocab() != tokenizer.get_vocab():
        return "has another tokenizer than the policy"
    if own.chat_template != tokenizer.chat_template:
        return "has another chat template than the policy"
    if context_of(model) < context:
        return f"reads {context_of(model)} tokens at most, the policy {context}"
    return ""


def _template(key: str, file: str, root: Path) -> str:
    try:
        return (root / file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}.chat_template: {root / file} can't be read: {error}") from None


def build_critic(
    recipe: Recipe, run: RunDir, policy: Start, tokenizer: PreTrainedTokenizerBase, context: int
) -> Critic:
    """The critic, on the CPU: from the reward model where the recipe asks for it, or doesn't say and it fits.

    Unasked it isn't taken where the score is another judge's alone: its values would be in another unit.
    Raises RecipeError where the recipe asks for it and it doesn't fit.
    """
    assert recipe.ppo is not None
    wanted = recipe.ppo.critic_from
    judged = any(section.model == "reward" and section.weight > 0 for section in recipe.ppo.judge)
    if wanted is None and not judged:
        log("ppo: the critic starts from the policy, since the reward stage's model is no part of the score")
    if wanted == "policy" or (wanted is None and not judged):
        return critic_from_policy(policy.causal_lm())
    start = reward_start(recipe, run)
    scorer = load_scorer(start.name, remote_code=start.remote_code, attention=start.attention)
    misfit = _misfit(start, scorer, tokenizer, context)
    if not misfit and not isinstance(getattr(scorer, "score", None), nn.Linear):
        misfit = f"is a {type(scorer).__name__}, which has no score for every token"
    if not misfit:
        return critic_from_scorer(scorer, fmean(score_means(scorer)))
    if wanted == "reward":
        raise RecipeError(
            f"ppo.critic_from: the reward model in {start.name} {misfit}; critic_from: policy is possible"
        )
    log(f"ppo: the critic starts from the policy, since the reward model {misfit}")
    return critic_from_policy(policy.causal_lm())
