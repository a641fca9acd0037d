"""The plan of the stage sft."""

import itertools
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from rlhf.footprint import Footprint
from rlhf.model import checkpoint_layers, count_parameters
from rlhf.recipe import SftSection, microbatches
from rlhf.rollout import Drawing
from rlhf.runtime import derive_seed
from rlhf.tokenizer import begin_id, encode_prompt
from stages.common import check_context, fitting, training_order
from stages.lora import add_adapters
from stages.packing import PackingCollator
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
    read_if_there,
)
from stages.plan.machine import Work
from stages.sft import LOGITS, VALIDATED_AT_ONCE, Row, dialogues_of, marked, prepared

BEST = "the best weights so far (early stopping)"


class Shape(NamedTuple):
    """A microbatch."""

    rows: int
    tokens: int  # of a row, padding included
    trained: int  # positions at which some row learns


class Lengths(NamedTuple):
    """What is known of the conversations."""

    first: Shape  # the microbatch with most tokens in the first step, when the optimiser has no state yet
    largest: Shape  # and in all others
    mean: float  # tokens of a conversation
    validation: int  # tokens of the longest one
    validated: int  # how many there are
    prompts: list[int]  # tokens of those that are answered


def plan(context: Context) -> StagePlan:
    """What supervised fine-tuning will do and need."""
    recipe, machine = context.recipe, context.machine
    settings = recipe.sft
    assert settings is not None
    found = StagePlan("sft")
    beginning = context.beginning("sft")
    check_context(beginning.context, "sft.max_tokens", settings.max_tokens)
    size, steps = microbatches(recipe, "sft", machine.processes)
    lengths = _lengths(context, settings, beginning, size, found)
    with passes.on(machine) as footprint:
        with footprint.role("weights"):
            model = passes.causal_lm(beginning.config, context.machine)
            plain = count_parameters(model)
            if settings.lora and settings.lora.quantised:
                passes.in_four_bits(model)
        adapted: nn.Module = add_adapters(model, settings.lora, "sft.lora") if settings.lora else model
        if settings.gradient_checkpointing:
            checkpoint_layers(model, "sft.gradient_checkpointing")
        learning = passes.trained(adapted)
        found.parameters, found.trained = plain, sum(p.numel() for p in learning)
        with counting(found):
            _go_through(context, settings, model, adapted, lengths, steps > 1, footprint)
            spares = settings.gradient_checkpointing or settings.lora is not None
            found.memory = memory_of(footprint, machine, model, found.trained, spares=spares)
    dialogues = settings.steps * settings.dialogues_per_step
    found.tokens = lengths.mean * dialogues
    backward = 6.0 if settings.lora is None else 4.0  # the frozen weights have no gradient of their own
    found.work = Work(backward * plain * found.tokens)
    found.lines = [
        f"{settings.steps:,} steps of {settings.dialogues_per_step} dialogues ({machine.processes} processes x {steps} "
        f"microbatches x {size}{', packed' if settings.packing else ''}), {lengths.mean:,.0f} tokens each on the "
        f"average; the largest microbatch is {lengths.largest.rows} rows of {lengths.largest.tokens:,} tokens"
    ]
    found.disk = (recipe.checkpoints.keep + 1) * (4 * plain + 4 * ADAM * found.trained) + 4 * plain
    return found


