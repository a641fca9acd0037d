"""Recipes: one typed model a section, read from YAML with `key=value` overrides. Imports nothing heavy.

A field marked `changes_result=False` never makes a finished stage stale (a logging interval, a description).
"""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    ValidationError,
    field_validator,
    model_validator,
)

from rlhf.errors import RecipeError
from rlhf.functional.compute_optimal import HEAD_CHANNELS, Training, inner_parameters, shape_of_depth, training_of
from rlhf.functional.schedules import ScheduleName

StageName = Literal["tokenizer", "pretrain", "sft", "reward", "ppo", "evaluate"]
STAGES: tuple[StageName, ...] = typing.get_args(StageName)

TrackerName = Literal[
    "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb"
]  # those of accelerate.tracking

LARGEST_NUMBER = 10**15
_NO_RESULT: dict[str, Any] = {"changes_result": False}


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, allow_inf_nan=False, populate_by_name=True)

    @model_validator(mode="before")
    @classmethod
    def _numbers_are_sane(cls, values: Any) -> Any:
        for key, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) > LARGEST_NUMBER:
                raise ValueError(f"{key}: {str(value)[:20]} is larger than anything here can be")
            field = cls.model_fields.get(key)
            if isinstance(value, bool) and field and field.annotation in (int, float, int | None, float | None):
                raise ValueError(f"{key}: a number is expected, not {str(value).lower()}")
        return values


class Source(Section):
    """One source of data: exactly one of `builtin`, `path` and `hub`."""

    builtin: Literal["tinyworld"] | None = Field(None, description="data that the package makes itself")
    path: str | None = Field(None, description="file or glob below data.root: .jsonl .jsonl.gz .json .parquet .txt")
    hub: str | None = Field(None, description="id of a data set on the Hugging Face hub")
    split: str = Field("train", description="which split of the hub's data set")
    subset: str | None = Field(None, description="which configuration of the hub's data set")
    streaming: bool = Field(False, description="read the hub's data set row by row, without downloading it whole")
    format: Literal["trl", "alpaca", "sharegpt", "chatml"] = Field(
        "trl", description="the shape of the rows; the other three are converted to TRL's"
    )
    rows: int | None = Field(None, ge=1, description="take this many rows (needed for builtin: it never ends)")
    weight: float = Field(
        1.0, gt=0, le=1000, description="how often each row is used: 2 is twice, 0.5 is a random half"
    )
    name: str | None = Field(None, min_length=1, max_length=60, description="what figures call it; default: after it")

    @model_validator(mode="after")
    def _exactly_one(self) -> Source:
        if sum(x is not None for x in (self.builtin, self.path, self.hub)) != 1:
            raise ValueError("a source has exactly one of the keys builtin, path, hub")
        return self

    def __str__(self) -> str:
        return self.name or self.path or (f"hub:{self.hub}" if self.hub else f"builtin:{self.builtin}")


Sources = Annotated[tuple[Source, ...], Field(min_length=1)]


class DataSection(Section):
    """How data files are found and read."""

    root: str = Field(".", description="where relative paths of sources start", json_schema_extra=_NO_RESULT)
    on_bad_row: Literal["error", "skip"] = Field("error", description="stop at a bad row, or count it and go on")


class TokenizerSection(Section):
    """Byte-level BPE, trained on the texts of its sources."""

    train: Sources = Field(description="texts (or conversations) to learn the merges from")
    vocab_size: int = Field(
        1024, ge=264, le=2**22, description="number of tokens, the special ones and the 256 bytes included"
    )


class ModelSection(Section):
    """The architecture of a model that starts from random weights."""

    depth: int | None = Field(
        None,
        ge=1,
        le=512,
        description="the one dial: layers, from which width, heads, context, and pretrain's tokens, tokens_per_step, "
        "learning_rate and sequence_length follow where they aren't given (rlhf/functional/compute_optimal.py)",
        json_schema_extra=_NO_RESULT,  # what follows from it decides
    )
    architecture: Literal["llama", "qwen3", "gpt2"] = Field(
        "llama",
        description="family of the config; qwen3 is llama with QK-norm",
    )
    layers: int = Field(4, ge=1, description="number of decoder layers")
    width: int = Field(128, ge=8, description="size of the hidden states")
    heads: int = Field(4, ge=1, description="number of attention heads")
    kv_heads: int | None = Field(None, ge=1, description="key-value heads (grouped-query attention); default: heads")
    mlp_width: int | None = Field(None, ge=8, description="inner size of the MLP; default: 8/3 width (gpt2: 4 width)")
    context: int = Field(256, ge=8, description="longest sequence in tokens")
    rope_theta: float = Field(10000.0, gt=1, description="base of the rotary position embedding (not gpt2)")
    initialisation: Literal["normal", "wide"] = Field(
        "normal", description="normal: transformers'; wide: for tiny models"
    )
    initializer_range: float = Field(0.02, gt=0, description="standard deviation of normal's random weights")
    sliding_window: int | None = Field(None, ge=2, description="tokens that a local layer sees (qwen3 only)")
    sliding_layers: tuple[Annotated[int, Field(ge=0)], ...] = Field((), description="which layers are local, from 0")
    tie_embeddings: bool = Field(True, description="share the input embedding with the output head")

    @model_validator(mode="after")
    def _divides(self) -> ModelSection:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.architecture != "gpt2" and self.width // self.heads % 2:
            raise ValueError(f"width / heads is {self.width // self.heads}; rotary positions need an even number")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.kv_heads and self.architecture == "gpt2":
            raise ValueError("gpt2 has no kv_heads")
        if (self.sliding_window is None) != (not self.sliding_layers):
            raise ValueError("sliding_window and sliding_layers come together")
        if self.sliding_layers and self.architecture != "qwen3":
            raise ValueError(f"sliding_layers: {self.architecture} has no local layers, qwen3 has")
        if any(layer >= self.layers for layer in self.sliding_layers):
            raise ValueError(f"sliding_layers: the layers are 0 to {self.layers - 1}")
        return self


def _or_off(value: Any) -> Any:
    """What switches a step or a limit off: `off`, false, null."""
    return None if value == "off" or value is False else value


Limit = Annotated[
    Annotated[float, Field(ge=0)] | None,
    BeforeValidator(_or_off, json_schema_input_type=float | Literal["off", False] | None),
]
Count = Annotated[
    Annotated[int, Field(ge=0)] | None,
    BeforeValidator(_or_off, json_schema_input_type=int | Literal["off", False] | None),
]
Off = BeforeValidator(_or_off)
_OffAsEmpty = BeforeValidator(lambda value: {} if _or_off(value) is None else value)


class CleaningSection(Section):
    """What is mended in every text; each change is counted."""

    encoding: bool = Field(True, description="text that was decoded wrongly (Ã© for é) is put right, by ftfy")
    line_ends: bool = Field(True, description="CRLF, CR, form feeds and Unicode's line separators become LF")
    control_characters: bool = Field(
        True,
        description="control characters but tab and LF, terminals' colour codes and byte order marks are removed",
    )
    unicode: bool = Field(True, description="characters are composed: Unicode's normalisation form C")
    white_space: bool = Field(
        True,
        description="blanks of other kinds become spaces, blanks at the ends of lines and blank lines beyond one go",
    )


