"""The stage's own course: what it sets up, and training with its validations, its doctor and its checkpoints."""

from typing import Any

import numpy as np
import torch

from rlhf.checkpoint import load_tree
from rlhf.choices import choose
from rlhf.errors import DataError, StageFailed
from rlhf.job import Job
from rlhf.model import end_ids
from rlhf.rundir import read_json, write_json
from rlhf.runtime import Bar, derive_seed, log, make_accelerator
from rlhf.saver import Saver
from rlhf.sharding import WholeModels, sharded_models
from stages.common import check_context, context_of, packed_texts, starting_model
from stages.ppo.doctor import SMALLER_STEPS_HELP, Doctor, Finding
from stages.ppo.episodes import Episode, Prompt, Vocabulary, read_prompts
from stages.ppo.keep import Keeper, Point
from stages.ppo.layouts import build_roles, memory_table
from stages.ppo.learner import Learner, Texts
from stages.ppo.measure import Examiner
from stages.ppo.roles import hold
from stages.ppo.rollout import Budget, Rollout, Setup

VALIDATION_SHARE, MOST_VALIDATION = 0.1, 128
SHOWN = 3  # examples
TOLD_AGAIN_AFTER = 10  # updates


class Stage:
    """What the stage works with, from the recipe."""

    def __init__(self, job: Job) -> None:
        recipe = job.recipe
        assert recipe.ppo is not None
        self.job, self.settings = job, recipe.ppo
        s = self.settings
        accelerator = make_accelerator(job.recipe.precision)
        self.start = start = starting_model(recipe, job.run, "ppo")
        tokenizer = start.tokenizer()
        self.roles = build_roles(recipe, job.run, start, tokenizer, accelerator.device)
        policy = self.roles.actors.policy
        self.choices = choose(recipe, "ppo", policy.config._attn_implementation)
        self.vocabulary = Vocabulary(tokenizer, end_ids(policy, tokenizer), s.sampling.stop)
        prompts, validation = self._prompts()
        self.test_prompts = read_prompts(recipe, s, tokenizer, policy, "test_prompts")
        budget = Budget.of(s, policy)
        log(
            f"ppo: layout {s.layout}; {s.updates} updates of {s.episodes_per_update} episodes, {s.epochs} epochs x "
            f"{s.minibatches} minibatches of {s.episodes_per_update // s.minibatches} episodes, over {job.team.size} "
            f"processes in microbatches of at most {budget.tokens:,} tokens; {len(prompts):,} prompts, "
            f"{len(validation):,} validation prompts, {len(self.test_prompts):,} test prompts"
        )
        for line in memory_table(self.roles):
            log(f"ppo: {line}")
        holding = sharded_models(job.team, job.sharding, recipe.precision) or WholeModels(accelerator)
        self.share, self.held = holding.share, hold(self.roles, holding)
        setup = Setup(job.team, recipe.seed, s, self.roles, self.vocabulary, budget, accelerator, holding, self.held)
        rollout = Rollout(setup)
        self.test = Examiner(setup, rollout, self.test_prompts, "test")
        self.validation = Examiner(setup, rollout, validation, "validation")
        self.learner = Learner(setup, rollout, prompts, self._texts())
        folder = job.directory.path
        actors = self.held.actors.learner
        self.keeper = Keeper(s, actors, folder / "kept", folder / "checkpoints", writes=job.team.is_main)
        alone = ("judge_is_constant",) if s.episodes_per_update == 1 else ()  # one score varies from none
        self.doctor, self._back_offs_file = Doctor((*s.doctor.off, *alone)), folder / "back_offs.json"
        self.back_offs: list[dict[str, Any]] = []  # each with its update, finding, evidence, and where it went back to

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
            raise DataError(
                "ppo.prompts: every prompt is one of ppo.validation_prompts, so none is left to learn on"
                if s.validation_prompts
                else f"ppo.prompts: {len(prompts)} prompts, {len(distinct)} of them distinct, are too few to hold some "
                "out to validate on; give more, or others as ppo.validation_prompts"
            )
        return left, validation

    def _texts(self) -> Texts | None:
        """What gives the pretraining texts of an optimiser step."""
        ptx = self.settings.ptx
        if ptx is None:
            return None
        check_context(context_of(self.roles.actors.policy), "ppo.ptx.sequence_length", ptx.sequence_length)
        seed = derive_seed(self.job.recipe.seed, "ppo", "texts")
        packed = packed_texts(self.job, ptx.train, self.vocabulary.tokenizer, ptx.sequence_length, seed)
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
            self.load(load_tree(found.path, "state", self.share))
            update = found.step
            self.back_offs = (read_json(self._back_offs_file) or {}).get("back_offs", [])
        else:
            self._back_offs_file.unlink(missing_ok=True)
            metrics.log(update=0, **self._validate(0))
            if s.doctor.action == "back_off":
                saver.save(0, self.state, self.learner.weights())
        with saver.training(), Bar("ppo", s.updates, update, lines=True) as bar:
            while update < s.updates:
                episodes, figures = self.learner.update(update, self._rate_scale(update))
                update += 1
                bar.show(update, **{label: figures[name] for label, name in SHOWN_FIGURES.items()})
                measured = update % s.validate_every == 0 or update == s.updates
                noted = self._validate(update) if measured else {}
                if update % s.samples_every == 0:
                    noted["samples"] = self._show(episodes[:SHOWN])
                findings = self._consult(update, figures)
                if findings:
                    noted["findings"] = [finding.name for finding in findings]
                if noted or update % s.log_every == 0:
                    metrics.log(update=update, **figures, **noted)
                to_go_on_after = self._treat(update, findings, saver)
                if to_go_on_after == update:
                    saver.after_step(update, s.updates, self.state, self.learner.weights())
                update = to_go_on_after
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

    def _show(self, episodes: list[Episode]) -> list[dict[str, Any]]:
        """Shows some episodes; as metrics.jsonl has them."""
        samples = []
        for episode in episodes:
            response = self.vocabulary.conversation(episode.prompt, episode.response).response
            asked = episode.prompt.messages[-1]["content"]
            log(f"  {asked} -> {response} [{episode.score:.2f}]")
            samples.append({"prompt": asked, "response": response, "score": episode.score})
        return samples

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
            raise StageFailed(f"ppo: stopped after update {update}: {'. '.join(map(str, findings))}. {AGAIN}")
        harmful = [finding for finding in findings if finding.name in SMALLER_STEPS_HELP]
        return self._back_off(update, harmful[0], saver) if harmful and action == "back_off" else update

    def _back_off(self, update: int, finding: Finding, saver: Saver) -> int:
        """Restores the last checkpoint, from before the finding, and halves the learning rates from there on.

        That stands in a file of its own, since the checkpoint is from before: a run that is killed later goes on as
        this one does, and one that is killed before it is written comes here again.
        """
        if len(self.back_offs) >= self.settings.doctor.most_back_offs:
            raise StageFailed(
                f"ppo: backed off {len(self.back_offs)} times, and again after update {update}: {finding}. {AGAIN}"
            )
        found = saver.back()  # one is written before the first update
        record = {
            "update": update,
            "finding": finding.name,
            "evidence": finding.evidence,
            "back_to": found.step,
        }
        if self.job.team.is_main:
            write_json(self._back_offs_file, {"back_offs": [*self.back_offs, record]})
        self.back_offs = [*self.back_offs, record]
        self.load(load_tree(found.path, "state", self.share))
        scale = self._rate_scale(found.step)
        log(f"ppo: {finding.name}: back to update {found.step}, with {scale:g} of the learning rates")
        return found.step

    def _rate_scale(self, update: int) -> float:
        """What the back-offs leave of the learning rates behind this update: those to an earlier one or to this one
        count, so that a run that has to go on from an older checkpoint repeats what was done.
        """
        return float(0.5 ** sum(record["back_to"] <= update for record in self.back_offs))


AGAIN = (
    "The same command goes on from the last checkpoint and meets this again; other orders for the doctor "
    "(ppo.doctor.action=warn, ppo.doctor.off=[NAME]) let it pass, any other change begins the stage anew"
)
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
