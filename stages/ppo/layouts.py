"""Loading the roles in the layout that the recipe asks for."""

import functools
from collections.abc import Callable
from statistics import fmean
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.errors import RecipeError, UserError
from rlhf.judge import Judge, judge_models, score_means
from rlhf.model import end_ids
from rlhf.quantisation import quantisation
from rlhf.recipe import PpoSection, Recipe
from rlhf.rundir import RunDir
from rlhf.runtime import derive_seed, log
from stages.common import Start, check_chats, context_of
from stages.judges import build_critic, build_judge
from stages.lora import SCORE_HEAD, add_adapter, target_names, using_adapter
from stages.ppo.roles import (
    CRITIC,
    POLICY,
    REWARD,
    Actors,
    AdapterActors,
    FullActors,
    Reference,
    Roles,
    SharedActors,
)

MIB = 2**20


def build_roles(
    recipe: Recipe, run: RunDir, start: Start, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> Roles:
    """The roles on the device. Raises UserError or RecipeError where the recipe asks for what can't be."""
    settings = recipe.ppo
    assert settings is not None
    check_layout(settings)
    check_chats(start.name, tokenizer, apart=True)
    quantised = quantisation(recipe, "ppo")
    policy = start.causal_lm(quantised)
    if not quantised:
        policy = policy.to(device)
    ends = end_ids(policy, tokenizer)
    context = context_of(policy)
    lent: PreTrainedModel | None = None
    drawn = (settings.sampling.temperature, ends, settings.sampling.min_tokens)
    if settings.layout == "adapters":
        whole = start.causal_lm if quantised else None
        actors, reference, lent = _adapters(recipe, run, policy, drawn, whole)
    else:
        reference = Reference(start.causal_lm().requires_grad_(False).eval().to(device))
        if settings.layout == "full":
            critic = build_critic(recipe, run, start, tokenizer, context).to(device)
            actors = FullActors(policy, critic, *drawn)
        else:
            actors = SharedActors(policy, *drawn)
    if settings.gradient_checkpointing:
        actors.checkpoint_layers("ppo.gradient_checkpointing")
    actors.eval()
    judge = build_judge(recipe, run, tokenizer, context, device, settings.judge, "ppo: score", lent)
    second: Judge | None = None
    if settings.second_judge:
        second = build_judge(recipe, run, tokenizer, context, device, settings.second_judge, "ppo: second judge", lent)
    return Roles(actors, reference, judge, second)


def check_layout(settings: PpoSection) -> None:
    """Raises RecipeError where the critic can't start from what the recipe says in any case."""
    if settings.layout == "shared" and settings.critic_from == "reward":
        raise RecipeError("ppo.critic_from: in layout shared the critic is a value head on the policy's trunk")


def _adapters(
    recipe: Recipe,
    run: RunDir,
    base: PreTrainedModel,
    drawn: tuple[float, list[int], int],
    whole: Callable[[], PreTrainedModel] | None,
) -> tuple[Actors, Reference, PreTrainedModel | None]:
    """Policy and critic as adapters on the base, which is frozen; and a reward model on it, if that is an adapter too.

    The critic's adapter starts as the reward model's where there is one and the recipe doesn't say otherwise. `whole`
    loads the base as it was, where `base` is quantised.
    """
    settings = recipe.ppo
    assert settings is not None
    lora = settings.lora
    targets = target_names(base, lora.targets, "ppo.lora")
    own = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=targets)
    torch.manual_seed(derive_seed(recipe.seed, "ppo", "adapters"))
    add_adapter(base, own, POLICY)
    scorer = _reward_adapter(recipe, run, base)
    judged = any(section.model == "reward" and section.weight > 0 for section in settings.judge)
    follows = scorer is not None and (settings.critic_from == "reward" or (settings.critic_from is None and judged))
    if settings.critic_from == "reward" and scorer is None:
        raise RecipeError("ppo.critic_from: in layout adapters that needs a reward model trained with `lora` on sft's")
    add_adapter(base, scorer.config_of_adapter if scorer and follows else own, CRITIC)
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(f".{POLICY}." in name or f".{CRITIC}." in name)
    actors = AdapterActors(base, *drawn, whole=whole)
    if scorer and follows:
        _begin_as(actors, scorer)
    log(f"ppo: the critic is an adapter that starts {'as the reward model' if follows else 'from nothing'}")
    return actors, Reference(base, without_adapters=True), scorer.model if scorer else None


