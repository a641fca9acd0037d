"""The ppo stage: proximal policy optimisation of the SFT model against a judge, our own loop on Accelerate.

One update: roll out a response to each prompt; score them; spread the score and the KL penalty over the tokens;
estimate advantages; then, for some epochs, clipped policy and value steps on minibatches of whole episodes.

Where it departs from Schulman et al. 2017 (arXiv:1707.06347), as RLHF does since Ziegler et al. 2019:
  - an episode is one response, an action one token; the score falls on the last real token;
  - a KL penalty of every token against the frozen SFT model keeps the policy near it;
  - advantages are whitened over all of an update's tokens; losses are divided by a minibatch's real tokens, so that
    neither microbatches nor processes change a gradient;
  - the gradients of policy and critic are clipped apart.

The house: episodes (as tensors), roles and layouts (the models), learner (an update), measure (on prompts that are not
learned on), keep (which policy stays), course (the curve), doctor (what goes wrong), gold (the known truth).
"""

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from rlhf.checkpoint import load_tree
from rlhf.errors import DataError, StageFailed
from rlhf.functional.intervals import mean_estimate
from rlhf.job import Job
from rlhf.model import count_parameters, end_ids, model_card, save_model
from rlhf.rundir import read_json, write_json
from rlhf.runtime import Bar, derive_seed, log, make_accelerator
from rlhf.saver import Saver, once
from stages.common import card_facts, packed_texts, starting_model
from stages.ppo.course import best_of_n_points, write_course
from stages.ppo.doctor import SMALLER_STEPS_HELP, Doctor, Finding
from stages.ppo.episodes import Episode, Prompt, Vocabulary, read_prompts
from stages.ppo.gold import best_gold
from stages.ppo.keep import Keeper, Point, rule_of
from stages.ppo.layouts import build_roles, memory_table
from stages.ppo.learner import Budget, Drawer, Learner, Texts
from stages.ppo.measure import Examiner, Measured

VALIDATION_SHARE, MOST_VALIDATION = 0.1, 128
SHOWN = 3  # examples
TOLD_AGAIN_AFTER = 10  # updates
ACTIVATIONS = 2**29  # bytes


def run(job: Job) -> dict[str, Any]:
    """Optimises the SFT model against the judge and saves it in ppo/model."""
    stage = Stage(job)
    before = Measured.from_facts(once(job, "before", lambda _: stage.test.measure().facts()).facts)
    log(f"ppo: before: {before.line()}")
    yardstick = best_of_n_points(job, stage.validation, stage.settings.best_of)
    seconds = stage.train()
    kept = stage.keeper.restore()
    after = stage.test.measure()
    log(f"ppo: after update {kept.update}, which is kept: {after.line()}")
    s = stage.settings
    summary = {
        "parameters": count_parameters(stage.roles.actors.policy),
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
        "course": write_course(job, stage.keeper.points, yardstick, kept),
    }
    card = model_card(
        f"{job.recipe.name}: aligned chat model (PPO)",
        f"Optimised with PPO against {' + '.join(judge.title for judge in s.judge)}, from the SFT model on.",
        card_facts(summary, "parameters", "updates", "score_before", "score_after", "kl", "gold_before", "gold_after"),
    )
    if job.team.is_main:
        save_model(stage.roles.actors.plain_policy(), stage.vocabulary.tokenizer, job.directory.model, card)
    return summary


