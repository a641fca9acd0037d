"""The plan of the stage ppo."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from rlhf.footprint import Footprint
from rlhf.likelihood import TokenReader, head_stands_apart
from rlhf.model import Critic, checkpoint_layers, count_parameters
from rlhf.recipe import PpoSection
from rlhf.rollout import Drawing
from rlhf.tinyworld.words import Split
from rlhf.tokenizer import encode_prompt
from stages.common import check_chats, check_context, fitting
from stages.lora import SameAdapter, add_adapter, target_names, using_adapter
from stages.plan import passes
from stages.plan.base import ADAM, Beginning, Context, StagePlan, counting, memory_of, read_first, read_if_there
from stages.plan.machine import Work
from stages.ppo.doctor import Doctor
from stages.ppo.episodes import microbatches_of
from stages.ppo.layouts import check_layout
from stages.ppo.roles import CRITIC, POLICY, REWARD
from stages.ppo.rollout import Budget

POLICYS, CRITICS = ("policy: gradients", "policy: optimiser"), ("critic: gradients", "critic: optimiser")
SHOWN = 1500  # characters of the first prompt
PROMPTS_READ = 1000  # of each list


class Models(NamedTuple):
    """What PPO holds, and how its parts are read."""

    policy: PreTrainedModel
    reference: PreTrainedModel
    judges: list[PreTrainedModel]  # those that are no adapters on the policy's base, and no Python
    values: Callable[[Tensor, Tensor], Tensor]  # the critic's, of ids and of the policy's states of them
    critic: nn.Module  # what of it is not the policy's
    policy_parameters: list[nn.Parameter]
    critic_parameters: list[nn.Parameter]
    parameters: int  # of the policy, without adapters


def plan(context: Context) -> StagePlan:
    """What PPO will do and need."""
    recipe, machine = context.recipe, context.machine
    settings = recipe.ppo
    assert settings is not None
    found = StagePlan("ppo")
    beginning = context.beginning("ppo")
    if beginning.tokenizer is not None:
        check_chats(beginning.name, beginning.tokenizer, apart=True)
    drawing = Drawing(**settings.sampling.model_dump())
    check_layout(settings)
    Doctor(settings.doctor.off)
    prompts = _prompts(context, settings, beginning, found)
    _read_texts(context, settings, beginning, found)
    with passes.on(machine) as footprint:
        models = _models(context, settings, beginning, footprint)
        budget = Budget.of(settings, models.policy)
        mine = -(-settings.episodes_per_update // machine.processes)
        found.parameters = models.parameters
        found.trained = sum(p.numel() for p in (*models.policy_parameters, *models.critic_parameters))
        layers = models.policy.config.get_text_config().num_hidden_layers
        with counting(found):
            _go_through(context, settings, models, budget, prompts, drawing, footprint)
            spares = settings.gradient_checkpointing or settings.layout == "adapters"
            found.memory = memory_of(footprint, machine, models.policy, found.trained, spares=spares)
    mean = sum(prompts) / len(prompts) + settings.sampling.max_tokens
    episodes = settings.updates * settings.episodes_per_update
    found.tokens = episodes * mean
    plain, each = found.parameters, 4.0 if settings.layout == "adapters" else 6.0
    learned = settings.epochs * each * (1 if settings.layout == "shared" else 2)
    observed = 2.0 * 4  # the policy draws; reference, critic and judge read
    rounds = settings.updates * -(-mine // settings.rollout_batch_size) * settings.sampling.max_tokens
    found.work = Work((learned + observed) * plain * found.tokens) + Work(0.0, rounds, 4.0 * plain, layers)
    found.lines = [
        f"layout {settings.layout}; {settings.updates:,} updates of {settings.episodes_per_update} episodes, "
        f"{settings.epochs} epochs x {settings.minibatches} minibatches of "
        f"{settings.episodes_per_update // settings.minibatches}, over {machine.processes} processes in microbatches "
        f"of at most {budget.tokens:,} tokens; prompts of {min(prompts)} to {max(prompts)} tokens, responses of "
        f"{settings.sampling.max_tokens} at most, and all are taken to be so long"
    ]
    kept = recipe.checkpoints.keep + 1
    policy = sum(p.numel() for p in models.policy_parameters)
    found.disk = kept * 4 * (1 + ADAM) * found.trained + kept * 4 * policy + 4 * plain
    return found


def _prompts(context: Context, settings: PpoSection, beginning: Beginning, found: StagePlan) -> list[int]:
    """The lengths of the prompts; of the longest there may be where they aren't known."""
    room = min(beginning.context, 2048) - settings.sampling.max_tokens
    if beginning.tokenizer is None:
        found.unchecked.append(f"the prompts: the tokenizer isn't here yet; all are taken to have {room} tokens")
        return [max(1, room)]
    tokenizer = beginning.tokenizer
    keys = [key for key in ("prompts", "test_prompts", "validation_prompts") if getattr(settings, key)]

    def read() -> list[list[int]]:
        asked = []
        for key in keys:
            split: Split = "test" if "test" in key else "train"
            opened = read_first(context, "ppo", getattr(settings, key), "prompts", split, rows=PROMPTS_READ)
            encoded = [encode_prompt(tokenizer, messages) for messages in opened]
            asked += fitting(encoded, len, beginning.context, settings.sampling.max_tokens, f"ppo.{key}")
        return asked

    every = [source for key in keys for source in getattr(settings, key)]
    asked = read_if_there(found, every, f"the prompts, which are taken to have {room} tokens", read)
    found.shown = tokenizer.decode(asked[0])[:SHOWN] if asked else ""
    return list(map(len, asked)) if asked else [max(1, room)]


