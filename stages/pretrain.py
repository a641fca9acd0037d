"""The pretrain stage: next-token prediction from random weights, our own loop on Accelerate.

AdamW (0.9, 0.95, 1e-8) with weight decay on matrices only, or Muon for the layers' matrices; linear warm-up, then
cosine to a floor; gradient clipping.
Documents are packed end to end in a memory-mapped file; the rows that a step reads depend on (seed, step) alone.
"""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from evaluation.perplexity import Perplexity, perplexity, score_documents
from evaluation.scoring import Scorer
from rlhf.checkpoint import load_tree
from rlhf.data.tokens import PackedTokens
from rlhf.errors import StageFailed
from rlhf.functional.masked import widened
from rlhf.job import Job
from rlhf.model import build_causal_lm, causal_lm_config, count_parameters, decay_groups, model_card, save_model
from rlhf.muon import muon_with_adamw
from rlhf.recipe import PretrainSection, Recipe, microbatches
from rlhf.runtime import Bar, derive_seed, log, make_accelerator
from rlhf.saver import Saver
from rlhf.team import Team
from rlhf.tokenizer import begin_id, load_tokenizer, token_info
from stages.common import card_facts, open_data, packed_texts, report_faults

BETAS, EPSILON = (0.9, 0.95), 1e-8
QUICK_VALIDATION = 100  # documents of the validations on the way; the last one takes all


def run(job: Job) -> dict[str, Any]:
    """Trains the base model and saves it in pretrain/model."""
    recipe, directory = job.recipe, job.directory
    settings = recipe.pretrain
    assert settings is not None
    accelerator = make_accelerator()
    tokenizer = load_tokenizer(job.run.stage("tokenizer").model)
    packed, stats = packed_texts(
        job, settings.train, tokenizer, settings.sequence_length, derive_seed(recipe.seed, "pretrain", "order")
    )
    held_out = open_data(recipe, "pretrain", settings.validation, "texts", "validation")
    validation = list(held_out)
    report_faults(held_out)
    model = _new_model(recipe, tokenizer)

    steps = math.ceil(settings.tokens / settings.tokens_per_step)
    rows = settings.tokens_per_step // settings.sequence_length
    size, passes = microbatches(recipe, "pretrain", job.team.size)
    log(
        f"pretrain: {count_parameters(model):,} parameters; {steps:,} steps of {settings.tokens_per_step:,} tokens = "
        f"{rows} rows of {settings.sequence_length} ({job.team.size} processes x {passes} microbatches x "
        f"{size} rows); {stats.documents:,} documents, {stats.tokens:,} tokens, "
        f"{steps * settings.tokens_per_step / stats.tokens:.2f} passes over them"
    )
    validate = partial(_validate, job.team, model, tokenizer, recipe.model.context)
    seconds = _train(
        job,
        model,
        tokenizer,
        packed,
        partial(validate, validation[:QUICK_VALIDATION]),
        settings,
        steps,
        size,
        accelerator,
    )

    final = validate(validation)
    summary = {
        "parameters": count_parameters(model),
        "steps": steps,
        "tokens": steps * settings.tokens_per_step,
        "tokens_per_second": round(steps * settings.tokens_per_step / seconds, 1),
        "training_documents": stats.documents,
        "training_tokens": stats.tokens,
        "training_bytes_per_token": round(stats.bytes / stats.tokens, 4),
        **_figures(final),
        "rollbacks": [],
    }
    if job.team.is_main:
        card = model_card(
            f"{recipe.name}: base model",
            "A causal language model trained from random weights on next-token prediction.",
            card_facts(summary, "parameters", "tokens", "validation_nats_per_token", "validation_bits_per_byte"),
        )
        save_model(model, tokenizer, directory.model, card)
    return summary


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
    )


