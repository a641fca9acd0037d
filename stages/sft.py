"""The sft stage: supervised fine-tuning on TRL's SFTTrainer, the loss on the assistant's tokens only.

Conversations are tokenised by us, so that text which looks like a special token stays text; the trainer gets ids and
labels. Fixes the chat template, the pad token and the end token for every later stage. The weights of sft/model are
plain ones also where low-rank adapters were trained; these lie beside it, in sft/adapter.
"""

import itertools
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from rich.text import Text
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from rlhf.choices import choose, training_attention
from rlhf.errors import DataError, MissingInput, StageFailed, UserError
from rlhf.functional.intervals import proportion_estimate, ratio_estimate
from rlhf.job import Job
from rlhf.model import (
    ADAPTER_LOADS,
    check_vocabulary,
    checkpoint_layers,
    count_parameters,
    disable_dropout,
    model_card,
    resize_for,
    save_model,
    use_special_tokens,
)
from rlhf.quantisation import give_back_memory, put_where_it_fits, quantisation
from rlhf.recipe import Recipe, SftSection, microbatches
from rlhf.rollout import cut_at_stop
from rlhf.runtime import derive_seed, log, visible
from rlhf.team import Team
from rlhf.templates import CHAT_TEMPLATES, Messages
from rlhf.tokenizer import (
    ChatTokens,
    EncodedChat,
    begin_id,
    encode_chat,
    encode_prompt,
    last_turn_only,
    marked_and_trained,
    prepare_for_chat,
)
from stages.common import (
    Start,
    card_facts,
    check_context,
    context_of,
    fitting,
    open_data,
    report_faults,
    sample_responses,
    starting_model,
    training_order,
)
from stages.lora import (
    add_adapters,
    give_weights,
    learned_weights,
    merged,
    save_adapter,
    trained_on,
    trained_parameters,
)
from stages.packing import IGNORED, PackingCollator, check_isolation
from stages.sft_trainer import LeanSFTTrainer
from stages.trl_glue import Training, Validation, adapters_as_they_are, learning, run_trainer, trainer_arguments

SHOWN = 4000  # characters of the first dialogue


def run(job: Job) -> dict[str, Any]:
    """Fine-tunes the base model and saves it in sft/model."""
    recipe, directory = job.recipe, job.directory
    settings = recipe.sft
    assert settings is not None
    start = starting_model(recipe, job.run, "sft")
    tokenizer = start.tokenizer()
    if "evaluate" in recipe.stages:
        begin_id(tokenizer)  # what evaluation will need of the base, asked before anything is trained
    given = prepared(recipe, settings, start.name, tokenizer)
    quantised = quantisation(recipe, "sft")
    model = _model(recipe, start, tokenizer, given, quantised)
    check_context(context_of(model), "sft.max_tokens", settings.max_tokens)
    if settings.packing:
        check_isolation(model, "sft.packing")
    train = dialogues_of(recipe, settings, tokenizer, "train")
    validation = dialogues_of(recipe, settings, tokenizer, "validation")
    order = training_order(
        [len(chat.ids) for chat in train.chats],
        settings.dialogues_per_step,
        settings.steps,
        derive_seed(recipe.seed, "sft", "order"),
    )
    adapted: PreTrainedModel | PeftModel = model
    if settings.lora:
        adapted = add_adapters(model, settings.lora, "sft.lora", tokens=given.untrained)
    if settings.gradient_checkpointing:
        checkpoint_layers(model, "sft.gradient_checkpointing")
    choices = choose(recipe, "sft", model.config._attn_implementation)
    _announce(job, settings, adapted, tokenizer, given, train, validation)

    with training_attention(model, choices):
        training = _train(job, settings, adapted, tokenizer, train.chats, order, validation.chats)
    facts = {**choices.facts(), **_facts(settings, adapted, train, validation, order, training)}
    if quantised and settings.lora and isinstance(adapted, PeftModel):
        learned = learned_weights(adapted)
        del model, adapted
        give_back_memory()  # before the whole base comes
        model = put_where_it_fits(_model(recipe, start, tokenizer, given))
        adapted = add_adapters(model, settings.lora, "sft.lora", tokens=given.untrained)
        give_weights(adapted, learned)
        facts |= _measured_on_the_whole(job.team, adapted, validation.chats)
    if isinstance(adapted, PeftModel):
        if job.team.is_main:
            what = f"Low-rank adapters for {start.name}.{trained_on(settings.lora)}"
            card = model_card(f"{recipe.name}: chat model (SFT), adapter", what, facts, ADAPTER_LOADS)
            save_adapter(adapted, tokenizer, directory.path / "adapter", card)
        model = merged(adapted)
    disable_dropout(model)
    model.eval()
    summary = {
        "parameters": count_parameters(model),
        **facts,
        **_share_ended(job, settings, model, tokenizer, validation),
    }
    card = model_card(
        f"{recipe.name}: chat model (SFT)",
        f"Fine-tuned on conversations, the loss on the assistant's turns only.{trained_on(settings.lora)}",
        card_facts(summary, "parameters", "steps", "validation_nats_per_token", "responses_ended"),
    )
    if job.team.is_main:
        save_model(model, tokenizer, directory.model, card)
    return summary


