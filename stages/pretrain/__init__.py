"""The pretrain stage: next-token prediction, our own loop on Accelerate.

From random weights, or, with `base`, from those of a model, whose tokenizer is kept and whose earlier texts may be
replayed. Documents are packed end to end in a memory-mapped file.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.choices import Choices, choose, loading_attention
from rlhf.data.prepare.inputs import REPLAYED
from rlhf.data.tokens import PackStats, ReplayedTokens, Rows
from rlhf.errors import StageFailed
from rlhf.job import Job
from rlhf.model import (
    accelerator_bytes,
    build_causal_lm,
    causal_lm_config,
    check_vocabulary,
    checkpoint_layers,
    count_parameters,
    model_card,
    save_model,
    tokens_fitting,
)
from rlhf.products import use_onednn
from rlhf.recipe import PretrainSection, Recipe, microbatches
from rlhf.runtime import derive_seed, log, make_accelerator
from rlhf.sharding import WholeModels, sharded_models
from rlhf.tokenizer import begin_id, load_tokenizer, token_info
from stages.common import card_facts, check_context, context_of, named_model
from stages.corpus import Corpus, training_corpus
from stages.pretrain.plan import Plan
from stages.pretrain.training import Outcome, Training
from stages.pretrain.validation import QUICK, Measured, Validation

ACTIVATIONS = 2**31  # bytes of a forward pass; on a GPU:
ACTIVATIONS_SHARE = 1 / 4  # of its memory


def run(job: Job) -> dict[str, Any]:
    """Trains the base model and saves it in pretrain/model."""
    recipe = job.recipe
    settings = recipe.pretrain
    assert settings is not None
    accelerator = make_accelerator(recipe.precision)
    if accelerator.device.type == "cpu" and use_onednn():
        log("pretrain: matrix products by oneDNN, which is faster than MKL on this processor")
    model, tokenizer = _beginning(job)
    texts = _texts(job, settings, tokenizer)
    validation = Validation(recipe, settings.validation)
    plan = Plan(settings)
    model.to(accelerator.device)
    mine, _ = microbatches(recipe, "pretrain", job.team.size)
    memory = accelerator_bytes(model.device, ACTIVATIONS_SHARE) or ACTIVATIONS
    size = mine if settings.microbatch_size else rows_fitting(model, settings, mine, memory)
    sharded = sharded_models(job.team, job.sharding, recipe.precision)
    holding = sharded or WholeModels(accelerator)
    choices = choose(recipe, "pretrain", model.config._attn_implementation, in_pieces=sharded is not None)
    _announce(job, settings, model, plan, size, texts)
    if settings.gradient_checkpointing:
        checkpoint_layers(model, "pretrain.gradient_checkpointing")
    measure = partial(validation.measure, model, tokenizer, context_of(model), job.team)
    before = _measured_before(measure, recipe.base) if recipe.base else None

    def on_the_way() -> dict[str, Any]:
        found = measure(most=QUICK)
        return {**found.figures(), **found.lines()}

    begin = begin_id(tokenizer) if settings.isolate_documents else None
    outcome = Training(
        job, settings, model, texts.rows, plan, size, begin, accelerator, holding, on_the_way, compiled=choices.compiled
    ).run()
    after = measure()
    _tell(after, before)
    _warn_of_divergence(model, after)
    summary = _summary(model, choices, plan, texts, outcome, after, before)
    if job.team.is_main:
        what = "trained from random weights" if recipe.base is None else f"trained further from {recipe.base}"
        card = model_card(
            f"{recipe.name}: base model",
            f"A causal language model {what} on next-token prediction.",
            card_facts(summary, "parameters", "tokens", "validation_nats_per_token", "validation_bits_per_byte"),
        )
        save_model(model, tokenizer, job.directory.model, card)
    return summary


# Before the training


def _beginning(job: Job) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model of random weights with the tokenizer stage's tokenizer, or the base with its own."""
    recipe = job.recipe
    assert recipe.pretrain is not None
    if recipe.base is None:
        tokenizer = load_tokenizer(job.run.stage("tokenizer").model)
        return _new_model(recipe, tokenizer), tokenizer
    start = named_model(recipe, recipe.base)
    model, tokenizer = start.causal_lm(), start.tokenizer()
    check_vocabulary(model, tokenizer, recipe.base)
    check_context(context_of(model), "pretrain.sequence_length", recipe.pretrain.sequence_length)
    return model, tokenizer


def _new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    m = recipe.model
    torch.manual_seed(derive_seed(recipe.seed, "pretrain", "weights"))
    return build_causal_lm(
        causal_lm_config(
            m.architecture,
            vocab_size=len(tokenizer),
            layers=m.layers,
            width=m.width,
            heads=m.heads,
            kv_heads=m.kv_heads,
            mlp_width=m.mlp_width,
            context=m.context,
            rope_theta=m.rope_theta,
            initializer_range=m.initializer_range,
            sliding_window=m.sliding_window,
            sliding_layers=m.sliding_layers,
            tie_embeddings=m.tie_embeddings,
            special=token_info(tokenizer),
        ),
        m.initialisation,
        loading_attention(recipe),
    )


class _Texts(NamedTuple):
    rows: Rows
    corpus: Corpus  # the new ones
    replayed: Corpus | None


