"""The stage sft."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf.recipe.base import NO_RESULT, Section, Sources
from rlhf.recipe.shared import EarlyStoppingSection, LoraSection, Sampling, TooLong


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
    microbatch_size: int | None = Field(
        None, ge=1, description="conversations of one forward pass at most; default: all"
    )
    gradient_checkpointing: bool = Field(
        False, description="hold less, compute each layer twice", json_schema_extra=NO_RESULT
    )
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
        0.9, ge=0, le=1, description="warn if fewer of them end by themselves", json_schema_extra=NO_RESULT
    )
    validate_every: int = Field(100, ge=1, description="steps between validations", json_schema_extra=NO_RESULT)
    log_every: int = Field(10, ge=1, description="steps between lines in metrics.jsonl", json_schema_extra=NO_RESULT)
