"""The stage ppo."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rlhf.recipe.base import NO_RESULT, Section, Sources
from rlhf.recipe.shared import JudgeSection, LoraSection, Sampling


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
        json_schema_extra=NO_RESULT,
    )
    off: tuple[str, ...] = Field(
        (), description="names of findings that are not looked for", json_schema_extra=NO_RESULT
    )
    most_back_offs: int = Field(3, ge=1, description="after so many it stops", json_schema_extra=NO_RESULT)


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
    gradient_checkpointing: bool = Field(
        False, description="hold less, compute each layer twice", json_schema_extra=NO_RESULT
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
    log_every: int = Field(1, ge=1, description="updates between lines in metrics.jsonl", json_schema_extra=NO_RESULT)
    samples_every: int = Field(10, ge=1, description="updates between examples shown", json_schema_extra=NO_RESULT)

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
        if self.lora.quantised and self.layout != "adapters":
            raise ValueError(f"lora.quantised: in layout {self.layout} all weights are trained; take layout: adapters")
        if self.keep.rule == "second_judge" and not self.second_judge:
            raise ValueError("keep.rule is second_judge, but there is no second_judge")
        return self