def _texts(job: Job, settings: PretrainSection, tokenizer: PreTrainedTokenizerBase) -> _Texts:
    """The training texts, with those that are replayed among them."""
    seed = derive_seed(job.recipe.seed, "pretrain", "order") if settings.order == "shuffled" else None
    corpus = training_corpus(job, tokenizer)
    packed = corpus.rows(len(tokenizer), settings.sequence_length, seed)
    if settings.replay is None:
        return _Texts(packed, corpus, None)
    replayed = training_corpus(job, tokenizer, REPLAYED)
    old = replayed.rows(len(tokenizer), settings.sequence_length, seed)
    return _Texts(ReplayedTokens(packed, old, settings.replay.share), corpus, replayed)


def rows_fitting(model: PreTrainedModel, settings: PretrainSection, mine: int, memory: int) -> int:
    """The rows of a forward pass whose activations take about so many bytes: the most that divide a process's share."""
    tokens = tokens_fitting(model, memory, checkpointing=settings.gradient_checkpointing)
    most = max(1, tokens // settings.sequence_length)
    return max(rows for rows in range(1, min(mine, most) + 1) if mine % rows == 0)


def _announce(
    job: Job, settings: PretrainSection, model: PreTrainedModel, plan: Plan, size: int, texts: _Texts
) -> None:
    """The arithmetic that follows from the recipe."""
    m, mine = job.recipe.model, plan.parts[-1].rows // job.team.size
    size = min(size, mine)  # with a ramp that is longer than the training no step has a whole batch
    if m.depth and job.recipe.base is None:
        log(
            f"pretrain: depth {m.depth}: {m.layers} layers, width {m.width}, {m.heads} heads, context {m.context}, "
            f"{settings.tokens:,} tokens, {settings.tokens_per_step:,} a step, peak learning rate "
            f"{settings.learning_rate:g}"
        )
    passes = -(-mine // size)
    share, corpus = settings.replay.share if settings.replay else 0.0, texts.corpus.stats
    replayed = ""
    if texts.replayed:
        old = texts.replayed.stats
        replayed = f"; replayed, {share:.0%} of all rows: {_read(old, plan.tokens * share)}"
    log(
        f"pretrain: {count_parameters(model):,} parameters; {plan.describe()} ({job.team.size} processes x {passes} "
        f"microbatches x {size} rows); {_read(corpus, plan.tokens * (1 - share))}{replayed}"
    )


def _read(stats: PackStats, tokens: float) -> str:
    """What so many tokens are of a corpus."""
    return f"{stats.documents:,} documents, {stats.tokens:,} tokens, {tokens / stats.tokens:.2f} passes over them"


def _measured_before(measure: Callable[[], Measured], base: str) -> Measured:
    try:
        return measure()
    except StageFailed as error:
        raise StageFailed(f"pretrain: the base {base}, before the first step: {error}") from None


# After it


def _tell(after: Measured, before: Measured | None) -> None:
    """What training came to on the held-out texts, all together and by source, beside the base's."""

    def told(name: str, now: float, then: float | None) -> str:
        return f"{name} {now:.3f}" if then is None else f"{name} {now:.3f} (the base {then:.3f})"

    began = before.whole().nats_per_token.mean if before else None
    whole = told("held out", after.whole().nats_per_token.mean, began)
    then = before.by_source() if before else {}
    sources = [
        told(name, figures["nats_per_token"], then.get(name, {}).get("nats_per_token"))
        for name, figures in after.by_source().items()
    ]
    log(f"pretrain: nats per token, {'; '.join([whole, *sources])}")


def _warn_of_divergence(model: PreTrainedModel, after: Measured) -> None:
    nats = after.whole().nats_per_token.mean
    guessing = math.log(model.config.get_text_config().vocab_size)
    if nats > guessing:
        log(
            f"pretrain: warning: {nats:.3f} nats per token on the held-out texts are more than guessing costs, "
            f"{guessing:.3f}: the training has diverged, or the texts have nothing in common with its own; try "
            "a smaller learning_rate"
        )


def _summary(
    model: PreTrainedModel,
    choices: Choices,
    plan: Plan,
    texts: _Texts,
    outcome: Outcome,
    after: Measured,
    before: Measured | None,
) -> dict[str, Any]:
    speed, corpus = plan.tokens / outcome.seconds, texts.corpus
    summary = {
        "parameters": count_parameters(model),
        **choices.facts(),
        "steps": plan.steps,
        "tokens": plan.tokens,
        "tokens_per_second": round(speed, 1),
        "peak_flops_per_second": outcome.peak_flops_per_second,
        "model_flops_utilisation": round(speed * outcome.flops_per_token / outcome.peak_flops_per_second, 4),
        "training_documents": corpus.stats.documents,
        "training_tokens": corpus.stats.tokens,
        "training_bytes_per_token": round(corpus.stats.bytes / corpus.stats.tokens, 4),
        "corpus": corpus.summary(),
        **({"replayed_corpus": texts.replayed.summary()} if texts.replayed else {}),
        **after.figures(),
        "rollbacks": outcome.rollbacks,
    }
    if after.by_source():
        summary["validation"] = after.by_source()
    if before:
        summary["before"] = {**before.figures(), **({"validation": before.by_source()} if before.by_source() else {})}
    return summary
