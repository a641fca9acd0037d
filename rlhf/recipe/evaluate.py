"""The stage evaluate."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from rlhf.recipe.base import Section, Source
from rlhf.recipe.shared import JudgeSection, Sampling


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
