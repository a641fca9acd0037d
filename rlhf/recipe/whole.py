"""The recipe: all sections, and what must hold between them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from rlhf.functional.compute_optimal import HEAD_CHANNELS, inner_parameters, shape_of_depth, training_of
from rlhf.recipe.base import NO_RESULT, STAGES, DataSection, Section, StageName, TrackerName, check_name
from rlhf.recipe.evaluate import EvaluateSection
from rlhf.recipe.model import ModelSection, TokenizerSection
from rlhf.recipe.ppo import PpoSection
from rlhf.recipe.pretrain import PretrainSection
from rlhf.recipe.reward import RewardSection
from rlhf.recipe.sft import SftSection
from rlhf.recipe.shared import JudgeSection


class CheckpointSection(Section):
    """When a stage that trains writes a checkpoint; it always writes one when it is interrupted, and at its end."""

    every_minutes: float = Field(5.0, gt=0, le=1e6, description="minutes between checkpoints")
    every_steps: int | None = Field(None, ge=1, description="and after every so many steps (in ppo: updates)")
    keep: int = Field(2, ge=1, description="how many are kept of each stage, the newest ones")


class HardwareSection(Section):
    """What a recipe is made for; `rlhf plan` plans for it where nothing else is said."""

    gpus: int = Field(1, ge=1, le=4096, description="one process for each")
    gpu_memory: float = Field(gt=0, le=1024, description="GiB of each")
    launch: str | None = Field(None, min_length=1, description="the launch file that goes with it (--launch-config)")


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

    name: RunName = Field(description="the run's directory below --runs-dir", json_schema_extra=NO_RESULT)
    description: str = Field("", description="what it is for, in a line", json_schema_extra=NO_RESULT)
    needs: str = Field("", description="hardware and data", json_schema_extra=NO_RESULT)
    takes: str = Field("", description="time and memory", json_schema_extra=NO_RESULT)
    hardware: HardwareSection | None = Field(
        None, description="what it is made for; `rlhf plan` plans for it", json_schema_extra=NO_RESULT
    )
    seed: int = Field(1, ge=0, lt=2**32, description="what every draw of every stage depends on")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="of what is computed in training; weights are float32. auto: bfloat16 on a GPU that has it, "
        "float32 elsewhere (a CPU without hardware for bfloat16 is many times slower with it, and refused)",
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto",
        description="how models attend. auto: sdpa, where the architecture has it; flash_attention_2: in the training "
        "of sft and reward, on a GPU in bfloat16, with the package flash-attn; elsewhere sdpa, since our masks need it",
    )
    threads: int = Field(0, ge=0, description="CPU threads of a process; 0: all cores", json_schema_extra=NO_RESULT)
    checkpoints: CheckpointSection = Field(
        default=CheckpointSection(), description="what a killed run goes on from", json_schema_extra=NO_RESULT
    )
    track: Trackers = Field(
        (), description="who gets the figures of metrics.jsonl as well, as live curves", json_schema_extra=NO_RESULT
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