# The base


def prepared(recipe: Recipe, settings: SftSection, base: str, tokenizer: PreTrainedTokenizerBase) -> ChatTokens:
    """Gives the tokenizer what chatting needs, and tries its template out before any row is read."""
    template = settings.chat_template
    if template not in CHAT_TEMPLATES:
        template = _template_file(Path(recipe.data.root) / template)
    given = prepare_for_chat(tokenizer, template, replace=settings.replace_chat_template, end_token=settings.end_token)
    question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    try:
        whole, prompt = encode_chat(tokenizer, [question, answer]), encode_prompt(tokenizer, [question])
        marked, learned = marked_and_trained(tokenizer, [question, answer])
    except UserError as error:
        raise UserError(f"{base} with its chat template: {error}") from None
    if len(marked) > len(learned):
        log(
            f"sft: the chat template's generation markers hold {marked!r}; of that only {learned!r} is trained, the "
            "answer and its end token"
        )
    begins = whole.trained.index(True)
    if whole.ids[:begins] != prompt:
        log(
            "sft: warning: the chat template's generation prompt is not what an answered conversation begins with, so "
            f"responses begin elsewhere than in training: after {tokenizer.decode(prompt)!r} instead of "
            f"{tokenizer.decode(whole.ids[:begins])!r}; sft.replace_chat_template=true gives another template"
        )
    return given


def _template_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MissingInput(f"sft.chat_template: {path}, which is to be a Jinja file, can't be read: {error}") from None


