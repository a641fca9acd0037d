"""What the stages on TRL's trainers share: their arguments, and progress, metrics and checkpoints in our form.

A trainer writes its own checkpoint into the folder of ours, which is sealed when it is whole; so the trainers' are
flushed, checksummed and renamed like all others. They hold tensors and numbers, and are read with `weights_only`.
"""

import json
import math
import pickle
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf.checkpoint import Checkpoint
from rlhf.errors import StageFailed
from rlhf.job import Job
from rlhf.runtime import Bar, MetricsLog, derive_seed
from rlhf.saver import Saver


def trainer_arguments(
    *,
    output: Path,
    seed: int,
    stage: str,
    steps: int,
    size: int,
    passes: int,
    learning_rate: float,
    warmup: float,
    weight_decay: float,
    gradient_clipping: float,
) -> dict[str, Any]:
    """The arguments of SFTConfig and RewardConfig that we decide: theirs default to bf16 and checkpointing on CPU too.

    `size` rows a forward pass on each process, `passes` of them a step; cosine to 10 % after a linear warm-up.
    The losses of all processes are divided by the number of all their tokens.
    """
    import torch

    gpu = torch.cuda.is_available()
    return {
        "output_dir": str(output),
        "max_steps": steps,
        "per_device_train_batch_size": size,
        "per_device_eval_batch_size": max(size, 32),
        "gradient_accumulation_steps": passes,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "warmup_steps": max(1, round(warmup * steps)),
        "weight_decay": weight_decay,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "max_grad_norm": gradient_clipping,
        "bf16": gpu and torch.cuda.is_bf16_supported(),
        "use_cpu": not gpu,
        "gradient_checkpointing": False,
        "logging_steps": 1,  # the means over several steps are ours, so that they can go on after a checkpoint
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_nan_inf_filter": False,  # or a loss that is no number is logged as 0
        "report_to": [],
        "ddp_find_unused_parameters": False,
        "disable_tqdm": True,
        "seed": derive_seed(seed, stage, "trainer"),
        "train_sampling_strategy": "sequential",  # the rows come in the order in which they are to be read
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": gpu,
    }


def run_trainer(trainer: Trainer, job: Job, steps: int, figures: dict[str, str], log_every: int) -> float:
    """Trains to the end, from the newest checkpoint on if there is one; returns the seconds of all its steps.

    `figures` maps the trainer's names of what is logged to ours. Raises Interrupted after a checkpoint.
    """
    metrics = job.metrics()
    saver = Saver(job, metrics)
    found = saver.resume()
    loop = TrainerLoop(job.stage, steps, saver, metrics, figures, log_every, found)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(loop)
    with saver.training(), loop.writing:
        try:
            trainer.train(resume_from_checkpoint=str(trainer_part(found)) if found else None)
        except pickle.UnpicklingError as error:
            raise _not_ours(found, str(error).splitlines()[0]) from None
        if loop.stopped_at is not None:
            raise saver.interrupted(loop.stopped_at)
        if trainer.state.global_step != steps:
            raise _not_ours(found, f"the trainer ended at step {trainer.state.global_step} of {steps}")
        return saver.seconds()


def _not_ours(checkpoint: Checkpoint | None, why: str) -> StageFailed:
    where = checkpoint.path if checkpoint else "of the trainer"
    return StageFailed(
        f"the checkpoint {where} is not one of ours ({why}); remove it, and the same command goes on from the one "
        "before"
    )


def trainer_part(checkpoint: Checkpoint) -> Path:
    """The trainer's own folder in one of our checkpoints."""
    return checkpoint.path / f"checkpoint-{checkpoint.step}"


class TrainerLoop(TrainerCallback):
    """A trainer's steps on our progress bar, in metrics.jsonl and in our checkpoints; refuses a loss without value."""

    LAST = ("learning_rate", "gradient_norm")  # logged as they are; the others as means since the last line

    def __init__(
        self,
        what: str,
        steps: int,
        saver: Saver,
        metrics: MetricsLog,
        figures: dict[str, str],
        log_every: int,
        found: Checkpoint | None,
    ) -> None:
        self._what, self._steps, self._saver, self._metrics = what, steps, saver, metrics
        self._figures, self._log_every = figures, log_every
        self._bar = Bar(what, steps, found.step if found else 0)
        self._window: list[dict[str, float]] = []  # the steps since the last line
        if found:
            self._window = json.loads((found.path / "window.json").read_text(encoding="utf-8"))
        self.writing = ExitStack()  # what is half written when the trainer fails is thrown away
        self._folder: Path | None = None
        self.stopped_at: int | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Starts the bar."""
        self._bar.__enter__()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ends the bar."""
        self._bar.__exit__(None, None, None)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Has the trainer write a checkpoint into a folder of ours where one is due, and stop where it is to."""
        save, stop = self._saver.decide(state.global_step, last=state.global_step == self._steps)
        if save:
            self._folder = self.writing.enter_context(self._saver.writing(state.global_step, model))
            args.output_dir = str(self._folder)
            control.should_save = True
        if stop:
            control.should_training_stop = True
            self.stopped_at = state.global_step

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Seals what the trainer wrote."""
        assert self._folder is not None
        if state.is_world_process_zero:
            (self._folder / "window.json").write_text(json.dumps(self._window), encoding="utf-8")
        self.writing.close()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Takes in the figures of one step; writes a line where one is due, shows what matters."""
        state.log_history.clear()  # ours is in metrics.jsonl; theirs would grow in every checkpoint
        values = {ours: float(logs[theirs]) for theirs, ours in self._figures.items() if logs and theirs in logs}
        if "loss" not in values:  # what the trainer says at its end
            return
        if not math.isfinite(values["loss"]):
            raise StageFailed(
                f"{self._what}: the loss is {values['loss']} at step {state.global_step}; try a smaller learning_rate"
            )
        self._window.append(values)
        if state.global_step % self._log_every and state.global_step != self._steps:
            return
        means = {
            name: value if name in self.LAST else sum(step[name] for step in self._window) / len(self._window)
            for name, value in values.items()
        }
        self._window.clear()
        self._metrics.log(step=state.global_step, **means)
        self._bar.show(state.global_step, **means)