class FiltersSection(Section):
    """Which documents are removed for what they are; `off` switches a rule off.

    The rules and limits are those of Gopher (Rae et al. 2021, arXiv:2112.11446, A.1.1 and table A1) where not said
    otherwise.
    """

    min_words: Count = Field(5, description="fewer words (the paper: 50, which leaves no poem, question or short fact)")
    max_words: Count = Field(None, description="more words (the paper: 100,000; off, since a book has more)")
    replacement_characters: Limit = Field(
        0.01, description="larger share of characters that were lost (U+FFFD); not the paper's"
    )
    from_words: int = Field(50, ge=0, description="the rules below judge documents of at least so many words")
    min_mean_word_length: Limit = Field(3.0, description="shorter mean word, in characters; not for code or Chinese")
    max_mean_word_length: Limit = Field(10.0, description="longer mean word, in characters; not for code or Chinese")
    hashes: Limit = Field(0.1, description="more hash signs for each word; not for code")
    ellipses: Limit = Field(0.1, description="more ellipses for each word; not for code")
    bullet_lines: Limit = Field(0.9, description="larger share of lines that begin with a bullet")
    ellipsis_lines: Limit = Field(0.3, description="larger share of lines that end with an ellipsis")
    min_alphabetic: Limit = Field(0.8, description="smaller share of words that hold a letter; not for code")
    stop_words: Count = Field(
        None, description="fewer of the words the, be, to, of, and, that, have, with (the paper: 2; off: English alone)"
    )
    duplicate_lines: Limit = Field(0.3, description="larger share of lines that stood there before")
    duplicate_paragraphs: Limit = Field(0.3, description="larger share of paragraphs that stood there before")
    duplicate_line_characters: Limit = Field(0.2, description="larger share of the characters in such lines")
    duplicate_paragraph_characters: Limit = Field(0.2, description="larger share of the characters in such paragraphs")
    top_2gram: Limit = Field(0.2, description="larger share of characters in the commonest 2 words; not for code")
    top_3gram: Limit = Field(0.18, description="larger share of characters in the commonest 3 words; not for code")
    top_4gram: Limit = Field(0.16, description="larger share of characters in the commonest 4 words; not for code")
    duplicate_5grams: Limit = Field(0.15, description="larger share of characters in 5 words that stood there before")
    duplicate_6grams: Limit = Field(0.14, description="the same of 6 words; like all of these not for code")
    duplicate_7grams: Limit = Field(0.13, description="the same of 7 words")
    duplicate_8grams: Limit = Field(0.12, description="the same of 8 words")
    duplicate_9grams: Limit = Field(0.11, description="the same of 9 words")
    duplicate_10grams: Limit = Field(0.1, description="the same of 10 words")


class PersonalDataSection(Section):
    """What is replaced by a placeholder, such as [EMAIL]."""

    email: bool = Field(False, description="e-mail addresses")
    phone: bool = Field(False, description="telephone numbers")
    ip: bool = Field(False, description="public IP addresses")
    card: bool = Field(False, description="numbers of payment cards whose check digit is right")


class NearDuplicatesSection(Section):
    """Documents that are alike but for some words, across all sources, by MinHash."""

    changed_words: float = Field(
        0.05, ge=0.01, le=0.08, description="share of words in which copies differ; 95 % of such copies are found"
    )
    min_words: int = Field(10, ge=1, description="documents with fewer words are compared as a whole only")


class DecontaminationSection(Section):
    """Documents that share words with the items of evaluate.fewshot.tasks are removed and listed."""

    words: int = Field(13, ge=5, le=100, description="length of a run of words that no document may share with an item")


class InContextSection(Section):
    """Documents made of the training files of few-shot tasks: task line, demonstrations, an item with its answer."""

    share: float = Field(gt=0, lt=1, description="of all documents of the corpus, these made ones included")
    tasks: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        min_length=1, description="folders below data.root, or FOLDER/TASK; only TASK.train.jsonl is read"
    )
    shots: tuple[Annotated[int, Field(ge=0, le=1000)], ...] = Field(
        (0, 1, 2, 4, 8), min_length=1, description="numbers of demonstrations, equally often"
    )


class PrepareSection(Section):
    """What is done with the texts before they are tokens; `off` switches a step off."""

    cleaning: Annotated[CleaningSection | None, Off] = Field(default=CleaningSection(), description="what is mended")
    filters: Annotated[FiltersSection | None, Off] = Field(default=FiltersSection(), description="what is removed")
    personal_data: Annotated[PersonalDataSection, _OffAsEmpty] = Field(
        default=PersonalDataSection(), description="what is masked"
    )
    exact_duplicates: bool = Field(True, description="a text that stood there before is removed, whatever its source")
    near_duplicates: Annotated[NearDuplicatesSection | None, Off] = Field(
        default=NearDuplicatesSection(), description="of documents that are much alike one is kept"
    )
    decontamination: Annotated[DecontaminationSection | None, Off] = Field(
        default=DecontaminationSection(), description="documents that hold items of the evaluation are removed"
    )
    incontext: Annotated[InContextSection | None, Off] = Field(
        None, description="documents made of few-shot tasks' training files"
    )


class RampSection(Section):
    """A batch that grows: small steps while the gradient is still the same everywhere, large ones later."""

    from_: int = Field(ge=1, alias="from", description="tokens of the first steps; tokens_per_step is a multiple of it")
    tokens: int = Field(ge=1, description="over how many tokens the batch grows, evenly, up to tokens_per_step")
    learning_rate: Literal["none", "square_root"] = Field(
        "none", description="square_root: while the batch is smaller, the rate is too, by the root of its share"
    )


class ReplaySection(Section):
    """Texts of the earlier training among the new ones, against forgetting."""

    train: Sources = Field(description="texts of the mixture that the base was trained on")
    share: float = Field(gt=0, lt=1, description="of all rows that are read, so many are of these")


class SpikesSection(Section):
    """What is done when the loss jumps, or loss or gradient is no number."""

    action: Literal["roll_back", "stop", "ignore"] = Field(
        "roll_back",
        description="back to the last good state, and on with the data behind the spike; or end with an error; or go "
        "on (a loss that is no number ends the stage all the same)",
    )
    deviations: float = Field(
        8.0,
        gt=0,
        description="a loss is a spike where it is above the last 20 losses' median by so many deviations",
    )
    rise: float = Field(0.5, ge=0, description="and by so many nats at least")
    history: int = Field(100, ge=20, description="steps that tell the deviation of a loss from the one before it")
    good_every: int = Field(
        50,
        ge=1,
        description="steps between the states that are kept in memory; one is good once as many steps went well",
    )
    most_in_a_row: int = Field(
        5, ge=1, description="rollbacks without getting past the spike, each skipping twice as much, then it ends"
    )


def _without_what_depth_gives(schema: dict[str, Any]) -> None:
    """What `model.depth` gives may be left out, so an editor must not ask for it; a recipe without it is refused."""
    given = {"sequence_length", *Training._fields}
    schema["required"] = [key for key in schema["required"] if key not in given]


class PretrainSection(Section):
    """Next-token prediction, from random weights or, with `base`, from those of a model."""

    model_config = ConfigDict(json_schema_extra=_without_what_depth_gives)

    train: Sources = Field(description="texts to learn from")
    validation: Sources = Field(description="texts to measure on; several sources are measured one by one as well")
    prepare: Annotated[PrepareSection | None, Off] = Field(
        None, description="clean, filter and deduplicate `train`; `{}` is the standard; default: texts as they are"
    )
    replay: ReplaySection | None = Field(None, description="with `base`: texts of its earlier training among the new")
    tokens: int = Field(ge=1, description="how many tokens to train on in all")
    tokens_per_step: int = Field(ge=1, description="tokens of one optimiser step, over all processes")
    ramp: RampSection | None = Field(None, description="smaller steps at the beginning")
    sequence_length: int = Field(ge=2, description="tokens of one packed row")
    order: Literal["shuffled", "as_given"] = Field(
        "shuffled", description="rows are read in a new random order in each pass, or as they stand"
    )
    isolate_documents: bool = Field(False, description="a packed row's documents don't see each other")
    microbatch_size: int | None = Field(
        None,
        ge=1,
        description="rows of one forward pass; default: all of a step's, or as many as have about 2 GiB of "
        "activations, on a GPU a quarter of its memory",
    )
    gradient_checkpointing: bool = Field(
        False, description="hold less, compute each layer twice", json_schema_extra=_NO_RESULT
    )
    compile: bool = Field(False, description="torch.compile: on a GPU a third faster or more, after minutes of work")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: for the matrices of the layers, AdamW for the rest; needs fewer steps"
    )
    learning_rate: float = Field(gt=0, le=100, description="peak learning rate")
    schedule: ScheduleName = Field(
        "cosine", description="from the peak to the floor: cosine, linear, wsd (late, by the root), or not at all"
    )
    warmup: float = Field(0.02, ge=0, lt=1, description="share of the tokens with a rising learning rate")
    decay: float = Field(0.2, gt=0, le=1, description="share of the tokens, the last ones, in which wsd's rate falls")
    final_learning_rate: float = Field(0.1, ge=0, le=1, description="the floor, as a share of the peak")
    weight_decay: float = Field(0.1, ge=0, description="on matrices only")
    gradient_clipping: float = Field(1.0, gt=0, description="largest norm of the gradient")
    z_loss: float = Field(
        0.0, ge=0, description="weight of the squared log of the softmax's denominator; customary: 1e-4"
    )
    spikes: SpikesSection = Field(default=SpikesSection(), description="what is done when the loss jumps")
    validate_every: int = Field(200, ge=1, description="steps between validations", json_schema_extra=_NO_RESULT)
    log_every: int = Field(10, ge=1, description="steps between lines in metrics.jsonl", json_schema_extra=_NO_RESULT)

    @model_validator(mode="after")
    def _divides(self) -> PretrainSection:
        if self.tokens_per_step % self.sequence_length:
            raise ValueError(
                f"tokens_per_step {self.tokens_per_step} is not a multiple of sequence_length {self.sequence_length}"
            )
        if self.ramp and (self.ramp.from_ % self.sequence_length or self.tokens_per_step % self.ramp.from_):
            raise ValueError(
                f"ramp.from {self.ramp.from_} must be a multiple of sequence_length {self.sequence_length} that "
                f"divides tokens_per_step {self.tokens_per_step}"
            )
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(f"warmup {self.warmup} and decay {self.decay} together are more than all tokens")
        names = [str(source) for source in self.validation]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"validation: two sources are called {twice}; give them names with name:")
        return self


