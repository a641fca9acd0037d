"""The training loop: gradient, verdict, update; checkpoints, validations and figures on the way.

AdamW (0.9, 0.95, 1e-8) with weight decay on matrices only, or Muon for the layers' matrices. Which rows a step reads
depends on the step and on how many rows were skipped after spikes, nothing else; so a run goes on at any step.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from rlhf.checkpoint import copy_tree, load_tree
from rlhf.data.tokens import Rows
from rlhf.errors import StageFailed
from rlhf.job import Job
from rlhf.model import decay_groups
from rlhf.muon import muon_with_adamw
from rlhf.pieces import put, weights_of
from rlhf.recipe import PretrainSection
from rlhf.runtime import Bar, log
from rlhf.saver import Saver
from rlhf.sharding import Holding
from stages.pretrain.loss import TokenLoss, positions_in_documents
from stages.pretrain.plan import Plan
from stages.pretrain.speed import flops_per_token, peak_flops
from stages.pretrain.spikes import Guard

BETAS, EPSILON = (0.9, 0.95), 1e-8


class Outcome(NamedTuple):
    """What a training came to, beside the weights."""

    seconds: float  # validations apart
    rollbacks: list[dict[str, Any]]
    peak_flops_per_second: float  # of this machine, measured
    flops_per_token: float


class Training:
    """A model, its optimisers and the step that they have reached."""

    def __init__(
        self,
        job: Job,
        settings: PretrainSection,
        model: PreTrainedModel,
        rows: Rows,
        plan: Plan,
        microbatch: int,
        begin: int | None,
        accelerator: Accelerator,
        holding: Holding,
        validate: Callable[[], dict[str, Any]],
        *,
        compiled: bool,
    ) -> None:
        """`microbatch`: rows of a forward pass; `begin`: the id before which no token sees, None for rows as a whole.

        `validate` gives the figures of a validation on the way, of the model with its weights.
        """
        self.job, self.settings, self.rows, self.plan, self.share = job, settings, rows, plan, holding.share
        self.microbatch, self.begin, self.accelerator, self.validate = microbatch, begin, accelerator, validate
        self.work = flops_per_token(model, settings.sequence_length)
        loss = TokenLoss(model, settings.z_loss)
        if compiled:
            loss.compile()
        self.held = holding.learning(loss)
        self.learner: TokenLoss = self.held.learner
        self.moving = self.held.moving(self.held.called, optimizers_of(self.learner.model, settings))
        self.metrics = job.metrics()
        self.saver = Saver(job, self.metrics)
        self.guard = Guard(settings.spikes, math.log(model.config.get_text_config().vocab_size), plan.steps)
        self.step = self.skipped = 0  # steps done; rows that were skipped
        self.validating = 0.0  # seconds
        self.losses, self.summed = 0.0, 0  # of the steps since the last line of metrics
        dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
        self.peak = peak_flops(accelerator.device, dtype) * job.team.size
        self._begin_window()

    def run(self) -> Outcome:
        """Trains to the end, from the last checkpoint where there is one."""
        found = self.saver.resume()
        if found:
            state = load_tree(found.path, "state", self.share)
            self._restore(state)
            self.guard.load(state["guard"])
            self.validating = state["seconds_validating"]
        self.moving.module.train()
        with self.saver.training(), Bar("pretrain", self.plan.steps, self.step) as bar:
            self._begin_window()
            while self.step < self.plan.steps:
                if self.guard.wants_state(self.step):
                    self.guard.keep(lambda: copy_tree(self._state()))
                loss, norm = self._gradient()
                cause = self.guard.fault(loss, norm)
                if cause:
                    self._roll_back(cause)
                    continue
                rate = self._update()
                self.guard.passed(loss)
                self._report(bar, loss, norm, rate)
                self.saver.after_step(self.step, self.plan.steps, self._checkpoint, self.learner)
        self.held.settle()
        return Outcome(self.saver.seconds() - self.validating, self.guard.rollbacks, self.peak, self.work)

    # A step

    @property
    def place(self) -> int:
        """Where the next step's rows stand in the training order."""
        return self.plan.rows_before(self.step) + self.skipped

    def _gradient(self) -> tuple[float, float]:
        """The gradient of one step's rows; their mean loss in nats per token, and the norm before it is clipped.

        Both are means over the processes: what is no number on one of them is none on all.
        """
        rows = self.plan.part_of(self.step).rows
        mine = rows // self.job.team.size
        first = self.place + self.job.team.rank * mine
        loss = self.add_gradient(range(first, first + mine))
        norm = self.moving.clip(self.settings.gradient_clipping)
        together = self.job.team.add([float(loss), norm])
        return together[0] / self.job.team.size, together[1] / self.job.team.size

    def add_gradient(self, places: range) -> torch.Tensor:
        """Adds up the gradient of this process's rows, a microbatch at a time; returns their mean loss.

        All rows are equally long and all processes have as many, so the mean over processes is that over all tokens.
        """
        total = torch.zeros((), device=self.accelerator.device)
        for start in range(places.start, places.stop, self.microbatch):
            end = min(start + self.microbatch, places.stop)
            inputs, targets = self._read(range(start, end))
            # gradients cross the processes with the last microbatch only
            with nullcontext() if end == places.stop else self.moving.accumulating():
                positions = None if self.begin is None else positions_in_documents(inputs, self.begin)
                found = self.moving.module(inputs, targets, positions)
                share = (end - start) / len(places)
                self.moving.backward(found.objective * share)
            total += found.nats * share
        return total

    def _read(self, places: range) -> tuple[torch.Tensor, torch.Tensor]:
        before = time.perf_counter()
        inputs, targets = (each.to(self.accelerator.device, non_blocking=True) for each in self.rows.batch(places))
        self._waited += time.perf_counter() - before
        return inputs, targets

    def _update(self) -> float:
        """One step of the optimisers; returns the learning rate."""
        rate = self.plan.learning_rate(self.step)
        self.moving.set_rate(rate)
        self.moving.step()
        self.moving.forget()
        self.step += 1
        return rate

    # Figures

    def _begin_window(self) -> None:
        """Speeds are those since the last line of metrics."""
        self._since, self._waited, self._rows_then = time.perf_counter(), 0.0, self.plan.rows_before(self.step)

    def _report(self, bar: Bar, loss: float, norm: float, rate: float) -> None:
        """Logs and validates after a step, where it is due."""
        s, done = self.settings, self.step
        self.losses, self.summed = self.losses + loss, self.summed + 1
        last = done == self.plan.steps
        if done % s.log_every == 0 or last:
            mean, self.losses, self.summed = self.losses / self.summed, 0.0, 0
            if not math.isfinite(mean):
                raise StageFailed(f"pretrain: the loss is {mean} at step {done}; try a smaller learning_rate")
            seconds, rows = time.perf_counter() - self._since, self.plan.rows_before(done)
            speed = (rows - self._rows_then) * self.plan.length / seconds
            utilisation = speed * self.work / self.peak
            self.metrics.log(
                step=done,
                loss=mean,
                learning_rate=rate,
                gradient_norm=norm,
                tokens=rows * self.plan.length,
                tokens_per_step=self.plan.part_of(done - 1).rows * self.plan.length,
                tokens_per_second=speed,
                model_flops_utilisation=round(utilisation, 4),
                data_wait_seconds=round(self._waited, 4),
            )
            shown = {"loss": mean, "tokens_a_second": speed, "flops_utilisation": utilisation}
            bar.show(done, work=rows / self.plan.rows, **shown, data_wait=self._waited / seconds)
            self._begin_window()
        if done % s.validate_every == 0 and not last:
            before = time.perf_counter()
            with self.held.gathered():
                figures = self.validate()
            self.metrics.log(step=done, **figures)
            spent = time.perf_counter() - before
            self.validating, self._since = self.validating + spent, self._since + spent

    # States

    def _state(self) -> dict[str, Any]:
        """What the next step depends on, the guard apart."""
        return {
            "step": self.step,
            "place": self.place,
            "skipped": self.skipped,
            "model": weights_of(self.learner.model),
            "optimizers": list(self.moving.state().values()),
            "losses": self.losses,
            "summed": self.summed,
            "metrics": self.metrics.position(),
        }

    def _checkpoint(self) -> dict[str, Any]:
        return {**self._state(), "guard": self.guard.state(), "seconds_validating": self.validating}

    def _restore(self, state: dict[str, Any]) -> None:
        self.step, self.skipped = state["step"], state["skipped"]
        self.losses, self.summed = state["losses"], state["summed"]
        put(self.learner.model, state["model"])
        kept = copy_tree(state["optimizers"])  # an optimiser goes on with the very tensors that it is given
        self.moving.load(dict(zip(self.moving.optimizers, kept, strict=True)))
        self.moving.forget()

    def _roll_back(self, cause: str) -> None:
        """Goes back to the last good state, and on behind the rows that made the loss jump."""
        rows = self.plan.part_of(self.step).rows
        back = self.guard.back(self.step, cause, self.place, rows)
        self._restore(back.state)
        self.skipped = back.behind - self.plan.rows_before(self.step)
        self.metrics.cut_back(back.state["metrics"], self.step)
        self.metrics.log(step=self.step, rollback=back.record)
        log(
            f"pretrain: a spike at step {back.record['step']}: {cause}; back to the state of step {self.step}, rows "
            f"{back.record['skipped_rows'][0]:,} to {back.behind:,} are skipped"
        )
        self.saver.save_going_back(self.step, self._checkpoint, self.learner)
        self._begin_window()


def optimizers_of(model: PreTrainedModel, settings: PretrainSection) -> dict[str, torch.optim.Optimizer]:
    """What moves the model's weights: each takes its own part of them."""
    if settings.optimizer == "muon":
        return muon_with_adamw(model, settings.learning_rate, settings.weight_decay, BETAS, EPSILON)
    groups = decay_groups(model, settings.weight_decay)
    return {"adamw": torch.optim.AdamW(groups, lr=settings.learning_rate, betas=BETAS, eps=EPSILON, fused=True)}
