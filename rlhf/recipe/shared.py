"""Sections that several stages have: sampling, adapters, early stopping, judges."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, StrictInt, model_validator

from rlhf.recipe.base import Section


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
    quantised: Literal["nf4"] | None = Field(
        None,
        description="while the adapters are trained, the base's linear layers are held in 4 bits, head and embeddings "
        "apart (QLoRA, Dettmers et al. 2023, arXiv:2305.14314); needs bitsandbytes: pip install 'rlhf[quantised]'",
    )


class EarlyStoppingSection(Section):
    """Ends a stage when its validation loss no longer falls, and keeps the weights with which it was lowest."""

    every: int = Field(50, ge=1, description="steps between the validations that decide")
    patience: int = Field(3, ge=1, description="validations without a new lowest loss after which the stage ends")
    min_gain: float = Field(0.0, ge=0, description="a loss counts as lower when it is lower by more than this (nats)")


TooLong = Literal["drop", "truncate", "error"]


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