class Sampling(Section):
    """How responses are drawn from a model."""

    max_tokens: int = Field(ge=1, le=2**20, description="longest response in tokens, its end token included")
    temperature: float = Field(1.0, ge=0.01, le=100, description="divides the logits")
    top_k: int = Field(0, ge=0, description="only so many most likely tokens are drawn; 0: all")
    top_p: float = Field(1.0, gt=0, le=1, description="only the most likely tokens that together reach this are drawn")
    min_tokens: int = Field(1, ge=1, description="a response can't end before it has so many tokens, the end included")
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="texts that end a response, as the end token does"
    )

    @model_validator(mode="after")
    def _least_below_most(self) -> Sampling:
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}")
        return self


class LoraSection(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) in place of the whole weights, through PEFT."""

    rank: int = Field(16, ge=1, le=4096, description="inner size of each adapter")
    alpha: float = Field(32.0, gt=0, description="the adapters' output is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout in front of the adapters")
    targets: tuple[str, ...] = Field(
        ("all-linear",),
        min_length=1,
        description="modules that get an adapter, by the last part of their names; all-linear: all but the output head",
    )


class EarlyStoppingSection(Section):
    """Ends a stage when its validation loss no longer falls, and keeps the weights with which it was lowest."""

    every: int = Field(50, ge=1, description="steps between the validations that decide")
    patience: int = Field(3, ge=1, description="validations without a new lowest loss after which the stage ends")
    min_gain: float = Field(0.0, ge=0, description="a loss counts as lower when it is lower by more than this (nats)")


TooLong = Literal["drop", "truncate", "error"]


class SftSection(Section):
    """Supervised fine-tuning on conversations, the loss on the assistant's turns only."""

    train: Sources = Field(description="conversations to learn from")
    validation: Sources = Field(description="conversations to measure on")
    chat_template: str = Field(
        "rlhf", min_length=1, description="for a base that has none: rlhf, chatml, or a Jinja file below data.root"
    )
    replace_chat_template: bool = Field(False, description="give the base `chat_template` even if it has one")
    end_token: str | None = Field(
        None, min_length=1, description="what ends the assistant's turn in the template; default: the tokenizer's EOS"
    )
    loss_on: Literal["all", "last"] = Field("all", description="learn every assistant turn, or the last one only")
    steps: int = Field(ge=1, description="optimiser steps, at most")
    dialogues_per_step: int = Field(ge=1, description="conversations of one optimiser step, over all processes")
    microbatch_size: int | None = Field(None, ge=1, description="conversations of one forward pass; default: all")
    packing: bool = Field(
        False, description="lay the conversations of a forward pass end to end, isolated, instead of padding them"
    )
    max_tokens: int = Field(ge=8, description="longest conversation in tokens")
    too_long: TooLong = Field(
        "drop", description="longer conversations are dropped, truncated at their end, or an error; always counted"
    )
    learning_rate: float = Field(gt=0, le=100, description="peak learning rate of AdamW, cosine to 10 %")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps with a rising learning rate")
    weight_decay: float = Field(0.0, ge=0, description="on matrices only")
    gradient_clipping: float = Field(1.0, gt=0, description="largest norm of the gradient")
    lora: LoraSection | None = Field(None, description="train low-rank adapters instead of all weights")
    early_stopping: EarlyStoppingSection | None = Field(None, description="end when the validation loss stops falling")
    sampling: Sampling = Field(description="how responses are drawn to see whether they end by themselves")
    sampled_prompts: int = Field(128, ge=1, description="validation prompts to draw responses for")
    ended_warning: float = Field(
        0.9, ge=0, le=1, description="warn if fewer of them end by themselves", json_schema_extra=_NO_RESULT
    )
    validate_every: int = Field(100, ge=1, description="steps between validations", json_schema_extra=_NO_RESULT)
    log_every: int = Field(10, ge=1, description="steps between lines in metrics.jsonl", json_schema_extra=_NO_RESULT)


class SamplerSection(Section):
    """A model that responses are drawn from."""

    model: str = Field("sft", description="`sft`: the model that the stage stands on; else a directory or hub id")
    temperature: float | None = Field(None, ge=0.01, le=100, description="divides the logits; default: sampling's")


class CollectSection(Section):
    """Comparisons made here: responses are drawn to prompts, and a labeller compares every two of a prompt."""

    prompts: Sources = Field((Source(builtin="tinyworld"),), description="prompts; some of them are held out as test")
    train_prompts: int = Field(ge=1, description="training prompts, at most as many as there are")
    test_prompts: int = Field(ge=1, description="held-out prompts, at most as many as there are")
    responses_per_prompt: int = Field(2, ge=2, description="responses of a prompt; all different ones are compared")
    samplers: tuple[SamplerSection, ...] = Field(
        (SamplerSection(),), min_length=1, description="the models that answer; a prompt's responses go round them"
    )
    sampling: Sampling = Field(description="how the responses are drawn")
    labeller: str = Field(
        "tinyworld",
        description="who compares: tinyworld, person (`rlhf label`), file:PATH, or python:MODULE:FUNCTION",
    )

    @model_validator(mode="after")
    def _labeller_is_known(self) -> CollectSection:
        kind, _, rest = self.labeller.partition(":")
        if kind not in ("tinyworld", "person", "file", "python") or (kind in ("file", "python")) != bool(rest):
            raise ValueError(
                f"labeller {self.labeller!r}: known are tinyworld, person, file:PATH, python:MODULE:FUNCTION and "
                "python:FILE.py:FUNCTION"
            )
        if self.labeller == "tinyworld" and any(source.builtin is None for source in self.prompts):
            raise ValueError("the labeller tinyworld knows its own prompts only; name another for prompts of yours")
        if len(self.samplers) > self.responses_per_prompt:
            raise ValueError(
                f"responses_per_prompt is {self.responses_per_prompt}, so not all of the {len(self.samplers)} samplers "
                "would answer a prompt"
            )
        return self


class RequireSection(Section):
    """What a judge must reach on held-out comparisons, or the chain stops before PPO learns from it."""

    accuracy: float | None = Field(None, ge=0, le=1, description="at least this accuracy")
    gold_accuracy: float | None = Field(None, ge=0, le=1, description="at least this accuracy on the known truth")
    beats_length: bool = Field(False, description="more accurate than preferring the longer response")
    calibration_error: float | None = Field(
        None, ge=0, le=1, description="at most this expected calibration error, after its temperature"
    )


