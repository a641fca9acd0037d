"""The plan of the stage reward."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.footprint import Footprint
from rlhf.functional.bradley_terry import preference_loss
from rlhf.model import checkpoint_layers, count_parameters
from rlhf.recipe import CollectSection, RewardSection, Source, microbatches
from rlhf.rollout import Drawing
from rlhf.tokenizer import encode_prompt
from stages.common import check_chats, fitting, open_data, report_faults
from stages.lora import add_adapters
from stages.plan import passes
from stages.plan.base import (
    ADAM,
    ROWS_READ,
    Beginning,
    Context,
    StagePlan,
    counting,
    first_rows,
    memory_of,
    read_first,
    read_if_there,
)
from stages.plan.machine import Work
from stages.reward.normalise import reference_way
from stages.reward.reading import Judge, Pair, Reading, check_some, prepared
from stages.reward.train import VALIDATION_PAIRS, pair_order

SHOWN = 1500  # characters of the first comparison


class Shape(NamedTuple):
    """A microbatch: a response that is in several of its pairs is read once."""

    sequences: int
    tokens: int  # of each, padding included
    pairs: int


class Lengths(NamedTuple):
    """What is known of the comparisons."""

    pairs: int
    exactly: bool  # whether there are so many, and not about so many
    first: Shape  # the microbatch with most tokens in the first step, when the optimiser has no state yet
    largest: Shape  # and in all others
    mean: float  # tokens of a conversation
    tokens: float  # that training reads
    longest: int  # of all
    prompts: list[int]  # tokens of those that the reference answers


def plan(context: Context) -> StagePlan:
    """What the reward stage will do and need."""
    recipe, machine = context.recipe, context.machine
    settings = recipe.reward
    assert settings is not None
    found = StagePlan("reward")
    reference = context.beginning("reward")
    if reference.tokenizer is not None:
        check_chats(reference.name, reference.tokenizer)
    taken = settings.from_ or settings.start
    beginning = context.named(taken) if taken else reference
    way = Drawing(**reference_way(recipe).model_dump())
    size = steps = 1
    if not settings.from_:
        size, steps = microbatches(recipe, "reward", machine.processes)
    with passes.on(machine) as footprint:
        with footprint.role("weights"):
            model = passes.scorer(beginning.config, context.machine, settings.heads)
            plain = count_parameters(model)
            if settings.lora and settings.lora.quantised and not settings.from_:
                passes.in_four_bits(model)
        lengths = _lengths(context, settings, beginning, model, size, found)
        drawn = settings.normalisation_prompts
        if settings.collect:
            drawn = (
                settings.collect.train_prompts + settings.collect.test_prompts
            ) * settings.collect.responses_per_prompt
        found.parameters = plain
        adapted: nn.Module = model
        if settings.lora and not settings.from_:
            adapted = add_adapters(model, settings.lora, "reward.lora", kind="classifier")
        if not settings.from_:
            found.trained = sum(parameter.numel() for parameter in passes.trained(adapted))
        with counting(found):
            for answering in _answering(context, settings, reference):
                with footprint.role("the reference's weights"):
                    answers = passes.causal_lm(answering.config, context.machine)
                key, room = "reward.sampling", answering.context
                asked = fitting(lengths.prompts, lambda tokens: tokens, room, way.max_tokens, key)
                passes.draw(footprint, answers, (asked * drawn)[:drawn], way)
                del answers
            if not settings.from_:
                _train(context, settings, model, adapted, lengths, steps > 1, footprint)
            passes.score(footprint, model, lengths.longest, rows=drawn)
            spares = not settings.from_ and (settings.gradient_checkpointing or settings.lora is not None)
            found.memory = memory_of(footprint, machine, model, found.trained, spares=spares)
    found.tokens = lengths.tokens * (not settings.from_)
    backward = 6.0 if settings.lora is None else 4.0
    per_step = 4.0 * count_parameters(model)
    rounds = -(-drawn // (256 * machine.processes)) * way.max_tokens
    found.work = Work(backward * plain * found.tokens) + Work(
        2.0 * plain * drawn * way.max_tokens, rounds, per_step, model.config.get_text_config().num_hidden_layers
    )
    if settings.from_:
        found.lines = [f"the judge in {settings.from_} is taken as it is"]
    else:
        wanted = max(1, round(settings.epochs * lengths.pairs))
        about = "" if lengths.exactly else "about "
        most = " at most, each response read once with all that it is compared with" if settings.collect else ""
        found.lines = [
            f"{about}{lengths.pairs:,} comparisons{most}, {settings.epochs:g} epochs = "
            f"{-(-wanted // settings.pairs_per_step):,} steps of {settings.pairs_per_step} pairs ({machine.processes} "
            f"processes x {steps} microbatches x {size}), {lengths.mean:,.0f} tokens a conversation on the average; "
            f"the largest microbatch is {lengths.largest.sequences} conversations of {lengths.largest.tokens:,} tokens"
        ]
    found.lines.append(f"{drawn:,} responses of the reference are drawn, of {way.max_tokens:,} tokens at most")
    found.disk = (recipe.checkpoints.keep + 1) * (4 * plain + 4 * ADAM * found.trained) + 4 * plain
    return found


def _answering(context: Context, settings: RewardSection, reference: Beginning) -> list[Beginning]:
    """The models whose responses are drawn, one after the other."""
    names = [sampler.model for sampler in settings.collect.samplers] if settings.collect else []
    return [reference, *(context.named(name) for name in dict.fromkeys(names) if name != "sft")]


def _lengths(
    context: Context,
    settings: RewardSection,
    beginning: Beginning,
    model: PreTrainedModel,
    size: int,
    found: StagePlan,
) -> Lengths:
    """From the first rows of the data; from the recipe's limits where they or the tokenizer aren't here."""
    most = min(settings.max_tokens, beginning.context)
    way = reference_way(context.recipe)
    prompt = max(1, most - way.max_tokens)
    whole = Shape(2 * size, most, size)
    every = 2.0 * most * ROWS_READ * settings.epochs
    unknown = Lengths(ROWS_READ, False, whole, whole, most, every, most, [prompt] * settings.normalisation_prompts)
    if settings.collect:
        asked = settings.collect.prompts
        read_if_there(found, asked, "the prompts", lambda: read_first(context, "reward", asked, "prompts", "train"))
        return _collected(settings.collect, unknown, settings.epochs, size)
    if beginning.tokenizer is None:
        found.unchecked.append("the comparisons: the tokenizer isn't here yet; all are taken to be max_tokens long")
        return unknown
    prepared(settings, beginning.name, beginning.tokenizer)
    reading = Reading(Judge(model, beginning.tokenizer, True, True, []), settings)
    read = read_if_there(
        found,
        (*settings.train, *settings.test),
        "the comparisons, which are taken to be max_tokens long",
        lambda: [_pairs(context, reading, getattr(settings, split), split) for split in ("train", "test")],
    )
    if read is None:
        return unknown
    (train, share), (test, _) = read
    pairs = train or test
    if not pairs:
        return unknown._replace(pairs=0)
    pair = pairs[0]
    better = beginning.tokenizer.decode(pair.chosen)[:SHOWN]
    worse = beginning.tokenizer.decode(pair.rejected[pair.prompt_tokens :])[:SHOWN]
    found.shown = f"{better}\n[rather than] {worse}"
    lengths = [len(ids) for pair in pairs for ids in (pair.chosen, pair.rejected)]
    prompts = [
        len(encode_prompt(beginning.tokenizer, pair.comparison.prompt))
        for pair in pairs[: settings.normalisation_prompts]
    ]
    first = largest = whole
    exactly = share == 1.0
    mean = sum(lengths) / len(lengths)
    there = round(len(train) / (share or 1.0))
    tokens = 2 * mean * there * settings.epochs
    if train and exactly:
        wanted = -(-max(1, round(settings.epochs * len(train))) // settings.pairs_per_step)
        order = pair_order(train, settings.pairs_per_step, wanted, context.recipe.seed)
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        shapes = [_shape([train[place] for place in batch]) for batch in batches]
        tokens = sum(_distinct([train[place] for place in batch]) for batch in batches)
        each = settings.pairs_per_step // size
        first, largest = (largest_of(some) for some in (shapes[:each], shapes[each:] or shapes))
    if share is None:
        found.unchecked.append(f"how many comparisons there are: {len(train):,} were read, and are taken to be all")
    return Lengths(there, exactly, first, largest, mean, tokens, max(lengths), prompts)


def _collected(collect: CollectSection, unknown: Lengths, epochs: float, size: int) -> Lengths:
    """Of every two responses to a prompt, at most; all pairs of a prompt are read together, each response once."""
    each = collect.responses_per_prompt
    of_prompt = each * (each - 1) // 2
    at_once = each * (1 + -(-size // of_prompt))  # a microbatch may begin and end within a prompt's pairs
    shape = unknown.first._replace(sequences=min(unknown.first.sequences, at_once))
    tokens, pairs = collect.train_prompts * each * unknown.mean * epochs, collect.train_prompts * of_prompt
    return unknown._replace(pairs=pairs, exactly=True, first=shape, largest=shape, tokens=tokens)


def _pairs(
    context: Context, reading: Reading, sources: Sequence[Source], split: str
) -> tuple[list[Pair], float | None]:
    """The first that the judge can read, and about which share of all they are; None: it isn't known.

    Raises DataError, as the stage does, where there is none.
    """
    if not sources:
        return [], 1.0
    opened = open_data(context.recipe, "reward", first_rows(sources), "comparisons", "train", reading.pair)
    pairs = [pair for pair in opened if pair is not None]
    report_faults(opened)
    check_some(pairs, split, reading)
    return pairs, opened.share_read([source.rows for source in sources])


def largest_of(shapes: list[Shape]) -> Shape:
    """The one with most tokens."""
    return max(shapes, key=lambda shape: shape.sequences * shape.tokens)


def _distinct(pairs: Sequence[Pair]) -> int:
    """Tokens of the conversations in these pairs, each counted once."""
    return sum(map(len, {ids.tobytes(): ids for pair in pairs for ids in (pair.chosen, pair.rejected)}.values()))


def _shape(pairs: Sequence[Pair]) -> Shape:
    rows = {ids.tobytes(): len(ids) for pair in pairs for ids in (pair.chosen, pair.rejected)}
    return Shape(len(rows), max(rows.values()), len(pairs))


def _train(
    context: Context,
    settings: RewardSection,
    model: PreTrainedModel,
    adapted: nn.Module,
    lengths: Lengths,
    several: bool,
    footprint: Footprint,
) -> None:
    """Validates, trains and validates, as the stage does."""
    validated = 2 * min(VALIDATION_PAIRS, max(1, lengths.pairs))

    def loss(shape: Shape) -> Tensor:
        with passes.computing(context.machine):
            read = passes.ids(shape.sequences, shape.tokens)
            logits = adapted(input_ids=read, attention_mask=passes.ids(shape.sequences, shape.tokens)).logits
        both = logits[torch.zeros(2, shape.pairs, dtype=torch.long)].float()
        ones = torch.ones(shape.pairs)
        return preference_loss(both[0], both[1], ones, ones.unsqueeze(1), settings.label_smoothing, settings.centering)

    if settings.gradient_checkpointing:
        checkpoint_layers(model, "reward.gradient_checkpointing")
    model.config.use_cache = False
    passes.score(footprint, model, lengths.longest, rows=validated)
    adapted.train()
    footprint.name_gradients(adapted.parameters())
    optimizer = passes.adam(passes.trained(adapted))
    passes.learn(footprint, "the first training step", [optimizer], partial(loss, lengths.first), several=several)
    if settings.epochs * lengths.pairs > settings.pairs_per_step:
        passes.learn(footprint, "a training step", [optimizer], partial(loss, lengths.largest), several=several)
    adapted.eval()
