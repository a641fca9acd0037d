"""What the stages on TRL's trainers share: their arguments, and progress and metrics in our form. Imports TRL."""

from pathlib import Path
from typing import Any

from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf.errors import StageFailed
from rlhf.runtime import Bar, MetricsLog, derive_seed


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
    log_every: int,
) -> dict[str, Any]:
    """The arguments of SFTConfig and RewardConfig that we decide: theirs default to bf16 and checkpointing on CPU too.

    `size` rows a forward pass on each process, `passes` of them a step; cosine to 10 % after a linear warm-up.
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
        "logging_steps": log_every,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": derive_seed(seed, stage, "trainer"),
        "train_sampling_strategy": "sequential",  # the rows come in the order in which they are to be read
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": gpu,
    }


def without_printing(trainer: Trainer) -> Trainer:
    """The trainer without its own lines on the terminal."""
    trainer.remove_callback(PrinterCallback)
    return trainer


class ShowProgress(TrainerCallback):
    """A trainer's steps on our progress bar and in metrics.jsonl; refuses a loss that is no number."""

    def __init__(self, what: str, steps: int, metrics: MetricsLog, figures: dict[str, str]) -> None:
        """`figures` maps the trainer's names of what is shown to ours."""
        self._bar, self._metrics, self._figures = Bar(what, steps), metrics, figures
        self._what = what

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Starts the bar."""
        self._bar.__enter__()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ends the bar."""
        self._bar.__exit__(None, None, None)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Writes one line, shows the figures that matter."""
        values = {ours: float(logs[theirs]) for theirs, ours in self._figures.items() if logs and theirs in logs}
        if not values:
            return
        if values.get("loss", 0.0) != values.get("loss", 0.0):
            raise StageFailed(
                f"{self._what}: the loss is not a number at step {state.global_step}; try a smaller learning_rate"
            )
        self._metrics.log(step=state.global_step, **values)
        self._bar.show(state.global_step, **values)