class RewardSection(Section):
    """A reward model: Bradley-Terry on comparisons of two responses to the same prompt."""

    from_: str | None = Field(None, alias="from", description="an existing judge's directory; nothing is trained")
    start: str | None = Field(
        None, description="directory or hub id that training starts from; default: the model that the stage stands on"
    )
    collect: CollectSection | None = Field(None, description="draw responses and have them compared")
    train: tuple[Source, ...] = Field((), description="comparisons from files to learn from")
    test: tuple[Source, ...] = Field((), description="comparisons from files to measure on")
    epochs: float = Field(1.0, gt=0, description="passes over the comparisons")
    pairs_per_step: int = Field(32, ge=1, description="comparisons of one optimiser step, over all processes")
    microbatch_size: int | None = Field(None, ge=1, description="comparisons of one forward pass; default: all")
    max_tokens: int = Field(512, ge=8, description="longest prompt with response in tokens")
    too_long: TooLong = Field(
        "drop", description="longer pairs are dropped, their prompts truncated at the start, or an error; counted"
    )
    learning_rate: float = Field(1e-4, gt=0, le=100, description="peak learning rate of AdamW, cosine to 10 %")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps with a rising learning rate")
    weight_decay: float = Field(0.0, ge=0, description="on matrices only")
    gradient_clipping: float = Field(1.0, gt=0, description="largest norm of the gradient")
    margin_scale: float = Field(1.0, ge=0, description="times the rows' own `margin`; 0 leaves margins out")
    centering: float = Field(0.0, ge=0, description="weight of the squared sum of a pair's scores (Eisenstein 2023)")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="assumed share of labels that are the wrong way round"
    )
    heads: int = Field(
        1, ge=1, le=64, description="score heads, each on its own bootstrap of the pairs: mean and spread"
    )
    lora: LoraSection | None = Field(None, description="train low-rank adapters and the head instead of all weights")
    normalisation_prompts: int = Field(
        256, ge=2, description="prompts whose responses by the reference give the score its mean 0 and variance 1"
    )
    sampling: Sampling | None = Field(None, description="how those responses are drawn; default: collect's or ppo's")
    gold_margin: float = Field(0.2, ge=0, description="gold_accuracy counts pairs whose gold differs by at least this")
    require: RequireSection = Field(
        default=RequireSection(), description="the gate before PPO", json_schema_extra=_NO_RESULT
    )
    validate_every: int = Field(100, ge=1, description="steps between validations", json_schema_extra=_NO_RESULT)
    log_every: int = Field(10, ge=1, description="steps between lines in metrics.jsonl", json_schema_extra=_NO_RESULT)

    @model_validator(mode="after")
    def _has_comparisons(self) -> RewardSection:
        if any(source.builtin for source in (*self.train, *self.test)):
            raise ValueError("the built-in world has no comparisons in store; `collect` makes them")
        if self.from_ is None and self.collect is None and not (self.train and self.test):
            raise ValueError("needs comparisons: `collect`, or `train` and `test`, or an existing judge in `from`")
        if self.from_ is not None and self.start is not None:
            raise ValueError("either `from` (an existing judge) or `start` (what a new one starts from), not both")
        return self


class JudgeSection(Section):
    """One part of what PPO optimises: exactly one of `model` and `python`."""

    name: str | None = Field(None, min_length=1, description="what it is called in metrics; default: after its source")
    model: str | None = Field(
        None, description="`reward`: the reward stage's model; else a sequence classifier's directory or hub id"
    )
    python: str | None = Field(
        None,
        description="MODULE:FUNCTION or FILE.py:FUNCTION (below data.root): from a list of {prompt: messages, "
        "response: text} to a list of scores",
    )
    weight: float = Field(1.0, description="times its score in the sum; negative: a penalty; 0: only logged")
    label: str | StrictInt | None = Field(
        None, description="which output counts, where a classifier has several (name or number)"
    )
    chat_template: str | None = Field(None, description="Jinja file for the classifier; default: its tokenizer's own")
    uncertainty_penalty: float = Field(
        0.0, ge=0, description="times the spread of an ensemble's heads, taken from its mean"
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> JudgeSection:
        if (self.model is None) == (self.python is None):
            raise ValueError("a judge has exactly one of the keys model, python")
        if self.python and (self.label is not None or self.chat_template or self.uncertainty_penalty):
            raise ValueError("label, chat_template and uncertainty_penalty are for a judge with `model`")
        return self

    @property
    def title(self) -> str:
        """What it is called in metrics."""
        if self.name:
            return self.name
        if self.python:
            return self.python.rpartition(":")[2]
        assert self.model is not None
        path = Path(self.model)
        ours = path.name == "model" and len(path.parts) > 2  # RUN/STAGE/model
        return "-".join(path.parts[-3:-1]) if ours else path.name


class KlSection(Section):
    """What keeps the policy near the reference."""

    coefficient: float = Field(0.05, ge=0, description="nats of KL cost this much score")
    estimator: Literal["k1", "k2", "k3"] = Field(
        "k1", description="of each token's KL: log p - log q, half its square, or q/p - 1 - log q/p (Schulman 2020)"
    )
    placement: Literal["reward", "loss"] = Field(
        "reward", description="part of each token's reward, or a term of the loss (k2 or k3)"
    )
    target: float | None = Field(
        None,
        gt=0,
        description="nats an episode: the coefficient adapts until the KL is this (Ziegler et al. 2019); each update "
        "times 1 + e * episodes / horizon, where e = KL / target - 1, cut to within 0.2",
    )
    horizon: int = Field(10_000, ge=1, description="episodes over which the coefficient adapts, with `target`")

    @model_validator(mode="after")
    def _has_a_gradient(self) -> KlSection:
        if self.placement == "loss" and self.estimator == "k1":
            raise ValueError("in the loss k1 has a gradient of mean zero; take estimator: k2 or k3")
        if self.target is not None and self.coefficient == 0:
            raise ValueError("a coefficient of 0 can't adapt, since it changes by a factor; begin with another")
        return self


class ScoreSection(Section):
    """What is done with the judge's scores before they become rewards."""

    scaling: Literal["none", "running"] = Field(
        "none", description="running: divided by the standard deviation of all scores so far"
    )
    clip: float | None = Field(None, gt=0, description="scores, after scaling, are cut to within plus and minus this")


class PtxSection(Section):
    """Pretraining texts mixed into the policy's loss, PPO-ptx (Ouyang et al. 2022, arXiv:2203.02155)."""

    train: Sources = Field(description="texts")
    coefficient: float = Field(1.0, gt=0, description="weight of their loss, nats per token, beside the policy's")
    tokens_per_minibatch: int = Field(1024, ge=2, description="tokens of text in every optimiser step")
    sequence_length: int = Field(128, ge=2, description="tokens of one row")

    @model_validator(mode="after")
    def _divides(self) -> PtxSection:
        if self.tokens_per_minibatch % self.sequence_length:
            raise ValueError("tokens_per_minibatch is not a multiple of sequence_length")
        if any(source.builtin and source.rows is None for source in self.train):
            raise ValueError("the built-in world's texts never end; say how many with rows:")
        return self


class KeepSection(Section):
    """Which of the policies that were measured on validation prompts is kept. None of the rules looks at gold."""

    rule: Literal["last", "score", "second_judge"] | None = Field(
        None, description="the last one, or the best by score or by the second judge; default: the best judge there is"
    )
    kl_budget: float | None = Field(
        None, gt=0, description="nats an episode: a policy further from the reference is not kept"
    )


class DoctorSection(Section):
    """What is looked for while PPO learns, and what is done then. An interrupted run goes on under changed orders."""

    action: Literal["warn", "stop", "back_off"] = Field(
        "warn",
        description="back_off: the last good checkpoint is restored and the learning rates are halved",
        json_schema_extra=_NO_RESULT,
    )
    off: tuple[str, ...] = Field(
        (), description="names of findings that are not looked for", json_schema_extra=_NO_RESULT
    )
    most_back_offs: int = Field(3, ge=1, description="after so many it stops", json_schema_extra=_NO_RESULT)


class PpoSection(Section):
    """Proximal policy optimisation against a judge."""

    prompts: Sources = Field(description="prompts to learn on")
    validation_prompts: Sources | None = Field(
        None,
        description="prompts to measure on in between, by which the policy that is kept is chosen; default: a tenth of "
        "`prompts`, 128 at most, that is not learned on",
    )
    test_prompts: Sources = Field(description="prompts to measure on, before and after")
    judge: tuple[JudgeSection, ...] = Field(
        (JudgeSection(model="reward"),), min_length=1, description="what gives the scores: a weighted sum of these"
    )
    second_judge: tuple[JudgeSection, ...] = Field(
        (), description="a judge that is never optimised, only asked on validation and test prompts"
    )
    layout: Literal["full", "shared", "adapters"] = Field(
        "full",
        description="full: four models; shared: policy and critic on one trunk; adapters: policy, critic and a reward "
        "model trained with lora are adapters on one frozen base",
    )
    lora: LoraSection = Field(default=LoraSection(), description="the adapters of layout `adapters`; no others use it")
    engine: Literal["auto", "cache", "generate"] = Field(
        "auto", description="what draws responses: our loop over the KV cache, or transformers.generate"
    )
    rollout_batch_size: int = Field(
        256,
        ge=1,
        description="responses drawn at a time at most; fewer where a KV cache of half a GiB, or a quarter of an "
        "accelerator's memory, holds no more",
    )
    updates: int = Field(
        ge=1,
        description="rollout and optimisation, this many times; the schedule depends on it, so another number begins "
        "the stage anew",
    )
    episodes_per_update: int = Field(ge=1, description="prompts with a response in one update, over all processes")
    epochs: int = Field(2, ge=1, description="passes over an update's episodes")
    minibatches: int = Field(4, ge=1, description="optimiser steps of one epoch")
    microbatch_size: int | None = Field(None, ge=1, description="episodes of one forward pass at most")
    microbatch_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens of one forward pass at most; default: those of about 256 MiB of activations, on a GPU of a "
        "sixteenth of its memory",
    )
    sampling: Sampling = Field(description="how responses are drawn; the policy learns as the distribution drawn from")
    learning_rate: float = Field(gt=0, le=100, description="of the policy, Adam")
    critic_learning_rate: float | None = Field(
        None, gt=0, le=100, description="of the critic; default: 5 times the policy's"
    )
    schedule: Literal["linear", "constant"] = Field(
        "linear", description="of both learning rates: falling from update to update, towards 0 after the last; or not"
    )
    critic_from: Literal["reward", "policy"] | None = Field(
        None, description="the weights that the critic starts from; default: the reward model where it fits"
    )
    critic_warmup: int | None = Field(
        None,
        ge=0,
        description="first updates in which only the critic learns; default: none; in layout shared, whose critic "
        "knows nothing at first, a tenth of the updates, 2 at most",
    )
    kl: KlSection = Field(default=KlSection(), description="what keeps the policy near the reference")
    score: ScoreSection = Field(default=ScoreSection(), description="scaling and clipping of scores")
    clip_ratio: float = Field(0.2, gt=0, description="epsilon of the clipped policy loss")
    dual_clip: float | None = Field(
        None, gt=1, description="bound of the ratio where the advantage is negative (Ye et al. 2020, arXiv:1912.09729)"
    )
    clip_value: float = Field(0.2, gt=0, description="largest move of a value in one update, in score units")
    value_coefficient: float | None = Field(
        None,
        ge=0,
        description="weight of the value loss; default: 0.5, in layout shared, where it moves the policy's trunk, 0.01",
    )
    entropy_coefficient: float = Field(0.0, ge=0, description="weight of the entropy bonus, per nat")
    stop_kl: float | None = Field(
        None, gt=0, description="nats a token: an update ends once the policy is so far from the one that drew"
    )
    ptx: PtxSection | None = Field(None, description="pretraining texts mixed into the policy's loss")
    discount: float = Field(1.0, gt=0, le=1, description="gamma")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="lambda of generalised advantage estimation")
    gradient_clipping: float = Field(1.0, gt=0, description="largest norm of the gradient, policy and critic apart")
    no_end_penalty: float = Field(1.0, ge=0, description="taken from the score of a response that does not end")
    no_end_score: float | None = Field(
        None, description="the score of a response that does not end, whatever the judge says (Stiennon et al. 2020)"
    )
    validate_every: int = Field(5, ge=1, description="updates between measurements on validation prompts")
    keep: KeepSection = Field(default=KeepSection(), description="which policy is kept")
    best_of: int = Field(
        16, ge=0, description="responses a validation prompt for best-of-n, the yardstick of the curve; 0: none"
    )
    doctor: DoctorSection = Field(default=DoctorSection(), description="what is done about an update that goes wrong")
    log_every: int = Field(1, ge=1, description="updates between lines in metrics.jsonl", json_schema_extra=_NO_RESULT)
    samples_every: int = Field(10, ge=1, description="updates between examples shown", json_schema_extra=_NO_RESULT)

    @model_validator(mode="after")
    def _divides(self) -> PpoSection:
        if self.critic_warmup is not None and self.critic_warmup >= self.updates:
            raise ValueError(f"critic_warmup {self.critic_warmup} leaves none of {self.updates} updates to the policy")
        if self.episodes_per_update % self.minibatches:
            raise ValueError(
                f"episodes_per_update {self.episodes_per_update} is not a multiple of minibatches {self.minibatches}"
            )
        if self.kl.target is not None and self.kl.horizon < self.episodes_per_update:
            raise ValueError(
                f"kl.horizon {self.kl.horizon} is less than an update's {self.episodes_per_update} episodes: the "
                "coefficient would not adapt but jump"
            )
        for key, judges in (("judge", self.judge), ("second_judge", self.second_judge)):
            titles = [judge.title for judge in judges]
            names = {*titles, *(f"{title}_{figure}" for title in titles for figure in ("spread", "cut"))}
            if len(names) < 3 * len(titles):
                raise ValueError(f"{key}: two parts have one name in metrics ({', '.join(titles)}); give them names")
        if self.keep.rule == "second_judge" and not self.second_judge:
            raise ValueError("keep.rule is second_judge, but there is no second_judge")
        return self


