"""The plan of the stage reward."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.footprint import Footprint
from rlhf.functional.bradley_terry import preference_loss
from rlhf.model import count_parameters
from rlhf.recipe import CollectSection, RewardSection, Source, microbatches
from rlhf.rollout import Drawing
from rlhf.tokenizer import encode_prompt, prepare_for_chat
from stages.common import check_chats, fitting, open_data
from stages.lora import add_adapters
from stages.plan import passes
from stages.plan.base import ADAM, ROWS_READ, Beginning, Context, StagePlan, first_rows, memory_of, read_if_there
from stages.plan.machine import Work
from stages.reward.normalise import reference_way
from stages.reward.reading import Judge, Pair, Reading
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
        with footprint.role("the reference's weights"):
            answering = passes.causal_lm(reference.config, context.machine)
        fit = fitting(lengths.prompts, lambda tokens: tokens, reference.context, way.max_tokens, "reward.sampling")
        passes.draw(footprint, answering, (fit * drawn)[:drawn], way)
        del answering
        found.parameters = plain
        if not settings.from_:
            learning = _train(context, settings, model, lengths, steps > 1, footprint)
            found.trained = sum(parameter.numel() for parameter in learning)
        passes.score(footprint, model, lengths.longest, rows=drawn)
    found.memory = memory_of(footprint, machine, model, found.trained)
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
        more = " or more (work and time are of so many)" if lengths.pairs >= ROWS_READ else ""
        if settings.collect:
            more = " at most, each response read once with all that it is compared with"
        found.lines = [
            f"{lengths.pairs:,} comparisons{more}, {settings.epochs:g} epochs = "
            f"{-(-wanted // settings.pairs_per_step):,} steps of {settings.pairs_per_step} pairs ({machine.processes} "
            f"processes x {steps} microbatches x {size}), {lengths.mean:,.0f} tokens a conversation on the average; "
            f"the largest microbatch is {lengths.largest.sequences} conversations of {lengths.largest.tokens:,} tokens"
        ]
    found.lines.append(f"{drawn:,} responses of the reference are drawn, of {way.max_tokens:,} tokens at most")
    found.disk = (recipe.checkpoints.keep + 1) * (4 * plain + 4 * ADAM * found.trained) + 4 * plain
    return found


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
    unknown = Lengths(ROWS_READ, whole, whole, most, every, most, [prompt] * settings.normalisation_prompts)
    if settings.collect:
        return _collected(settings.collect, unknown, settings.epochs, size)
    if beginning.tokenizer is None:
        found.unchecked.append("the comparisons: the tokenizer isn't here yet; all are taken to be max_tokens long")
        return unknown
    if not settings.from_:
        prepare_for_chat(beginning.tokenizer, "rlhf")
    reading = Reading(Judge(model, beginning.tokenizer, True, True, []), settings)
    read = read_if_there(
        found,
        (*settings.train, *settings.test),
        "the comparisons, which are taken to be max_tokens long",
        lambda: [_pairs(context, reading, sources) for sources in (settings.train, settings.test)],
    )
    if read is None:
        return unknown
    train, test = read
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
    mean = sum(lengths) / len(lengths)
    tokens = 2 * mean * len(train) * settings.epochs
    if train and len(train) < ROWS_READ:
        wanted = -(-max(1, round(settings.epochs * len(train))) // settings.pairs_per_step)
        order = pair_order(train, settings.pairs_per_step, wanted, context.recipe.seed)
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        shapes = [_shape([train[place] for place in batch]) for batch in batches]
        tokens = sum(_distinct([train[place] for place in batch]) for batch in batches)
        each = settings.pairs_per_step // size
        first, largest = (largest_of(some) for some in (shapes[:each], shapes[each:] or shapes))
    return Lengths(len(train), first, largest, mean, tokens, max(lengths), prompts)


def _collected(collect: CollectSection, unknown: Lengths, epochs: float, size: int) -> Lengths:
    """Of every two responses to a prompt, at most; all pairs of a prompt are read together, each response once."""
    each = collect.responses_per_prompt
    of_prompt = each * (each - 1) // 2
    at_once = each * (1 + -(-size // of_prompt))  # a microbatch may begin and end within a prompt's pairs
    shape = unknown.first._replace(sequences=min(unknown.first.sequences, at_once))
    tokens = collect.train_prompts * each * unknown.mean * epochs
    return unknown._replace(pairs=collect.train_prompts * of_prompt, first=shape, largest=shape, tokens=tokens)


def _pairs(context: Context, reading: Reading, sources: Sequence[Source]) -> list[Pair]:
    if not sources:
        return []
    read = open_data(context.recipe, "reward", first_rows(sources), "comparisons", "train", then=reading.pair)
    return [pair for pair in read if pair is not None]


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
    lengths: Lengths,
    several: bool,
    footprint: Footprint,
) -> list[nn.Parameter]:
    """Validates, trains and validates, as the stage does; what learns."""
    adapted: nn.Module = model
    if settings.lora:
        adapted = add_adapters(model, settings.lora, "reward.lora", kind="classifier")
    learning = passes.trained(adapted)
    validated = 2 * min(VALIDATION_PAIRS, max(1, lengths.pairs))

    def loss(shape: Shape) -> Tensor:
        with passes.computing(context.machine):
            read = passes.ids(shape.sequences, shape.tokens)
            logits = adapted(input_ids=read, attention_mask=passes.ids(shape.sequences, shape.tokens)).logits
        both = logits[torch.zeros(2, shape.pairs, dtype=torch.long)].float()
        ones = torch.ones(shape.pairs)
        return preference_loss(both[0], both[1], ones, ones.unsqueeze(1), settings.label_smoothing, settings.centering)

    model.config.use_cache = False
    passes.score(footprint, model, lengths.longest, rows=validated)
    footprint.name_gradients(adapted.parameters())
    optimizer = passes.adam(learning)
    passes.learn(footprint, "the first training step", optimizer, partial(loss, lengths.first), several=several)
    if settings.epochs * lengths.pairs > settings.pairs_per_step:
        passes.learn(footprint, "a training step", optimizer, partial(loss, lengths.largest), several=several)
    return learning
