"""The ppo stage: proximal policy optimisation of the SFT model against a judge, our own loop on Accelerate.

One update: roll out a response to each prompt; score them; spread the score and the KL penalty over the tokens;
estimate advantages; then, for some epochs, clipped policy and value steps on minibatches of whole episodes.

Where it departs from Schulman et al. 2017 (arXiv:1707.06347), as RLHF does since Ziegler et al. 2019:
  - an episode is one response, an action one token; the score falls on the last real token;
  - a KL penalty of every token against the frozen SFT model keeps the policy near it;
  - advantages are whitened over all of an update's tokens; losses are divided by a minibatch's real tokens, so that
    neither microbatches nor processes change a gradient;
  - the gradients of policy and critic are clipped apart.

The house: stage (the course of the whole), roles and layouts (the models), episodes (what they are, as tensors too),
rollout (where they come from), learner (an update), measure (on prompts that are not learned on), keep (which policy
stays), course (the curve), doctor (what goes wrong), gold (the known truth).
"""

from statistics import fmean
from typing import Any

from rlhf.job import Job
from rlhf.model import ADAPTER_LOADS, count_parameters, model_card, save_model
from rlhf.runtime import log
from rlhf.saver import once
from stages.common import card_facts
from stages.gold import best_gold
from stages.lora import save_named_adapter, trained_on
from stages.ppo.course import best_of_n_points, write_course
from stages.ppo.episodes import Prompt
from stages.ppo.keep import rule_of
from stages.ppo.measure import Measured
from stages.ppo.roles import POLICY
from stages.ppo.stage import Stage


def run(job: Job) -> dict[str, Any]:
    """Optimises the SFT model against the judge and saves it in ppo/model."""
    stage = Stage(job)
    before = Measured.from_facts(once(job, "before", lambda _: stage.test.measure().facts()).facts)
    log(f"ppo: before: {before.line()}")
    yardstick = best_of_n_points(job, stage.validation, stage.settings.best_of)
    seconds = stage.train()
    kept = stage.keeper.restore()
    stage.held.actors.settle()
    after = stage.test.measure()
    log(f"ppo: after update {kept.update}, which is kept: {after.line()}")
    if kept.update == 0:
        last = rule_of(stage.settings) == "last"
        why = "within keep.kl_budget" if last else f"better by {rule_of(stage.settings)}"
        log(f"ppo: no update was {why}: what is kept is the model that PPO began with")
    s = stage.settings
    trained = sum(parameter.numel() for parameter in stage.roles.actors.policy_parameters())
    if s.layout == "adapters" and job.team.is_main:
        _save_adapter(stage)
    policy = stage.roles.actors.plain_policy()
    summary = {
        "parameters": count_parameters(policy),
        "parameters_trained": trained,
        **stage.choices.facts(),
        "layout": s.layout,
        "updates": s.updates,
        "episodes": s.updates * s.episodes_per_update,
        "episodes_per_second": round(s.updates * s.episodes_per_update / seconds, 2),
        "kept_update": kept.update,
        "kept_by": rule_of(s),
        **_figures(before, after),
        **_gold_figures(before, after, stage.test_prompts),
        "findings": stage.doctor.found,
        "back_offs": stage.back_offs,
        "course": write_course(job, stage.keeper.points, yardstick, kept, s.keep.kl_budget),
    }
    card = model_card(
        f"{job.recipe.name}: aligned chat model (PPO)",
        f"Optimised with PPO against {' + '.join(judge.title for judge in s.judge)}, from the SFT model on."
        + (trained_on(s.lora) if s.layout == "adapters" else ""),
        card_facts(summary, "parameters", "updates", "score_before", "score_after", "kl", "gold_before", "gold_after"),
    )
    if job.team.is_main:
        save_model(policy, stage.vocabulary.tokenizer, job.directory.model, card)
    return summary


def _save_adapter(stage: Stage) -> None:
    """Writes the policy's adapter to ppo/adapter."""
    job = stage.job
    card = model_card(
        f"{job.recipe.name}: aligned chat model (PPO), adapter",
        f"Low-rank adapters for {stage.start.name}; ../model is that model with them merged."
        + trained_on(stage.settings.lora),
        {},
        ADAPTER_LOADS,
    )
    policy, tokenizer = stage.roles.actors.policy, stage.vocabulary.tokenizer
    save_named_adapter(policy, POLICY, stage.start.name, tokenizer, job.directory.path / "adapter", card)


def _figures(before: Measured, after: Measured) -> dict[str, Any]:
    second = {}
    if before.second and after.second:
        second = {**before.second.as_keys("second_judge_before", 4), **after.second.as_keys("second_judge_after", 4)}
        second |= _gain(before, after, "second", "second_judge")
    return {
        **before.score.as_keys("score_before", 4),
        **after.score.as_keys("score_after", 4),
        **_gain(before, after, "score", "score"),
        **second,
        "judge_before": {name: round(value, 4) for name, value in before.judged.items()},
        "judge_after": {name: round(value, 4) for name, value in after.judged.items()},
        **after.kl.as_keys("kl", 4),
        **after.response_tokens.as_keys("response_tokens", 2),
        **after.ended.as_keys("responses_ended", 4),
    }


def _gain(before: Measured, after: Measured, what: str, name: str) -> dict[str, Any]:
    gain = after.gain_over(before, what)
    return gain.as_keys(f"{name}_gain", 4) if gain else {}


def _gold_figures(before: Measured, after: Measured, test: list[Prompt]) -> dict[str, Any]:
    if before.gold is None or after.gold is None:
        return {}
    best = fmean(best_gold([prompt.messages for prompt in test]))
    return {
        **before.gold.as_keys("gold_before", 4),
        **after.gold.as_keys("gold_after", 4),
        **_gain(before, after, "gold", "gold"),
        "gold_best": round(best, 4),
    }