def _read_texts(context: Context, settings: PpoSection, beginning: Beginning, found: StagePlan) -> None:
    """Looks at the first of the texts that are mixed in."""
    if settings.ptx is None:
        return
    check_context(beginning.context, "ppo.ptx.sequence_length", settings.ptx.sequence_length)
    texts = settings.ptx.train
    read_if_there(found, texts, "the texts", lambda: read_first(context, "ppo", texts, "texts", "train"))


def _models(context: Context, settings: PpoSection, beginning: Beginning, footprint: Footprint) -> Models:
    """The roles in the recipe's layout, with their names."""
    with footprint.role("policy: weights"):
        policy = passes.causal_lm(beginning.config, context.machine)
    if settings.layout == "adapters":
        return _adapters(context, settings, policy, beginning, footprint)
    with footprint.role("reference: weights"):
        reference = passes.causal_lm(beginning.config, context.machine).requires_grad_(False)
    judges = _judges(context, settings, beginning, footprint)
    critic: nn.Module
    with footprint.role("critic: weights"):
        if settings.layout == "full":
            config = _critic_config(context, settings, beginning)
            body = passes.causal_lm(config, context.machine).base_model
            critic = Critic(body, nn.Linear(config.get_text_config().hidden_size, 1, bias=False), 0.0)
        else:
            critic = nn.Linear(beginning.config.get_text_config().hidden_size, 1)
    shared, states_are_logits = settings.layout == "shared", not head_stands_apart(policy)

    def values(ids: Tensor, states: Tensor) -> Tensor:
        if shared and states_are_logits:
            states = policy.base_model(input_ids=ids, use_cache=False).last_hidden_state
        found: Tensor = critic(states if shared else ids)
        return found

    if settings.gradient_checkpointing:
        for model in (policy, critic.backbone) if isinstance(critic, Critic) else (policy,):
            checkpoint_layers(model, "ppo.gradient_checkpointing")
    learning = passes.trained(policy), passes.trained(critic)
    return Models(policy, reference, judges, values, critic, *learning, count_parameters(policy))


def _adapters(
    context: Context, settings: PpoSection, base: PreTrainedModel, beginning: Beginning, footprint: Footprint
) -> Models:
    plain = count_parameters(base)
    base.requires_grad_(False)
    if settings.lora.quantised:
        with footprint.role("policy: weights"):
            passes.in_four_bits(base)
    targets = target_names(base, settings.lora.targets, "ppo.lora")
    config = LoraConfig(r=settings.lora.rank, lora_alpha=settings.lora.alpha, target_modules=targets)
    reward = context.recipe.reward
    lent = reward is not None and reward.lora is not None and not reward.from_ and not reward.start
    with footprint.role("adapters: weights"):
        for name in (POLICY, CRITIC, *((REWARD,) if lent else ())):
            add_adapter(base, config, name)
        head = nn.Linear(base.config.get_text_config().hidden_size, 1)
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(f".{POLICY}." in name or f".{CRITIC}." in name)
    judges = [] if lent else _judges(context, settings, beginning, footprint)
    if settings.gradient_checkpointing:
        checkpoint_layers(base, "ppo.gradient_checkpointing", SameAdapter(base))

    def values(ids: Tensor, states: Tensor) -> Tensor:
        with using_adapter(base, CRITIC):
            found: Tensor = head(base.base_model(input_ids=ids, use_cache=False).last_hidden_state)
        return found

    named = dict(base.named_parameters())
    learns = {who: [p for name, p in named.items() if f".{who}." in name] for who in (POLICY, CRITIC)}
    return Models(base, base, judges, values, head, learns[POLICY], [*learns[CRITIC], *head.parameters()], plain)


def _critic_config(context: Context, settings: PpoSection, beginning: Beginning) -> PreTrainedConfig:
    """Of the model that the critic starts from: of a judge from outside where that reads the policy's own tokens."""
    reward = context.recipe.reward
    judged = any(section.model == "reward" and section.weight > 0 for section in settings.judge)
    wanted = settings.critic_from or ("reward" if judged else "policy")
    name = (reward.from_ or reward.start) if reward and wanted == "reward" else None
    if name is None or beginning.tokenizer is None:
        return beginning.config
    judge = context.named(name)
    same = judge.tokenizer is not None and (
        (judge.tokenizer.get_vocab(), judge.tokenizer.chat_template)
        == (beginning.tokenizer.get_vocab(), beginning.tokenizer.chat_template)
    )
    return judge.config if same and judge.context >= beginning.context else beginning.config