def _lengths(context: Context, settings: SftSection, beginning: Beginning, size: int, found: StagePlan) -> Lengths:
    """From the first rows of the data; from the recipe's limits where they or the tokenizer aren't here."""
    most = settings.max_tokens
    prompt = max(1, most - settings.sampling.max_tokens)
    whole = Shape(size, most, most)
    unknown = Lengths(whole, whole, most, most, VALIDATED_AT_ONCE, [prompt] * settings.sampled_prompts)
    recipe, tokenizer = context.recipe, beginning.tokenizer
    if tokenizer is None:
        found.unchecked.append("the conversations: the tokenizer isn't here yet; all are taken to be max_tokens long")
        return unknown
    if "evaluate" in recipe.stages:
        begin_id(tokenizer)
    prepared(recipe, settings, beginning.name, tokenizer)
    beginning.grown()
    some = {"train": first_rows(settings.train), "validation": first_rows(settings.validation)}
    read = read_if_there(
        found,
        (*settings.train, *settings.validation),
        "the conversations, which are taken to be max_tokens long",
        lambda: [dialogues_of(recipe, settings.model_copy(update=some), tokenizer, split) for split in some],
    )
    if read is None:
        return unknown
    train, validation = read
    found.shown = marked(tokenizer, train.chats[0].chat()).plain
    seed = derive_seed(recipe.seed, "sft", "order")
    places = training_order([len(chat.ids) for chat in train.chats], settings.dialogues_per_step, settings.steps, seed)
    batches = [places[start : start + size] for start in range(0, len(places), size)]  # a step is so many whole ones
    shapes = [microbatch_of(settings, [train.chats[place] for place in batch]) for batch in batches]
    each = settings.dialogues_per_step // size
    first, largest = (largest_of(some) for some in (shapes[:each], shapes[each:] or shapes))
    if len(train.chats) >= ROWS_READ:
        largest = unknown.largest
    asked = [len(encode_prompt(tokenizer, prompt)) for prompt in validation.asked]
    room = beginning.context, settings.sampling.max_tokens
    prompts = fitting(asked, lambda tokens: tokens, *room, "sft.sampling")
    return Lengths(
        first,
        largest,
        sum(len(chat.ids) for chat in train.chats) / len(train.chats),
        max(len(chat.ids) for chat in validation.chats),
        len(validation.chats),
        prompts,
    )


def largest_of(shapes: list[Shape]) -> Shape:
    """The one with most tokens."""
    return max(shapes, key=lambda shape: shape.rows * shape.tokens)


def microbatch_of(settings: SftSection, chats: list[Row]) -> Shape:
    """What these conversations are as a microbatch."""
    if settings.packing:
        rows = [{"input_ids": ids, "labels": ids} for ids in (chat.ids.tolist() for chat in chats)]
        packed = PackingCollator(settings.max_tokens, 0)(rows)["input_ids"]
        return Shape(packed.shape[0], packed.shape[1], packed.shape[1])
    longest = max(len(chat.ids) for chat in chats)
    learned = set(itertools.chain.from_iterable(chat.trained.nonzero()[0].tolist() for chat in chats))
    return Shape(len(chats), longest, len(learned))


def _go_through(
    context: Context,
    settings: SftSection,
    plain: PreTrainedModel,
    model: nn.Module,
    lengths: Lengths,
    several: bool,
    footprint: Footprint,
) -> None:
    """Validates, trains, validates and draws, as the stage does."""
    vocabulary = plain.config.get_text_config().vocab_size

    def validate() -> None:
        rows = max(1, min(VALIDATED_AT_ONCE, LOGITS // (lengths.validation * vocabulary), lengths.validated))
        with footprint.phase("validation"), torch.no_grad():
            logits = model(input_ids=passes.ids(rows, lengths.validation), use_cache=False).logits[:, :-1]
            counted = torch.zeros(rows * (lengths.validation - 1), dtype=torch.long)
            logits.flatten(0, 1)[counted].float().log_softmax(-1)

    def loss(shape: Shape) -> Tensor:
        columns = torch.zeros(shape.trained, dtype=torch.long)
        with passes.computing(context.machine):
            read = passes.ids(shape.rows, shape.tokens)
            logits = model(input_ids=read, use_cache=False, logits_to_keep=columns).logits
            targets = passes.ids(shape.rows, shape.trained)
            return cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")

    validate()
    model.train()
    footprint.name_gradients(model.parameters())
    optimizer = passes.adam(passes.trained(model))
    passes.learn(footprint, "the first training step", [optimizer], partial(loss, lengths.first), several=several)
    with footprint.role(BEST):
        best = [p.detach().clone() for p in passes.trained(model)] if settings.early_stopping else []
    if settings.steps > 1:
        passes.learn(footprint, "a training step", [optimizer], partial(loss, lengths.largest), several=several)
    model.eval()
    validate()
    del optimizer
    drawing = Drawing(**settings.sampling.model_dump())
    passes.draw(footprint, plain, lengths.prompts, drawing)
    del best