class CheckpointSection(Section):
    """When a stage that trains writes a checkpoint; it always writes one when it is interrupted, and at its end."""

    every_minutes: float = Field(5.0, gt=0, le=1e6, description="minutes between checkpoints")
    every_steps: int | None = Field(None, ge=1, description="and after every so many steps (in ppo: updates)")
    keep: int = Field(2, ge=1, description="how many are kept of each stage, the newest ones")


class FewShotSection(Section):
    """In-context accuracy."""

    tasks: tuple[str, ...] = Field(
        ("tinyworld",),
        description="`tinyworld`, or folders of TASK.test.jsonl, TASK.train.jsonl and TASK.yaml; FOLDER/TASK for one",
    )
    shots: tuple[Annotated[int, Field(ge=0, le=1000)], ...] = Field(
        (0, 1, 2, 4, 8), min_length=1, description="numbers of demonstrations"
    )
    items: int = Field(200, ge=1, description="items of a task, at most")
    draws: int = Field(
        1,
        ge=1,
        le=100,
        description="so many choices of demonstrations from files: the first ones, then random ones, in random order",
    )
    begin: bool = Field(True, description="whether BOS stands before every prompt")
    calibrate: bool = Field(
        False,
        description="also acc_calibrated: choices over their probability where nothing is asked (Zhao et al. 2021)",
    )

    @field_validator("shots")
    @classmethod
    def _once_each(cls, shots: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(shots)) < len(shots):
            raise ValueError("one of the numbers is there twice")
        return shots


class MemorisationSection(Section):
    """Whether models go on with training documents word for word."""

    repeated: int = Field(100, ge=0, description="documents: those that stand in the training texts most often")
    random: int = Field(200, ge=0, description="and so many random ones; as many held-out ones are the control")
    prompt_tokens: int = Field(32, ge=1, description="tokens of a document that are read, at most half of it")
    continuation_tokens: int = Field(32, ge=1, description="tokens that must be the document's, as far as it goes")


class HarnessSection(Section):
    """Tasks of lm-evaluation-harness, an optional extra: pip install 'rlhf[harness]'."""

    tasks: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="names of its tasks, groups or tags, or of tasks of your own in `include`"
    )
    include: str | None = Field(None, min_length=1, description="folder below data.root of your own task YAML files")
    shots: int | None = Field(None, ge=0, le=1000, description="demonstrations; default: each task's own number")
    items: int | None = Field(None, ge=1, description="items of a task, at most; default: all")

    @model_validator(mode="after")
    def _makes_sense(self) -> HarnessSection:
        if self.include and not self.tasks:
            raise ValueError("include: it is of no use without tasks; name those that are to be asked")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError("tasks: one of them is there twice")
        return self


