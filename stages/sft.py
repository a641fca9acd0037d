"""The sft stage: supervised fine-tuning on TRL's SFTTrainer, the loss on the assistant's tokens only.

Conversations are tokenised by us, segment by segment, so that text which looks like a special token stays text; the
trainer gets ids and labels. Fixes the chat template, the pad token and the end token for every later stage.
"""

import math
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from rlhf.errors import DataError, StageFailed
from rlhf.functional.intervals import proportion_estimate, ratio_estimate
from rlhf.job import Job
from rlhf.model import (
    check_vocabulary,
    count_parameters,
    disable_dropout,
    model_card,
    resize_for,
    save_model,
    use_special_tokens,
)
from rlhf.recipe import Recipe, SftSection, microbatches
from rlhf.runtime import derive_seed, log
from rlhf.team import Team
from rlhf.tokenizer import EncodedChat, Messages, begin_id, encode_chat, encode_prompt, prepare_for_chat
from stages.common import (
    card_facts,
    check_context,
    fitting,
    open_data,
    report_faults,
    sample_responses,
    starting_model,
    training_order,
)
from stages.trl_glue import run_trainer, trainer_arguments

IGNORED = -100  # the label of a token that is not learned


def run(job: Job) -> dict[str, Any]:
    """Fine-tunes the base model and saves it in sft/model."""
    recipe, run, directory = job.recipe, job.run, job.directory
    settings = recipe.sft
    assert settings is not None
    start = starting_model(recipe, run, "sft")
    tokenizer = start.tokenizer()
    if "evaluate" in recipe.stages:
        begin_id(tokenizer)  # what evaluation will need of the base, asked before anything is trained
    added = prepare_for_chat(tokenizer, settings.chat_template)
    model = start.causal_lm()
    check_vocabulary(model, start.tokenizer(), start.name)
    torch.manual_seed(derive_seed(recipe.seed, "sft", "weights"))
    resize_for(model, tokenizer)
    use_special_tokens(model, tokenizer)

    train, too_long = _encoded(recipe, settings, tokenizer, "train")
    validation, validation_too_long = _encoded(recipe, settings, tokenizer, "validation")
    size, passes = microbatches(recipe, "sft", job.team.size)
    check_context(model, "sft.max_tokens", settings.max_tokens)
    log(
        f"sft: {count_parameters(model):,} parameters; {settings.steps} steps of {settings.dialogues_per_step} "
        f"dialogues ({job.team.size} processes x {passes} microbatches x {size}); {len(train):,} dialogues, "
        f"{settings.steps * settings.dialogues_per_step / len(train):.2f} passes; {too_long} of them, and "
        f"{validation_too_long} of {len(validation) + validation_too_long} for validation, too long and left out; "
        f"{added} tokens added to the vocabulary"
    )
    log("sft: the first dialogue, what is trained in [brackets]:\n  " + _marked(tokenizer, train[0]))

    order = training_order(
        [len(chat.ids) for chat in train],
        settings.dialogues_per_step,
        settings.steps,
        derive_seed(recipe.seed, "sft", "order"),
    )
    seconds = _train(job, model, tokenizer, _dataset(train).select(order), settings, size, passes)
    disable_dropout(model)
    model.eval()
    tokens = sum(len(train[row].ids) for row in order)
    summary = {
        "parameters": count_parameters(model),
        "steps": settings.steps,
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
        "dialogues_train": len(train),
        "dialogues_validation": len(validation),
        "dialogues_too_long": too_long,
        "dialogues_validation_too_long": validation_too_long,
        **_validation_loss(job.team, model, validation),
        **_share_ended(job, settings, model, tokenizer),
    }
    card = model_card(
        f"{recipe.name}: chat model (SFT)",
        "Fine-tuned on conversations, the loss on the assistant's turns only.",
        card_facts(summary, "parameters", "steps", "validation_nats_per_token", "responses_ended"),
    )
    if job.team.is_main:
        save_model(model, tokenizer, directory.model, card)
    return summary