class LentScorer(NamedTuple):
    """A reward model that is an adapter on the base, as a classifier that shares the base's body."""

    model: PreTrainedModel
    config_of_adapter: LoraConfig


def _reward_adapter(recipe: Recipe, run: RunDir, base: PreTrainedModel) -> LentScorer | None:
    """The reward stage's adapter, put into the base; None where it has none that stands on this base alone."""
    reward = recipe.reward
    folder = run.stage("reward").path / "adapter"
    if reward is None or reward.lora is None or reward.from_ or reward.start or not folder.is_dir():
        log("ppo: the judge is a model of its own: no reward model was trained with `reward.lora` on the policy's base")
        return None
    assert recipe.ppo is not None
    if reward.lora.quantised != recipe.ppo.lora.quantised:
        log("ppo: the reward model was trained beside other weights, since only one of the two bases is in 4 bits")
    saved = LoraConfig.from_pretrained(str(folder))
    if saved.trainable_token_indices:
        log("ppo: the judge is a model of its own: beside its adapters, tokens were trained that the base doesn't know")
        return None
    config = LoraConfig(r=saved.r, lora_alpha=saved.lora_alpha, lora_dropout=0.0, target_modules=saved.target_modules)
    add_adapter(base, config, REWARD)
    weights = load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model."
    head = weights.pop(f"{prefix}{SCORE_HEAD}.weight")
    found = set_peft_model_state_dict(
        base, {name.removeprefix(prefix): weight for name, weight in weights.items()}, adapter_name=REWARD
    )
    if found.unexpected_keys:
        raise UserError(f"{folder}: has adapters of layers that the policy lacks ({found.unexpected_keys[0]}, ...)")
    merged = AutoConfig.from_pretrained(str(run.stage("reward").model))
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(merged)
    setattr(model, model.base_model_prefix, base.base_model)
    model.score = nn.Linear(head.shape[1], head.shape[0], bias=False, device=base.device, dtype=base.dtype)
    with torch.no_grad():
        model.score.weight.copy_(head)
    plain = model.forward

    @functools.wraps(plain)
    def forward(*inputs: Any, **more: Any) -> Any:
        with using_adapter(base, REWARD):
            return plain(*inputs, **more)

    model.forward = forward
    return LentScorer(model.requires_grad_(False).eval(), config)


@torch.no_grad()
def _begin_as(actors: AdapterActors, scorer: LentScorer) -> None:
    """Gives the critic the reward model's adapter and head: its values begin in units of the score."""
    reward = {name: p for name, p in actors.policy.named_parameters() if f".{REWARD}." in name}
    for name, parameter in reward.items():
        actors.policy.get_parameter(name.replace(f".{REWARD}.", f".{CRITIC}.")).copy_(parameter)
    actors.head.begin_as(scorer.model.score.weight.mean(0), -fmean(score_means(scorer.model)))


# Memory


def memory_table(roles: Roles) -> list[str]:
    """A line for each role: parameters, and what weights, gradients and Adam's moments take, in MiB."""
    actors = roles.actors
    models: dict[str, nn.Module] = {"policy": actors.policy}
    if isinstance(actors, FullActors):
        models["critic"] = actors.critic
    elif isinstance(actors, SharedActors | AdapterActors):
        models["critic's value head"] = actors.head
    models |= {"reference": roles.reference.model} | dict(judge_models(roles.judge))
    if roles.second_judge:
        models |= {f"{name} (second judge)": model for name, model in judge_models(roles.second_judge)}
    seen: set[int] = set()
    lines = []
    for name, model in models.items():
        new = [p for p in model.parameters() if id(p) not in seen]
        seen |= {id(p) for p in new}
        weights = sum(p.numel() * p.element_size() for p in new) / MIB
        learning = sum(p.numel() * p.element_size() for p in new if p.requires_grad) / MIB
        what = f"weights {weights:,.1f}, gradients {learning:,.1f}, optimiser {2 * learning:,.1f} MiB"
        lines.append(f"{name}: {what}" if new else f"{name}: on the policy's weights, 0 MiB")
    return lines