class EvaluateSection(Section):
    """What every model of the chain is measured by; without a list the measure that needs it is left out."""

    texts: tuple[Source, ...] = Field((), description="held-out documents")
    stride: int | None = Field(
        None,
        ge=1,
        description="tokens that a window behind the first predicts; fewer see more before them; default: as many as "
        "it reads",
    )
    special_tokens: Literal["text", "tokens"] = Field(
        "text",
        description="what looks like a special token in a text or prompt stays text, as in training; or is the token, "
        "as the tokenizer itself and other harnesses read it",
    )
    fewshot: FewShotSection = Field(default=FewShotSection(), description="in-context accuracy")
    harness: HarnessSection = Field(default=HarnessSection(), description="tasks of lm-evaluation-harness")
    prompts: tuple[Source, ...] = Field((), description="prompts that the models answer: behaviour, win rates")
    responses_per_prompt: int = Field(
        2, ge=1, le=64, description="responses of each model; with 2 or more a liking for length is told from quality"
    )
    sampling: Sampling | None = Field(None, description="how they are drawn; default: ppo's, else sft's")
    judge: tuple[JudgeSection, ...] = Field(
        (), description="what says which response is better, a weighted sum; default: ppo.judge where ppo is a stage"
    )
    comparisons: tuple[Source, ...] = Field((), description="comparisons on which each judge's accuracy is measured")
    training: tuple[Source, ...] = Field(
        (),
        description="texts in which the tasks' items are looked for, and which may be memorised; default: what the "
        "stages pretrain and sft are trained on",
    )
    memorisation: MemorisationSection = Field(
        default=MemorisationSection(), description="which training documents are tried"
    )

    @model_validator(mode="after")
    def _measures(self) -> EvaluateSection:
        lists = ("texts", "prompts", "comparisons", "training")
        if not (self.fewshot.tasks or self.harness.tasks or any(getattr(self, name) for name in lists)):
            raise ValueError(f"nothing to measure: neither fewshot.tasks nor harness.tasks, {', '.join(lists)}")
        if self.comparisons and any(source.builtin for source in self.comparisons):
            raise ValueError("comparisons: the built-in world has none in store; the reward stage makes them")
        return self


Trackers = Annotated[
    tuple[TrackerName, ...],
    BeforeValidator(
        lambda given: [given] if isinstance(given, str) else given,
        json_schema_input_type=TrackerName | tuple[TrackerName, ...],
    ),
]
RunName = Annotated[str, AfterValidator(lambda name: check_name(name))]


class Recipe(Section):
    """The whole chain: what it is made from and how."""

    name: RunName = Field(description="the run's directory below --runs-dir", json_schema_extra=_NO_RESULT)
    description: str = Field("", description="what it is for, in a line", json_schema_extra=_NO_RESULT)
    needs: str = Field("", description="hardware and data", json_schema_extra=_NO_RESULT)
    takes: str = Field("", description="time and memory", json_schema_extra=_NO_RESULT)
    seed: int = Field(1, ge=0, lt=2**32, description="what every draw of every stage depends on")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="of what is computed in training; weights are float32. auto: bfloat16 on a GPU that has it, "
        "float32 elsewhere (a CPU without hardware for bfloat16 is many times slower with it, and refused)",
    )
    threads: int = Field(0, ge=0, description="CPU threads of a process; 0: all cores", json_schema_extra=_NO_RESULT)
    checkpoints: CheckpointSection = Field(
        default=CheckpointSection(), description="what a killed run goes on from", json_schema_extra=_NO_RESULT
    )
    track: Trackers = Field(
        (), description="who gets the figures of metrics.jsonl as well, as live curves", json_schema_extra=_NO_RESULT
    )
    stages: Annotated[tuple[StageName, ...], Field(min_length=1)] = Field(STAGES, description="which stages, in order")
    base: str | None = Field(None, description="directory or hub id of a causal LM, for a chain without pretrain")
    trust_remote_code: tuple[str, ...] = Field(
        (), description="models, as `base` or `reward.from` name them, whose own Python code may be run"
    )
    data: DataSection = Field(default=DataSection(), description="how data files are found and read")
    tokenizer: TokenizerSection | None = Field(None, description="the tokenizer stage")
    model: ModelSection = Field(default=ModelSection(), description="the model that pretrain starts")
    pretrain: PretrainSection | None = Field(None, description="the pretrain stage")
    sft: SftSection | None = Field(None, description="the sft stage")
    reward: RewardSection | None = Field(None, description="the reward stage")
    ppo: PpoSection | None = Field(None, description="the ppo stage")
    evaluate: EvaluateSection | None = Field(None, description="the evaluate stage")

    @model_validator(mode="before")
    @classmethod
    def _depth_fills(cls, values: Any) -> Any:
        return _filled_from_depth(values) if isinstance(values, dict) else values

    def _check_beginning(self) -> None:
        """Where the chain begins: at a tokenizer and random weights, or at a base. Raises ValueError for neither."""
        both = {"tokenizer", "pretrain"} <= set(self.stages)
        if self.base is None:
            if not both and self.stages != ("tokenizer",):
                raise ValueError(
                    "the stages tokenizer and pretrain come together, or `base` names the model to go on from"
                    if {"tokenizer", "pretrain"} & set(self.stages)
                    else "`base` names the model to begin with, since pretrain is not among the stages"
                )
            if self.pretrain and self.pretrain.replay and "pretrain" in self.stages:
                raise ValueError("pretrain.replay: without `base` there is no earlier training to replay")
            return
        if "tokenizer" in self.stages:
            raise ValueError("either `base`, whose tokenizer is kept, or the stage tokenizer, not both")
        if "pretrain" in self.stages and self.model != ModelSection():
            raise ValueError("model: with `base` the architecture is the base's; leave the section out")

    @model_validator(mode="after")
    def _chain_holds(self) -> Recipe:
        order = [STAGES.index(stage) for stage in self.stages]
        if order != sorted(set(order)):
            raise ValueError(f"stages: each once, and in this order: {', '.join(STAGES)}")
        for stage in self.stages:
            if getattr(self, stage) is None:
                raise ValueError(f"the stage {stage} is in `stages` but the recipe has no section `{stage}`")
        self._check_beginning()
        if "pretrain" in self.stages and self.base is None:
            assert self.pretrain is not None
            longest = {"pretrain.sequence_length": self.pretrain.sequence_length}
            if "sft" in self.stages and self.sft:
                longest["sft.max_tokens"] = self.sft.max_tokens
            for key, tokens in longest.items():
                if tokens > self.model.context:
                    raise ValueError(f"{key} is {tokens}, more than model.context, which is {self.model.context}")
        if "ppo" in self.stages and "reward" not in self.stages:
            assert self.ppo is not None
            if any(judge.model == "reward" for judge in (*self.ppo.judge, *self.ppo.second_judge)):
                raise ValueError(
                    "ppo needs a judge: add the stage reward (`reward: {from: DIR}` takes an existing one), or name "
                    "others in ppo.judge"
                )
            if self.ppo.critic_from == "reward":
                raise ValueError("ppo.critic_from: there is no stage reward to start the critic from")
        judges = self.evaluate.judge if self.evaluate and "evaluate" in self.stages else ()
        if "reward" not in self.stages and any(judge.model == "reward" for judge in judges):
            raise ValueError("evaluate.judge: there is no stage reward; name a directory")
        if "evaluate" in self.stages and self.evaluate and self.evaluate.comparisons and not evaluating_judges(self)[1]:
            raise ValueError("evaluate.comparisons: there is no judge to try on them; name one in evaluate.judge")
        return self


def _filled_from_depth(values: dict[str, Any]) -> dict[str, Any]:
    """The plain values of a recipe with what follows from `model.depth` where nobody has said otherwise."""
    model = values.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("depth"), int) or not 1 <= model["depth"] <= 512:
        return values
    shape = shape_of_depth(model["depth"])
    model = {**shape._asdict(), **_heads_of_width(model.get("width")), **model}
    pretrain, tokenizer = values.get("pretrain"), values.get("tokenizer")
    if not isinstance(pretrain, dict):
        return {**values, "model": model}
    filled = {"sequence_length": model["context"], **pretrain}
    try:
        vocabulary = TokenizerSection.model_fields["vocab_size"].default
        vocabulary = int((tokenizer or {}).get("vocab_size", vocabulary))
        width, gated = int(model["width"]), model.get("architecture") != "gpt2"
        mlp = int(model.get("mlp_width") or (round(width * 8 / 3 / 32) * 32 if gated else 4 * width))
        kv_share = int(model.get("kv_heads") or model["heads"]) / int(model["heads"])
        inner = inner_parameters(int(model["layers"]), width, mlp, gated, kv_share)
        training = training_of(inner, vocabulary * width, int(filled["sequence_length"]), filled.get("tokens"))
    except (TypeError, ValueError, ArithmeticError):  # something that its own section will refuse
        return {**values, "model": model}
    return {**values, "model": model, "pretrain": {**training._asdict(), **filled}}