class Stage:
    """What the stage works with, from the recipe."""

    def __init__(self, job: Job) -> None:
        recipe = job.recipe
        assert recipe.ppo is not None
        self.job, self.settings = job, recipe.ppo
        s = self.settings
        accelerator = make_accelerator()
        start = starting_model(recipe, job.run, "ppo")
        tokenizer = start.tokenizer()
        self.roles = build_roles(recipe, job.run, start, tokenizer, accelerator.device)
        policy = self.roles.actors.policy
        self.vocabulary = Vocabulary(tokenizer, end_ids(policy, tokenizer), s.sampling.stop)
        prompts, validation = self._prompts()
        self.test_prompts = read_prompts(recipe, s, tokenizer, policy, "test_prompts")
        budget = Budget(s.microbatch_tokens or default_tokens(policy), s.microbatch_size or s.episodes_per_update)
        log(
            f"ppo: layout {s.layout}; {s.updates} updates of {s.episodes_per_update} episodes, {s.epochs} epochs x "
            f"{s.minibatches} minibatches of {s.episodes_per_update // s.minibatches} episodes, over {job.team.size} "
            f"processes in microbatches of at most {budget.tokens:,} tokens; {len(prompts):,} prompts, "
            f"{len(validation):,} validation prompts, {len(self.test_prompts):,} test prompts"
        )
        for line in memory_table(self.roles):
            log(f"ppo: {line}")
        drawer = Drawer(self.roles.actors, self.vocabulary, s)
        common = (job.team, recipe.seed, s, self.roles, self.vocabulary, drawer, budget)
        self.test = Examiner(*common, self.test_prompts, "test")
        self.validation = Examiner(*common, validation, "validation")
        self.learner = Learner(*common, prompts, accelerator, self._texts())
        folder = job.directory.path
        self.keeper = Keeper(s, self.roles.actors, folder / "kept", folder / "checkpoints", writes=job.team.is_main)
        self.doctor, self.back_offs, self._back_offs_file = Doctor(s.doctor.off), 0, folder / "back_offs.json"

    def _prompts(self) -> tuple[list[Prompt], list[Prompt]]:
        """Those to learn on, and those to measure on the way; no prompt is in both."""
        recipe, s = self.job.recipe, self.settings
        read = (recipe, s, self.vocabulary.tokenizer, self.roles.actors.policy)
        prompts = read_prompts(*read, "prompts")
        if s.validation_prompts:
            validation = read_prompts(*read, "validation_prompts")
        else:
            distinct = list({tuple(prompt.ids): prompt for prompt in prompts}.values())
            order = np.random.default_rng(derive_seed(recipe.seed, "ppo", "held out")).permutation(len(distinct))
            most = min(MOST_VALIDATION, max(1, round(VALIDATION_SHARE * len(distinct))))
            validation = [distinct[place] for place in sorted(order[:most].tolist())]
        held = {tuple(prompt.ids) for prompt in validation}
        left = [prompt for prompt in prompts if tuple(prompt.ids) not in held]
        if not left:
            raise DataError("ppo.prompts: every prompt is a validation prompt, so none is left to learn on")
        return left, validation

    def _texts(self) -> Texts | None:
        """What gives the pretraining texts of an optimiser step."""
        ptx = self.settings.ptx
        if ptx is None:
            return None
        seed = derive_seed(self.job.recipe.seed, "ppo", "texts")
        packed, _ = packed_texts(self.job, ptx.train, self.vocabulary.tokenizer, ptx.sequence_length, seed)
        rows = ptx.tokens_per_minibatch // ptx.sequence_length

        def texts(step: int) -> torch.Tensor:
            inputs, targets = packed.batch(range(step * rows, (step + 1) * rows))
            return torch.cat((inputs, targets[:, -1:]), 1)

        return texts

    # Training

    def state(self) -> dict[str, Any]:
        """What the next update depends on."""
        return {
            "learner": self.learner.state(),
            "points": self.keeper.state(),
            "doctor": self.doctor.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave."""
        self.learner.load(state["learner"])
        self.keeper.load(state["points"])
        self.doctor.load(state["doctor"])

    def train(self) -> float:
        """All updates; the seconds that they took."""
        s, job = self.settings, self.job
        metrics = job.metrics()
        saver = Saver(job, metrics)
        found = saver.resume()
        update = 0
        if found:
            self.load(load_tree(found.path, "state"))
            update = found.step
            self._apply_back_offs((read_json(self._back_offs_file) or {"times": 0})["times"])
        else:
            self._back_offs_file.unlink(missing_ok=True)
            metrics.log(update=0, **self._validate(0))
            if s.doctor.action == "back_off":
                saver.save(0, self.state, self.learner.weights())
        with saver.training(), Bar("ppo", s.updates, update, lines=True) as bar:
            while update < s.updates:
                episodes, figures = self.learner.update(update)
                update += 1
                bar.show(update, **{label: figures[name] for label, name in SHOWN_FIGURES.items()})
                if update % s.samples_every == 0:
                    self._show(episodes)
                measured = update % s.validate_every == 0 or update == s.updates
                noted = self._validate(update) if measured else {}
                findings = self._consult(update, figures)
                if findings:
                    noted["findings"] = [finding.name for finding in findings]
                if noted or update % s.log_every == 0:
                    metrics.log(update=update, **figures, **noted)
                update = self._treat(update, findings, saver)
                saver.after_step(update, s.updates, self.state, self.learner.weights())
            return saver.seconds()

    def _validate(self, update: int) -> dict[str, Any]:
        """Measures the policy on the validation prompts, and keeps it if it is the best so far; the figures."""
        found = self.validation.measure()
        point = Point.of(update, found)
        best = self.keeper.add(point)
        log(f"ppo: validation after update {update}: {found.line()}{' (the best so far)' if best and update else ''}")
        values = point._asdict()
        del values["update"]
        return {f"validation_{name}": value for name, value in values.items() if value is not None}

    def _show(self, episodes: list[Episode]) -> None:
        for episode in episodes[:SHOWN]:
            prompt, response = self.test.told(episode)
            log(f"  {prompt} -> {response} [{episode.score:.2f}]")

    def _consult(self, update: int, figures: dict[str, float]) -> list[Finding]:
        """What the doctor finds; the user is told what wasn't found shortly before."""
        findings = self.doctor.look(update, figures)
        for finding in findings:
            if not any(update - TOLD_AGAIN_AFTER <= made < update for made in self.doctor.found[finding.name]):
                log(f"ppo: update {update}: {finding}")
        return findings

    def _treat(self, update: int, findings: list[Finding], saver: Saver) -> int:
        """Does about the findings what the recipe says; the update to go on after."""
        action = self.settings.doctor.action
        if findings and action == "stop":
            raise StageFailed(f"ppo: stopped after update {update}: {'. '.join(map(str, findings))}")
        harmful = [finding for finding in findings if finding.name in SMALLER_STEPS_HELP]
        return self._back_off(update, harmful[0], saver) if harmful and action == "back_off" else update

    def _back_off(self, update: int, finding: Finding, saver: Saver) -> int:
        """Restores the last checkpoint, from before the finding, and halves the learning rates from there on.

        How often that was done stands in a file of its own, which is written first: a run that is killed here goes on
        as this one does.
        """
        times = self.back_offs + 1
        if times > self.settings.doctor.most_back_offs:
            raise StageFailed(f"ppo: backed off {self.back_offs} times, and again after update {update}: {finding}")
        if self.job.team.is_main:
            write_json(self._back_offs_file, {"times": times})
        found = saver.back()  # one is written before the first update
        self.load(load_tree(found.path, "state"))
        self._apply_back_offs(times)
        log(f"ppo: {finding.name}: back to update {found.step}, with {0.5**times:g} of the learning rates")
        return found.step

    def _apply_back_offs(self, times: int) -> None:
        self.back_offs = times
        self.learner.scale_rates(0.5**times)


SHOWN_FIGURES = {
    "score": "score",
    "KL": "kl",
    "entropy": "entropy",
    "tokens": "response_tokens",
    "ended": "ended",
    "clipped": "clip_fraction",
    "explained": "explained_variance",
    "episodes/s": "episodes_per_second",
}


def default_tokens(model: PreTrainedModel) -> int:
    """Tokens of a microbatch whose activations take about half a GiB: a rough count for a Transformer's layers."""
    config = model.config.get_text_config()
    width, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * width
    return max(256, ACTIVATIONS // (4 * layers * (12 * width + 4 * inner)))


def _figures(before: Measured, after: Measured) -> dict[str, Any]:
    second = {}
    if before.second and after.second:
        second = {**before.second.as_keys("second_judge_before", 4), **after.second.as_keys("second_judge_after", 4)}
    return {
        **before.score.as_keys("score_before", 4),
        **after.score.as_keys("score_after", 4),
        **second,
        "judge_before": {name: round(value, 4) for name, value in before.judged.items()},
        "judge_after": {name: round(value, 4) for name, value in after.judged.items()},
        **after.kl.as_keys("kl", 4),
        **after.response_tokens.as_keys("response_tokens", 2),
        **after.ended.as_keys("responses_ended", 4),
    }


def _gold_figures(before: Measured, after: Measured, test: list[Prompt]) -> dict[str, Any]:
    if before.gold is None or after.gold is None:
        return {}
    best = mean_estimate(best_gold([prompt.messages for prompt in test])).mean
    return {
        **before.gold.as_keys("gold_before", 4),
        **after.gold.as_keys("gold_after", 4),
        "gold_best": round(best, 4),
    }
