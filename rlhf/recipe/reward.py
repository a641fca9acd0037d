"""The stage reward."""

from __future__ import annotations

from pydantic import Field, model_validator

from rlhf.recipe.base import NO_RESULT, Section, Source, Sources
from rlhf.recipe.shared import LoraSection, Sampling, TooLong


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
    microbatch_size: int | None = Field(None, ge=1, description="comparisons of one forward pass at most; default: all")
    gradient_checkpointing: bool = Field(
        False, description="hold less, compute each layer twice", json_schema_extra=NO_RESULT
    )
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
        default=RequireSection(), description="the gate before PPO", json_schema_extra=NO_RESULT
    )
    validate_every: int = Field(100, ge=1, description="steps between validations", json_schema_extra=NO_RESULT)
    log_every: int = Field(10, ge=1, description="steps between lines in metrics.jsonl", json_schema_extra=NO_RESULT)

    @model_validator(mode="after")
    def _has_comparisons(self) -> RewardSection:
        if any(source.builtin for source in (*self.train, *self.test)):
            raise ValueError("the built-in world has no comparisons in store; `collect` makes them")
        if self.from_ is None and self.collect is None and not (self.train and self.test):
            raise ValueError("needs comparisons: `collect`, or `train` and `test`, or an existing judge in `from`")
        if self.from_ is not None and self.start is not None:
            raise ValueError("either `from` (an existing judge) or `start` (what a new one starts from), not both")
        return self