def learning_rate_at(step: int, steps: int, peak: float, warmup: float, final: float) -> float:
    """The learning rate of step 0 <= step < steps: linear warm-up, then a cosine from `peak` to `final * peak`."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return peak * (step + 1) / rising
    progress = (step - rising) / max(1, steps - rising)
    return peak * (final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress)))


def _train(
    job: Job,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    packed: PackedTokens,
    validate: Callable[[], Perplexity],
    settings: PretrainSection,
    steps: int,
    size: int,
    accelerator: Accelerator,
) -> float:
    """The training loop. Returns the seconds that it took, its validations apart."""
    wrapped, *optimizers = accelerator.prepare(model, *_optimizers(model, settings))
    metrics = job.metrics()
    saver = Saver(job, metrics)
    rows = settings.tokens_per_step // settings.sequence_length
    mine = rows // job.team.size
    begin = begin_id(tokenizer) if settings.isolate_documents else None
    first_step, spent_validating = 0, 0.0
    losses, summed = torch.zeros((), device=accelerator.device), 0  # of the steps since the last line
    found = saver.resume()
    if found:
        state = load_tree(found.path, "state")
        model.load_state_dict(state["model"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        first_step, spent_validating, summed = found.step, state["seconds_validating"], state["losses_summed"]
        losses += state["losses"][job.team.rank] if len(state["losses"]) == job.team.size else state["losses"].mean()

    def state_now() -> dict[str, Any]:
        return {
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "losses": torch.stack(job.team.gather(losses.cpu())),
            "losses_summed": summed,
            "seconds_validating": spent_validating,
        }

    wrapped.train()
    with saver.training(), Bar("pretrain", steps, first_step) as bar:
        for step in range(first_step, steps):
            rate = learning_rate_at(step, steps, settings.learning_rate, settings.warmup, settings.final_learning_rate)
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = rate
            first = step * rows + job.team.rank * mine
            loss = _step_gradient(wrapped, packed, range(first, first + mine), size, begin, accelerator)
            norm = accelerator.clip_grad_norm_(wrapped.parameters(), settings.gradient_clipping)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses, summed = losses + loss, summed + 1

            done = step + 1
            if done % settings.log_every == 0 or done == steps:
                mean = (accelerator.reduce(losses, "mean") / summed).item()
                losses, summed = torch.zeros_like(losses), 0
                if not math.isfinite(mean):
                    raise StageFailed(f"pretrain: the loss is {mean} at step {done}; try a smaller learning_rate")
                speed = done * settings.tokens_per_step / (saver.seconds() - spent_validating)
                metrics.log(
                    step=done, loss=mean, learning_rate=rate, gradient_norm=float(norm), tokens_per_second=speed
                )
                bar.show(done, loss=mean, tokens_a_second=speed)
            if done % settings.validate_every == 0 and done < steps:
                before = time.monotonic()
                metrics.log(step=done, **_figures(validate()))
                spent_validating += time.monotonic() - before
            saver.after_step(done, steps, state_now, model)
        return saver.seconds() - spent_validating


def _optimizers(model: PreTrainedModel, settings: PretrainSection) -> list[torch.optim.Optimizer]:
    if settings.optimizer == "muon":
        return muon_with_adamw(model, settings.learning_rate, settings.weight_decay, BETAS, EPSILON)
    groups = decay_groups(model, settings.weight_decay)
    return [torch.optim.AdamW(groups, lr=settings.learning_rate, betas=BETAS, eps=EPSILON)]


def _step_gradient(
    model: torch.nn.Module,
    packed: PackedTokens,
    places: range,
    size: int,
    begin: int | None,
    accelerator: Accelerator,
) -> torch.Tensor:
    """Adds up the gradient of one step's rows, a microbatch at a time; returns their mean loss on this process.

    All rows are equally long, so the mean over microbatches and processes is the mean over tokens. With `begin`, the
    id that begins a document, no token sees the documents before its own: positions that begin anew tell transformers
    to mask them, as long as no cache is used.
    """
    starts = range(places.start, places.stop, size)
    total = torch.zeros((), device=accelerator.device)
    for start in starts:
        inputs, targets = packed.batch(range(start, start + size))
        inputs, targets = inputs.to(accelerator.device), targets.to(accelerator.device)
        last = start + size >= places.stop
        with _synchronised(model, accelerator, last):
            positions = None if begin is None else positions_in_documents(inputs, begin)
            logits = model(input_ids=inputs, position_ids=positions, use_cache=False).logits
            loss = cross_entropy(widened(logits.flatten(0, 1)), targets.flatten()) / len(starts)
            accelerator.backward(loss)
        total += loss.detach()
    return total


def positions_in_documents(ids: torch.Tensor, begin: int) -> torch.Tensor:
    """How far each token [B, L] stands from the beginning of its document, or of the row where that is nearer."""
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return places - torch.where(ids == begin, places, 0).cummax(1).values


def _synchronised(model: torch.nn.Module, accelerator: Accelerator, last: bool) -> Any:
    """Gradients cross the processes with the last microbatch of a step only."""
    from contextlib import nullcontext

    return nullcontext() if last else accelerator.no_sync(model)


def _validate(
    team: Team, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: int, texts: list[str]
) -> Perplexity:
    """Perplexity on the texts, which the ranks share among them."""
    model.eval()
    scorer = Scorer(model, share=False)  # documents have nothing in common
    scores = team.share(texts, lambda mine: score_documents(scorer, tokenizer, mine, context=context))
    model.train()
    return perplexity(scores)


def _figures(found: Perplexity) -> dict[str, Any]:
    return {
        **found.nats_per_token.as_keys("validation_nats_per_token"),
        "validation_perplexity": round(found.perplexity, 4),
        **found.bits_per_byte.as_keys("validation_bits_per_byte"),
    }