def _judges(
    context: Context, settings: PpoSection, beginning: Beginning, footprint: Footprint
) -> list[PreTrainedModel]:
    """The models of the judges; that of the reward stage as it will be."""
    found: list[PreTrainedModel] = []
    for judge in context.judges((*settings.judge, *settings.second_judge), beginning):
        with footprint.role(f"judge {judge.title}: weights"):
            found.append(passes.scorer(judge.config, context.machine, judge.heads).requires_grad_(False))
    return found


def _go_through(
    context: Context,
    settings: PpoSection,
    models: Models,
    budget: Budget,
    prompts: list[int],
    drawing: Drawing,
    footprint: Footprint,
) -> None:
    """Draws, observes and learns, as an update does."""
    machine, new = context.machine, settings.sampling.max_tokens
    mine = -(-settings.episodes_per_update // machine.processes)
    lengths = sorted(prompts)
    asked = [*(lengths[place * len(lengths) // mine] for place in range(1, mine)), lengths[-1]]
    longest = asked[-1] + new
    minibatches = [asked[start :: settings.minibatches] for start in range(settings.minibatches)]
    parts = [_shapes([tokens + new for tokens in each], budget) for each in minibatches if each]
    largest = max((shape for each in parts for shape in each), key=lambda shape: shape[0] * shape[1])
    several = any(len(each) > 1 for each in parts)
    reader, reference = TokenReader(models.policy), TokenReader(models.reference)

    def states_of(model: PreTrainedModel, its: TokenReader, adapter: str | None, ids: Tensor) -> Tensor:
        if settings.layout != "adapters":
            return its.states(ids)
        with using_adapter(model, adapter):
            return its.states(ids)

    def likelihoods(its: TokenReader, states: Tensor) -> Tensor:
        before = states[:, torch.zeros(new, dtype=torch.long)].flatten(0, 1)
        return its.read(before, torch.zeros(len(before), dtype=torch.long), settings.sampling.temperature).logprobs

    def policy_loss(rows: int, length: int) -> Tensor:
        with passes.computing(machine):
            ids = passes.ids(rows, length)
            states = states_of(models.policy, reader, POLICY, ids)
            loss = likelihoods(reader, states).sum()
            return loss + models.values(ids, states).sum() if settings.layout == "shared" else loss

    def value_loss(rows: int, length: int) -> Tensor:
        with passes.computing(machine):
            ids = passes.ids(rows, length)
            return models.values(ids, ids).float().sum()

    def texts_loss(texts: int, length: int) -> Tensor:
        with passes.computing(machine):
            states = states_of(models.policy, reader, POLICY, passes.ids(texts, length)).flatten(0, 1)
            return reader.read(states, torch.zeros(len(states), dtype=torch.long)).logprobs.sum()

    policy_moves = passes.adam(models.policy_parameters)
    critic_moves = passes.adam(models.critic_parameters)
    footprint.name_gradients(models.policy_parameters, POLICYS[0])
    footprint.name_gradients(models.critic_parameters, CRITICS[0])
    if settings.updates * settings.epochs * settings.minibatches > 1:
        passes.have_state(footprint, [policy_moves], *POLICYS)
        passes.have_state(footprint, [critic_moves], *CRITICS)
    with passes.computing(machine):
        passes.draw(footprint, models.policy, asked, drawing, settings.rollout_batch_size, settings.engine)
        for judge in models.judges:
            passes.score(footprint, judge, longest, mine)
        with footprint.phase("reference and critic"), torch.inference_mode():
            ids = passes.ids(*largest)
            states = states_of(models.reference, reference, None, ids)
            likelihoods(reference, states)
            models.values(ids, states)
    models.policy.train()
    models.critic.train()
    if settings.ptx:
        length = settings.ptx.sequence_length
        share = -(-settings.ptx.tokens_per_minibatch // length // machine.processes)
        texts = min(share, max(1, budget.tokens // (length + 1)))
        roles = dict(zip(("gradients", "optimiser"), POLICYS, strict=True))
        learned = partial(texts_loss, texts, length)
        passes.learn(footprint, "the policy's step on texts", [policy_moves], learned, several=share > texts, **roles)
    for phase, optimizer, loss, (gradients, optimiser) in (
        ("the policy's step", policy_moves, policy_loss, POLICYS),
        ("the critic's step", critic_moves, value_loss, CRITICS),
    ):
        if phase.startswith("the policy") or settings.layout != "shared":
            roles = {"gradients": gradients, "optimiser": optimiser}
            passes.learn(footprint, phase, [optimizer], partial(loss, *largest), several=several, **roles)


def _shapes(lengths: list[int], budget: Budget) -> list[tuple[int, int]]:
    """Rows and tokens of the microbatches of a minibatch on one process."""
    parts = microbatches_of(lengths, budget.tokens, budget.episodes, 1)
    return [(len(part), max(lengths[place] for place in part)) for part in parts]