def _heads_of_width(width: Any) -> dict[str, int]:
    """The heads of a width that somebody has said, where they come out even."""
    if not isinstance(width, int) or width < HEAD_CHANNELS or width % HEAD_CHANNELS:
        return {}
    return {"heads": width // HEAD_CHANNELS}


def evaluating_judges(recipe: Recipe) -> tuple[str, tuple[JudgeSection, ...]]:
    """The judges of the evaluate stage, and the key that names them."""
    if recipe.evaluate and recipe.evaluate.judge:
        return "evaluate.judge", recipe.evaluate.judge
    return "ppo.judge", recipe.ppo.judge if recipe.ppo and "ppo" in recipe.stages else ()


def training_sources(recipe: Recipe) -> dict[str, tuple[Source, ...]]:
    """What the evaluate stage looks into for its tasks' items, by the key that names it."""
    if recipe.evaluate and recipe.evaluate.training:
        return {"evaluate.training": recipe.evaluate.training}
    found: dict[str, tuple[Source, ...]] = {}
    if recipe.pretrain and "pretrain" in recipe.stages:
        found["pretrain.train"] = recipe.pretrain.train
        if recipe.pretrain.replay:
            found["pretrain.replay.train"] = recipe.pretrain.replay.train
    if recipe.sft and "sft" in recipe.stages:
        found["sft.train"] = recipe.sft.train
    return found


def evaluating_sampling(recipe: Recipe) -> Sampling:
    """How the evaluate stage draws responses: as it says itself, or as ppo or sft does."""
    for section in (recipe.evaluate, recipe.ppo, recipe.sft):
        if section and section.sampling:
            return section.sampling
    return Sampling(max_tokens=256)


def microbatches(recipe: Recipe, stage: StageName, processes: int) -> tuple[int, int]:
    """(rows of one forward pass on one process, forward passes of one optimiser step) of a stage that trains.

    Raises RecipeError where the rows of a step don't divide evenly; nothing is rounded in silence. (In ppo rows are as
    long as the policy makes them, and any number of them is shared.)
    """
    section: Any = getattr(recipe, stage)
    if stage == "pretrain":
        rows, what = section.tokens_per_step // section.sequence_length, "tokens_per_step / sequence_length"
        first = section.ramp.from_ // section.sequence_length if section.ramp else rows
        if first % processes:
            raise RecipeError(
                f"pretrain: {'ramp.from' if section.ramp else 'tokens_per_step'} / sequence_length is {first}, which "
                f"is not a multiple of the {processes} processes"
            )
    else:
        what = "dialogues_per_step" if stage == "sft" else "pairs_per_step"
        rows = getattr(section, what)
    if rows % processes:
        raise RecipeError(f"{stage}: {what} is {rows}, which is not a multiple of the {processes} processes")
    mine = rows // processes
    size = section.microbatch_size or mine
    if mine % size:
        share = f"the share of each of {processes} processes in " if processes > 1 else ""
        raise RecipeError(f"{stage}.microbatch_size: {size} does not divide {mine}, {share}{what}")
    return size, mine // size


def check_name(name: str) -> str:
    """The name of a run or a person, if it can be a file's. Raises ValueError where it can't."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) or name.endswith("."):
        raise ValueError("a name has letters, digits, '.', '_' and '-', begins with a letter or digit, no '/'")
    return name


# What a stage stands on

_UPSTREAM: dict[str, tuple[StageName, ...]] = {
    "tokenizer": (),
    "pretrain": ("tokenizer",),
    "sft": ("pretrain",),
    "reward": ("sft",),
    "ppo": ("sft", "reward"),
    "evaluate": ("pretrain", "sft", "ppo"),
}


def upstream(recipe: Recipe, stage: StageName) -> tuple[StageName, ...]:
    """The stages of this recipe whose models the stage reads."""
    judged = stage == "evaluate" and any(judge.model == "reward" for judge in evaluating_judges(recipe)[1])
    names = {*_UPSTREAM[stage], *(("reward",) if judged else ())}
    return tuple(name for name in STAGES if name in names and name in recipe.stages)


def needs_base(recipe: Recipe, stage: StageName) -> bool:
    """Whether the stage reads the recipe's `base` itself."""
    if recipe.base is None:
        return False
    if stage in ("pretrain", "evaluate"):
        return stage == "pretrain" or "pretrain" not in recipe.stages
    return stage in ("sft", "reward", "ppo") and not {"pretrain", "sft"} & set(upstream(recipe, stage))


class External(NamedTuple):
    """Something from outside the run's directory and the data sources that a stage reads."""

    key: str  # of the recipe
    value: str  # directory, hub id, file, or MODULE:FUNCTION
    kind: Literal["causal_lm", "judge", "base", "python", "file"]


def externals(recipe: Recipe, stage: StageName) -> list[External]:
    """The models, files and Python functions that a stage's section names."""
    found: list[External] = []
    if needs_base(recipe, stage) and recipe.base:
        found.append(External("base", recipe.base, "causal_lm"))
    if stage == "sft" and recipe.sft and recipe.sft.chat_template not in ("rlhf", "chatml"):
        found.append(External("sft.chat_template", recipe.sft.chat_template, "file"))
    if stage == "reward" and recipe.reward:
        section = recipe.reward
        if section.from_:
            found.append(External("reward.from", section.from_, "judge"))
        if section.start:
            found.append(External("reward.start", section.start, "base"))
        if section.collect:
            kind, _, rest = section.collect.labeller.partition(":")
            if kind in ("file", "python"):
                found.append(External("reward.collect.labeller", rest, "file" if kind == "file" else "python"))
            others = [sampler.model for sampler in section.collect.samplers if sampler.model != "sft"]
            found += [External("reward.collect.samplers", model, "causal_lm") for model in others]
    judges: list[tuple[str, JudgeSection]] = []
    if stage == "ppo" and recipe.ppo:
        judges = [("ppo.judge", judge) for judge in (*recipe.ppo.judge, *recipe.ppo.second_judge)]
    if stage == "evaluate" and recipe.evaluate and (recipe.evaluate.prompts or recipe.evaluate.comparisons):
        key, sections = evaluating_judges(recipe)
        judges = [(key, judge) for judge in sections]
    for key, judge in judges:
        if judge.python:
            found.append(External(key, judge.python, "python"))
        elif judge.model and judge.model != "reward":
            found.append(External(key, judge.model, "judge"))
        if judge.chat_template:
            found.append(External(f"{key}.chat_template", judge.chat_template, "file"))
    return found


# Reading


def load_recipe(name_or_path: str, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """Reads a shipped recipe by name or any recipe by path, applies the overrides and checks everything.

    Raises RecipeError with the file, the key, what was expected and the nearest right name.
    """
    path = find_recipe(name_or_path)
    raw = _read_recipe(path)
    for override in overrides:
        _apply(raw, override)
    return parse_recipe(raw, f"{path} with {' '.join(overrides)}" if overrides else str(path))


def parse_recipe(raw: dict[str, Any], where: str) -> Recipe:
    """A Recipe from the plain values of a YAML file; `where` is named in errors."""
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(f"{where}:\n" + "\n".join(f"  {_explain(e)}" for e in _causes(error.errors()))) from None


def _causes(errors: Sequence[Any]) -> list[Any]:
    """The errors less those that only follow: a list whose one item is wrong is not empty besides."""
    places = [error["loc"] for error in errors]

    def follows(error: Any) -> bool:
        here = error["loc"]
        return error["type"] == "too_short" and any(len(p) > len(here) and p[: len(here)] == here for p in places)

    return [error for error in errors if not follows(error)]


def shipped_recipes() -> list[Path]:
    """The recipes that come with the package, the quickstart first."""
    folder = Path(__file__).resolve().parent.parent / "recipes"
    return sorted(folder.glob("*.yaml"), key=lambda p: (p.stem != "quickstart", p.stem))


def find_recipe(name_or_path: str) -> Path:
    """The file of a shipped recipe's name, or the path itself."""
    for path in shipped_recipes():
        if path.stem == name_or_path:
            return path
    path = Path(name_or_path)
    try:
        if path.is_dir():
            raise RecipeError(f"{path} is a directory, not a recipe file")
        exists = path.exists()
        if exists and not path.is_file() and path != Path(os.devnull):
            raise RecipeError(f"{path} is no plain file, so not a recipe")
    except (OSError, ValueError) as error:  # a name that is too long, or holds a NUL
        raise RecipeError(f"no recipe file {name_or_path[:100]}: {error}") from None
    if not exists:
        names = [p.stem for p in shipped_recipes()]
        raise RecipeError(f"no recipe file {path}, and no shipped recipe has that name" + _nearest(name_or_path, names))
    return path


MAX_RECIPE_BYTES = 1_000_000


def _read_recipe(path: Path) -> dict[str, Any]:
    raw = read_yaml(path, "recipe")
    if raw is None:
        raise RecipeError(f"{path}: empty; a recipe has at least `name` and a section for each of its `stages`")
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values, not a {type(raw).__name__}")
    return raw


def read_yaml(path: Path, what: str) -> Any:
    """The plain values of a YAML file: no tags, no key twice. Raises RecipeError, which says that it is no `what`."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_RECIPE_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path}: can't be read: {error.strerror}") from None
    if len(data) > MAX_RECIPE_BYTES:
        raise RecipeError(f"{path}: larger than {MAX_RECIPE_BYTES:,} bytes, so not a {what}")
    try:
        text = data.decode("utf-8-sig")
        return yaml.load(text, Loader=_StrictLoader)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text (byte {error.start}), so not a {what}") from None
    except yaml.YAMLError as error:
        why = " ".join(str(error).split()).replace('in "<unicode string>", ', "at ")
        raise RecipeError(f"{path}: not valid YAML: {why}") from None
    except (ValueError, RecursionError) as error:  # a date out of range, a thousand brackets
        raise RecipeError(f"{path}: not valid YAML: {error or 'nested too deeply'}") from None


_SCALARS = {  # what counts as more than text, as YAML 1.2 has it: no 1:30, no 010, no yes; 1e-4 is a number
    "tag:yaml.org,2002:bool": ("^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    "tag:yaml.org,2002:int": ("^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"^(?:[-+]?(?:[0-9][0-9_]*)?\.?[0-9_]+(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*\.(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+0123456789.",
    ),
}


def _resolve_as_we_do(kind: Any) -> None:
    """Gives a loader or dumper our rules for plain scalars."""
    kind.yaml_implicit_resolvers = {
        first: [(tag, rule) for tag, rule in rules if tag not in _SCALARS]
        for first, rules in kind.yaml_implicit_resolvers.items()
    }
    for tag in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
        pattern, firsts = _SCALARS[tag]
        kind.add_implicit_resolver(tag, re.compile(pattern), list(firsts))


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe part; a key that comes twice is an error."""


class _StrictDumper(yaml.SafeDumper):
    """Writes what `_StrictLoader` reads back: text that looks like a number is quoted."""


_resolve_as_we_do(_StrictLoader)
_resolve_as_we_do(_StrictDumper)


def _no_duplicates(loader: yaml.SafeLoader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is not text", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} comes twice", key_node.start_mark)
        seen.add(key)
    return {loader.construct_object(k, deep=True): loader.construct_object(v, deep=True) for k, v in node.value}


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _no_duplicates)


def _apply(raw: dict[str, Any], override: str) -> None:
    """Sets one `a.b.c=value` in the plain values; the value is read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {override!r}: expected key=value, for example ppo.kl.coefficient=0.1")
    try:
        value = yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise RecipeError(f"override {override!r}: {text!r} is not a YAML value") from None
    *parents, last = key.split(".")
    place = raw
    for parent in parents:
        inner = place.get(parent)
        if inner is not None and not isinstance(inner, dict):
            raise RecipeError(f"override {override!r}: {parent} is not a section")
        inner = place[parent] = dict(inner or {})  # a copy: an anchor may have made it part of another section too
        place = inner
    place[last] = value


def _explain(error: Any) -> str:
    """One line for one pydantic error: key, what is wrong, what was expected, the nearest right name."""
    location: tuple[int | str, ...] = error["loc"]
    key = ".".join(str(part) for part in location) or "recipe"
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        known = _fields_at(location[:-1])
        return f"{key}: unknown key" + _nearest(str(location[-1]), known)
    if error["type"] == "missing":
        return f"{key}: missing, and it has no default"
    if error["type"] == "value_error":
        return f"{key}: {message}" if location else message
    if error["type"] == "tuple_type":
        message = "must be a list"
    given = error.get("input")
    shown = repr(given) if not isinstance(given, dict | list) else f"a {type(given).__name__}"
    return f"{key}: {message[0].lower() + message[1:]} (given: {shown[:80]})" + _nearest_choice(given, error)


def _nearest_choice(given: Any, error: Any) -> str:
    expected = str((error.get("ctx") or {}).get("expected", ""))
    if error["type"] != "literal_error" or not isinstance(given, str):
        return ""
    return _nearest(given[:100], re.findall(r"'([^']+)'", expected))


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known here: {', '.join(known)}" if known else ""


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    """The keys that the section at this place of a recipe has."""
    model: type[BaseModel] | None = Recipe
    for part in location:
        if isinstance(part, int) or model is None:
            continue
        by_key = {field.alias or name: field for name, field in model.model_fields.items()}
        field = by_key.get(part)
        model = _section_in(field.annotation) if field else None
    return [field.alias or name for name, field in model.model_fields.items()] if model else []


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section inside an annotation such as `SftSection | None` or `tuple[Source, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        for inner in typing.get_args(annotation):
            found = _section_in(inner)
            if found:
                return found
    return None


# Writing, and what decides staleness


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; reading it gives an equal recipe."""
    text: str = yaml.dump(_plain(recipe), Dumper=_StrictDumper, sort_keys=False, allow_unicode=True, width=100)
    return text


def _plain(section: BaseModel) -> dict[str, Any]:
    """The values of a section by their keys; a null that is the default is left out."""
    found: dict[str, Any] = {}
    dumped = section.model_dump(mode="json", by_alias=True)
    for name, field in type(section).model_fields.items():
        key, value = field.alias or name, getattr(section, name)
        if isinstance(value, BaseModel):
            found[key] = _plain(value)
        elif isinstance(value, tuple) and any(isinstance(item, BaseModel) for item in value):
            found[key] = [_plain(item) for item in value]
        elif value is not None or field.default is not None:
            found[key] = dumped[key]
    return found


def result_fields(section: BaseModel) -> dict[str, Any]:
    """The flat `a.b.c: value` pairs of a section that change its stage's result."""
    found: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("changes_result") is False:
            continue
        value = getattr(section, name)
        key = field.alias or name
        if isinstance(value, BaseModel):
            found |= {f"{key}.{inner}": v for inner, v in result_fields(value).items()}
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            defaults = {k: f.default for k, f in type(value[0]).model_fields.items()}
            found[key] = [{k: v for k, v in result_fields(item).items() if v != defaults.get(k)} for item in value]
        elif isinstance(value, tuple):
            found[key] = list(value)
        else:
            found[key] = value
    return found


def fields_at_default(section: BaseModel) -> set[str]:
    """The keys of `result_fields` whose values nobody had to give."""
    found: set[str] = set()
    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), field.alias or name
        if isinstance(value, BaseModel):
            # a section that is only there when somebody writes it is never at its default
            found |= {f"{key}.{inner}" for inner in fields_at_default(value)} if field.default is not None else set()
        elif value == field.default:
            found.add(key)
    return found


def newer_keys(keys: set[str], was: Mapping[str, Any]) -> set[str]:
    """Those of the keys that an older version of a section's `result_fields` didn't know.

    `a.b.c` was known where `a.b` is there: then nothing stood in the place of that section.
    """

    def known(key: str) -> bool:
        parts = key.split(".")
        return any(".".join(parts[: length + 1]) in was for length in range(len(parts)))

    return {key for key in keys if not known(key)}
