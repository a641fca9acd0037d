"""The stage pretrain."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from rlhf.functional.compute_optimal import Training
from rlhf.functional.schedules import ScheduleName
from rlhf.recipe.base import NO_RESULT, Section, Sources
from rlhf.recipe.prepare import Off, PrepareSection


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
        False, description="hold less, compute each layer twice", json_schema_extra=NO_RESULT
    )
    compile: bool | Literal["auto"] = Field(
        "auto",
        description="torch.compile: on a GPU a third faster or more, after minutes of work; on a CPU hardly any. auto: "
        "on a GPU, where there is a C compiler",
    )
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
    validate_every: int = Field(200, ge=1, description="steps between validations", json_schema_extra=NO_RESULT)
    log_every: int = Field(10, ge=1, description="steps between lines in metrics.jsonl", json_schema_extra=NO_RESULT)

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