def _encoded(
    recipe: Recipe, settings: SftSection, tokenizer: PreTrainedTokenizerBase, split: str
) -> tuple[list[EncodedChat], int]:
    """The conversations that fit, and how many did not."""
    sources = settings.train if split == "train" else settings.validation
    dataset = open_data(recipe, "sft", sources, "conversations", "train" if split == "train" else "validation")
    chats = [encode_chat(tokenizer, messages) for messages in dataset]
    report_faults(dataset)
    kept = [chat for chat in chats if len(chat.ids) <= settings.max_tokens]
    if not kept:
        raise DataError(f"sft.{split}: none of the {len(chats)} conversations has at most {settings.max_tokens} tokens")
    end = tokenizer.eos_token_id
    if not any(token == end and trained for chat in kept for token, trained in zip(*chat, strict=True)):
        raise DataError(
            f"sft.{split}: the end token {tokenizer.eos_token!r} is nowhere among the trained tokens, so the model "
            "would never learn to stop; check the chat template's generation markers"
        )
    return kept, len(chats) - len(kept)


def _marked(tokenizer: PreTrainedTokenizerBase, chat: EncodedChat) -> str:
    text, inside = "", False
    for token, trained in zip(*chat, strict=True):
        if trained != inside:
            text += "[" if trained else "]"
            inside = trained
        text += tokenizer.decode([token])
    return (text + ("]" if inside else "")).replace("\n", "\n  ")


def _train(
    job: Job,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    settings: SftSection,
    size: int,
    passes: int,
) -> float:
    """Trains the model in place on the rows in their order; returns the seconds that its steps took."""
    arguments = SFTConfig(
        **trainer_arguments(
            output=job.directory.path,
            seed=job.recipe.seed,
            stage="sft",
            steps=settings.steps,
            size=size,
            passes=passes,
            learning_rate=settings.learning_rate,
            warmup=settings.warmup,
            weight_decay=settings.weight_decay,
            gradient_clipping=settings.gradient_clipping,
        ),
        max_length=None,
        packing=False,
    )
    figures = {"loss": "loss", "learning_rate": "learning_rate", "grad_norm": "gradient_norm"}
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=train, processing_class=tokenizer)
    return run_trainer(trainer, job, settings.steps, figures, settings.log_every)


def _dataset(chats: list[EncodedChat]) -> Dataset:
    return Dataset.from_dict(
        {
            "input_ids": [chat.ids for chat in chats],
            "labels": [[token if trained else IGNORED for token, trained in zip(*chat, strict=True)] for chat in chats],
        }
    )


@torch.inference_mode()
def _validation_loss(team: Team, model: PreTrainedModel, chats: list[EncodedChat], batch: int = 64) -> dict[str, Any]:
    """Nats per trained token over all validation conversations: sums first, one division."""
    pad = model.config.pad_token_id

    def nats_and_counts(chats: list[EncodedChat]) -> list[tuple[float, float]]:
        nats, counts = [], []
        for start in range(0, len(chats), batch):
            rows = chats[start : start + batch]
            longest = max(len(chat.ids) for chat in rows)
            ids = torch.tensor([chat.ids + [pad] * (longest - len(chat.ids)) for chat in rows], device=model.device)
            mask = torch.tensor(
                [chat.trained + [False] * (longest - len(chat.ids)) for chat in rows], device=model.device
            )
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            logprobs = logits.log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
            nats += torch.where(mask[:, 1:], -logprobs, 0.0).double().sum(1).tolist()
            counts += mask[:, 1:].sum(1).double().tolist()
        return list(zip(nats, counts, strict=True))

    found = team.share(chats, nats_and_counts)
    if not all(math.isfinite(nats) for nats, _ in found):
        raise StageFailed("sft: the validation loss is not a number; try a smaller learning_rate")
    return ratio_estimate([nats for nats, _ in found], [count for _, count in found]).as_keys(
        "validation_nats_per_token"
    )


def _share_ended(
    job: Job, settings: SftSection, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """The share of sampled responses that stop by themselves, and a few of them for the eye."""
    dataset = open_data(job.recipe, "sft", settings.validation, "conversations", "validation")
    asked: list[Messages] = [messages[:-1] for messages in dataset]
    encoded = [(prompt, encode_prompt(tokenizer, prompt)) for prompt in asked[: settings.sampled_prompts]]
    prompts = fitting(encoded, lambda prompt: len(prompt[1]), model, settings.sampling.max_tokens, "sft.sampling")
    seed = derive_seed(job.recipe.seed, "sft", "sampling")
    responses = sample_responses(job, model, tokenizer, [ids for _, ids in prompts], settings.sampling, seed)
    for (prompt, _), response in list(zip(prompts, responses, strict=True))[:3]:
        text = tokenizer.decode(response.ids, skip_special_tokens=True)
        log(f"sft: {prompt[-1]['content']} -> {text}")
    ended = sum(response.ended for response in responses)
    return proportion_estimate(ended, len(responses)).as_keys("responses_ended")