def _model(
    recipe: Recipe,
    start: Start,
    tokenizer: PreTrainedTokenizerBase,
    given: ChatTokens,
    quantised: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """The base with an embedding for every token; what is random of what follows is seeded."""
    model = start.causal_lm(quantised)
    check_vocabulary(model, start.tokenizer(), start.name)
    torch.manual_seed(derive_seed(recipe.seed, "sft", "weights"))
    resize_for(model, tokenizer, given.added)
    use_special_tokens(model, tokenizer)
    return model


# Conversations


class Row(NamedTuple):
    """An EncodedChat that is kept until the stage ends, as arrays: lists take ten times the memory."""

    ids: np.ndarray  # int32
    trained: np.ndarray  # bool

    @classmethod
    def of(cls, chat: EncodedChat) -> "Row":
        """A conversation as it is kept."""
        return cls(np.array(chat.ids, dtype=np.int32), np.array(chat.trained, dtype=np.bool_))

    def chat(self) -> EncodedChat:
        """The conversation as it was."""
        return EncodedChat(self.ids.tolist(), self.trained.tolist())


class Dialogues(NamedTuple):
    """The conversations of a split that can be learned from, the first ones as they were asked, and what was done."""

    chats: list[Row]
    asked: list[Messages]
    too_long: int  # than max_tokens: dropped or truncated
    truncated: int  # of those, the ones that are kept
    untrained: int  # truncated before their first trained token, and so dropped

    def say(self) -> str:
        """What a log line says of them."""
        found = f"{len(self.chats):,} dialogues"
        if self.too_long:
            found += f" ({self.too_long:,} were too long: {self.truncated:,} of them truncated"
            found += f", {self.too_long - self.truncated:,} dropped)"
        return found

    def facts(self, prefix: str) -> dict[str, int]:
        """What the summary says of what was done to them."""
        return {
            f"{prefix}_too_long": self.too_long,
            f"{prefix}_truncated": self.truncated,
            f"{prefix}_without_trained_tokens": self.untrained,
        }


def dialogues_of(recipe: Recipe, settings: SftSection, tokenizer: PreTrainedTokenizerBase, split: str) -> Dialogues:
    """The conversations of a split as ids, none longer than max_tokens, each with something to learn."""

    def encoded(messages: Messages) -> tuple[Messages, EncodedChat]:
        chat = encode_chat(tokenizer, messages)
        if settings.too_long == "error" and len(chat.ids) > settings.max_tokens:
            raise UserError(
                f"{len(chat.ids)} tokens, more than sft.max_tokens, which is {settings.max_tokens} (sft.too_long=drop "
                "or truncate goes on)"
            )
        return messages[:-1], last_turn_only(chat) if settings.loss_on == "last" else chat

    sources = settings.train if split == "train" else settings.validation
    dataset = open_data(recipe, "sft", sources, "conversations", "train" if split == "train" else "validation", encoded)
    chats: list[Row] = []
    asked: list[Messages] = []
    too_long = truncated = untrained = 0
    for prompt, chat in dataset:
        if len(asked) < settings.sampled_prompts:
            asked.append(prompt)
        if len(chat.ids) > settings.max_tokens:
            too_long += 1
            if settings.too_long == "drop":
                continue
            chat = EncodedChat(*(values[: settings.max_tokens] for values in chat))
            if not any(chat.trained):
                untrained += 1
                continue
            truncated += 1
        chats.append(Row.of(chat))
    report_faults(dataset)
    if not chats:
        raise DataError(
            f"sft.{split}: none of the {too_long:,} conversations has at most {settings.max_tokens} tokens"
            + (", nor a trained token among its first ones" if untrained else "")
        )
    _check_end(tokenizer, chats, split)
    return Dialogues(chats, asked, too_long, truncated, untrained)


def _check_end(tokenizer: PreTrainedTokenizerBase, chats: list[Row], split: str) -> None:
    """Truncation takes the ends away: some must be left, or the model never learns to stop."""
    end = tokenizer.eos_token_id
    if not any((chat.trained & (chat.ids == end)).any() for chat in chats):
        raise DataError(
            f"sft.{split}: the end token {tokenizer.eos_token!r} is nowhere among the trained tokens, since every "
            "conversation is truncated before it, so the model would never learn to stop; give a larger sft.max_tokens"
        )


# What is said at the start


def _announce(
    job: Job,
    settings: SftSection,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    given: ChatTokens,
    train: Dialogues,
    validation: Dialogues,
) -> None:
    size, passes = microbatches(job.recipe, "sft", job.team.size)
    adapters = trained_parameters(model) if settings.lora else 0
    log(
        f"sft: {count_parameters(model) - adapters:,} parameters"
        + (f", {adapters:,} trained in their place" if settings.lora else "")
        + f"; {settings.steps} steps of {settings.dialogues_per_step} dialogues ({job.team.size} processes x {passes} "
        f"microbatches x {size}{', packed' if settings.packing else ''}); {train.say()}, "
        f"{settings.steps * settings.dialogues_per_step / len(train.chats):.2f} passes; for validation "
        f"{validation.say()}; {len(given.added)} tokens added to the vocabulary"
    )
    if settings.lora and given.untrained:
        names = " ".join(tokenizer.convert_ids_to_tokens(given.untrained))
        log(f"sft: the embeddings of {names} are trained beside the adapters: the base has never learned them")
    log("sft: the first dialogue, what is trained in ⟦ ⟧:")
    if job.team.is_main:
        Console(highlight=False, soft_wrap=True).print(marked(tokenizer, train.chats[0].chat()))


def marked(tokenizer: PreTrainedTokenizerBase, chat: EncodedChat) -> Text:
    """A conversation as the model sees it, with what is trained in ⟦ ⟧, and in colour on a terminal."""
    shown = Text("  ")
    for trained, group in itertools.groupby(zip(*chat, strict=True), lambda pair: pair[1]):
        text = visible(tokenizer.decode([token for token, _ in group], clean_up_tokenization_spaces=False))
        text = text.replace("⟦", r"\u27e6").replace("⟧", r"\u27e7").replace("\n", "\n  ")
        shown.append(f"⟦{text}⟧" if trained else text, style="bold green" if trained else "dim")
    if len(shown) > SHOWN:
        shown = shown[:SHOWN].append(f" ... and {len(shown) - SHOWN:,} more characters")
    return shown


# Training


def _train(
    job: Job,
    settings: SftSection,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train: list[Row],
    order: list[int],
    validation: list[Row],
) -> Training:
    """Trains the model in place on the rows in their order."""
    size, passes = microbatches(job.recipe, "sft", job.team.size)
    arguments = SFTConfig(
        **trainer_arguments(
            output=job.directory.path,
            seed=job.recipe.seed,
            stage="sft",
            precision=job.recipe.precision,
            steps=settings.steps,
            size=size,
            passes=passes,
            learning_rate=settings.learning_rate,
            warmup=settings.warmup,
            weight_decay=settings.weight_decay,
            gradient_clipping=settings.gradient_clipping,
        ),
        max_length=None,
        packing=False,  # ours is a collator
    )
    figures = {"loss": "loss", "learning_rate": "learning_rate", "grad_norm": "gradient_norm"}
    collator = PackingCollator(settings.max_tokens, tokenizer.pad_token_id) if settings.packing else None
    held = learning(job, model)
    with adapters_as_they_are(held.learner):
        trainer = LeanSFTTrainer(
            model=held.learner,
            args=arguments,
            train_dataset=dataset_of(train).select(order),
            processing_class=tokenizer,
            data_collator=collator,
        )
    measure = partial(validation_loss, job.team, model, validation)
    validating = Validation(measure, settings.validate_every, "validation_nats_per_token", settings.early_stopping)
    return run_trainer(trainer, model, held, job, settings.steps, figures, settings.log_every, validating)


def dataset_of(rows: list[Row]) -> Dataset:
    """What the trainer reads: `input_ids` and `labels`.

    Left to itself, Dataset makes lists of arrays, and a fingerprint of a copy: fifty bytes a token.
    """
    ends = np.cumsum([0, *(len(row.ids) for row in rows)], dtype=np.int64)
    columns = {
        "input_ids": np.concatenate([row.ids for row in rows]),
        "labels": np.concatenate([np.where(row.trained, row.ids, np.int32(IGNORED)) for row in rows]),
    }
    table = pa.table({name: pa.LargeListArray.from_arrays(ends, values) for name, values in columns.items()})
    return Dataset(table, fingerprint="dialogues")


def _facts(
    settings: SftSection,
    model: PreTrainedModel | PeftModel,
    train: Dialogues,
    validation: Dialogues,
    order: list[int],
    training: Training,
) -> dict[str, Any]:
    """What the summary says of the training."""
    tokens = sum(len(train.chats[row].ids) for row in order[: training.steps * settings.dialogues_per_step])
    found = {
        "parameters_trained": trained_parameters(model),
        "steps": training.steps,
        "tokens": tokens,
        "tokens_per_second": round(tokens / training.seconds, 1),
        "dialogues_train": len(train.chats),
        "dialogues_validation": len(validation.chats),
        **train.facts("dialogues"),
        **validation.facts("dialogues_validation"),
        "validation_nats_per_token_before": training.first["validation_nats_per_token"],
        **training.last,
    }
    if training.best_step is not None:
        found |= {"stopped_early": training.stopped_early, "best_step": training.best_step}
    return found


# Measuring

LOGITS = 2**25  # how many are held at a time
VALIDATED_AT_ONCE = 64  # conversations


def _measured_on_the_whole(team: Team, model: PeftModel, chats: list[Row]) -> dict[str, Any]:
    """The validation loss of what is saved: the adapters on the base as it was, which they weren't trained on."""
    model.eval()
    found = validation_loss(team, model, chats)
    nats = found["validation_nats_per_token"]
    log(f"sft: on the base's own weights, to which the adapters are added, validation nats per token are {nats:.4f}")
    return {f"{name}_merged": value for name, value in found.items()}


def validation_loss(team: Team, model: PreTrainedModel | PeftModel, chats: list[Row]) -> dict[str, Any]:
    """Nats per trained token over all these conversations, which the ranks share: sums first, one division."""
    found = team.share(chats, partial(_nats_and_counts, model))
    if not all(math.isfinite(nats) for nats, _ in found):
        raise StageFailed(
            "sft: the validation loss is not a number: before the first step, the base's weights are broken; later, a "
            "smaller learning_rate may help"
        )
    return ratio_estimate([nats for nats, _ in found], [count for _, count in found]).as_keys(
        "validation_nats_per_token"
    )


@torch.no_grad()
def _nats_and_counts(model: PreTrainedModel | PeftModel, chats: list[Row]) -> list[tuple[float, int]]:
    """The negative log-likelihood of each conversation's trained tokens, and their number."""
    pad = model.config.pad_token_id
    found: list[tuple[float, int]] = [(0.0, 0)] * len(chats)
    order = sorted(range(len(chats)), key=lambda row: (-len(chats[row].ids), row))
    while order:
        longest = len(chats[order[0]].ids)
        size = max(1, min(VALIDATED_AT_ONCE, LOGITS // (longest * model.config.vocab_size)))
        rows, order = order[:size], order[size:]
        ids, mask = torch.full((len(rows), longest), pad), torch.zeros(len(rows), longest, dtype=torch.bool)
        for place, row in enumerate(rows):
            length = len(chats[row].ids)
            ids[place, :length] = torch.from_numpy(chats[row].ids)
            mask[place, :length] = torch.from_numpy(chats[row].trained)
        ids, counted = ids.to(model.device), mask[:, 1:].to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1][counted].float()
        logprobs = logits.log_softmax(-1).gather(-1, ids[:, 1:][counted].unsqueeze(-1)).squeeze(-1)
        nats = torch.zeros(counted.shape, dtype=torch.float64, device=model.device)
        nats[counted] = -logprobs.double()
        for row, value, count in zip(rows, nats.sum(1).tolist(), counted.sum(1).tolist(), strict=True):
            found[row] = (value, count)
    return found


def _share_ended(
    job: Job,
    settings: SftSection,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    validation: Dialogues,
) -> dict[str, Any]:
    """The share of sampled responses that stop by themselves, and a few of them for the eye."""
    encoded = [(prompt, encode_prompt(tokenizer, prompt)) for prompt in validation.asked]
    prompts = fitting(
        encoded, lambda prompt: len(prompt[1]), context_of(model), settings.sampling.max_tokens, "sft.sampling"
    )
    seed = derive_seed(job.recipe.seed, "sft", "sampling")
    responses = sample_responses(job, model, tokenizer, [ids for _, ids in prompts], settings.sampling, seed)
    for (prompt, _), response in list(zip(prompts, responses, strict=True))[:3]:
        text = cut_at_stop(tokenizer.decode(response.ids, skip_special_tokens=True), settings.sampling.stop)
        log(f"sft: {prompt[-1]['content']} -> {text}")
    ended = sum(response.ended for response in responses)
    if ended < settings.ended_warning * len(responses):
        most = settings.sampling.max_tokens
        longer = sum(sum(last_turn_only(row.chat()).trained) > most for row in validation.chats)
        log(
            f"sft: warning: only {ended} of {len(responses)} sampled responses end by themselves within {most} tokens "
            f"(sft.sampling.max_tokens); {longer} of {len(validation.chats)} answers in the validation data are longer "
            f"than that. If {tokenizer.eos_token!r} is inside the ⟦ ⟧ of the first dialogue above, more steps or a "
            "larger sft.learning_rate help: the end is learned as every other token is"
        )
    return proportion_estimate(ended, len(responses)).as_keys("responses_ended")
